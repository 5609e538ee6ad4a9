"""Tied trees in training: summed gradients, donation and optimizers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxweights as jw

TIES = {"head": "embed", "out/kernel": "embed"}
X = jax.random.normal(jax.random.key(1), (5, 3))


def params():
    keys = jax.random.split(jax.random.key(0), 4)
    draw = lambda i: jax.random.normal(keys[i], (3, 3))
    return {"embed": draw(0), "head": draw(1), "out": {"kernel": draw(2)}, "free": draw(3)}


def loss(p):
    return (jnp.tanh(X @ p["embed"] @ p["free"]) @ p["head"].T @ p["out"]["kernel"]).var()


def single(p):
    """The same model with one leaf in the three places, without `tie`."""
    return loss({"embed": p["embed"], "head": p["embed"], "out": {"kernel": p["embed"]}, "free": p["free"]})


def test_a_tied_tree_has_its_own_buffer_in_each_place():
    tied = jw.tie(params(), TIES)
    assert len({leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tied)}) == 4
    copies = jax.jit(lambda p: jw.tie(p, TIES)).lower(params()).as_text()
    assert "stablehlo" not in copies.partition("func.func")[2].replace("stablehlo.return", "")  # free under jit


@pytest.mark.parametrize("optimizer", [optax.sgd(1e-3, momentum=0.9), optax.adam(0.05)], ids=["sgd", "adam"])
def test_training_with_donation_is_that_of_one_leaf(optimizer):
    def step(f, p, state):
        updates, state = optimizer.update(jax.grad(f)(p), state, p)
        return optax.apply_updates(p, updates), state

    donated = jax.jit(lambda p, s: step(lambda p: loss(jw.tie(p, TIES)), p, s), donate_argnums=(0, 1))
    expected = jax.jit(lambda p, s: step(single, p, s))
    given = tied = jw.tie(params(), TIES)
    one = {name: jnp.copy(tied[name]) for name in ("embed", "free")}
    state, one_state = optimizer.init(tied), optimizer.init(one)
    for _ in range(5):
        tied, state = donated(tied, state)
        one, one_state = expected(one, one_state)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given))
    for name in one:
        np.testing.assert_allclose(tied[name], one[name], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(loss(jw.tie(tied, TIES)), single(one), rtol=1e-4)


def test_leaves_without_a_buffer_and_of_numpy():
    shapes = jax.eval_shape(params)
    assert jw.tie(shapes, TIES)["head"] is shapes["embed"]
    arrays = jax.tree.map(lambda a: np.float64(a), params())
    assert jw.tie(arrays, TIES)["head"].dtype == np.float64
