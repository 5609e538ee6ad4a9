"""Weight decay in an optax chain: position, target, masking, and 100 steps that match optax and torch."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from x64 import enable_x64

import jaxweights as jw

RATE, LR = 0.1, 0.02
W = np.random.default_rng(0).normal(size=(5, 4))
TARGET = np.random.default_rng(1).normal(size=(5, 4))


def trained(*optimizers):
    """float64 weights after 100 steps of each optimizer on ‖sin(w) − target‖²."""
    loss = lambda w: jnp.sum((jnp.sin(w) - TARGET) ** 2)

    def train(tx, w):
        def step(carry, _):
            w, state = carry
            updates, state = tx.update(jax.grad(loss)(w), state, w)
            return (optax.apply_updates(w, updates), state), None

        return jax.lax.scan(step, (w, tx.init(w)), length=100)[0][0]

    with enable_x64(True):
        return jax.jit(lambda w: [train(tx, w) for tx in optimizers])(jnp.asarray(W))


CHAINS = {
    "SGD": (
        lambda decay: optax.chain(decay, optax.sgd(LR, momentum=0.9)),
        lambda torch, w: torch.optim.SGD([w], LR, momentum=0.9, weight_decay=RATE),
    ),
    "SGD, Nesterov": (
        lambda decay: optax.chain(decay, optax.sgd(LR, momentum=0.9, nesterov=True)),
        lambda torch, w: torch.optim.SGD([w], LR, momentum=0.9, weight_decay=RATE, nesterov=True),
    ),
    "Adam": (
        lambda decay: optax.chain(decay, optax.adam(LR)),
        lambda torch, w: torch.optim.Adam([w], LR, weight_decay=RATE),
    ),
    "AdamW": (
        lambda decay: optax.chain(optax.scale_by_adam(), decay, optax.scale_by_learning_rate(LR)),
        lambda torch, w: torch.optim.AdamW([w], LR, weight_decay=RATE),
    ),
}


@pytest.mark.parametrize("name", CHAINS)
def test_100_steps_are_those_of_optax(name):
    chain, _ = CHAINS[name]
    decays = jw.add_weight_decay(RATE), optax.add_decayed_weights(RATE), optax.identity()
    ours, theirs, without = trained(*map(chain, decays))
    np.testing.assert_allclose(ours, theirs, rtol=1e-12)
    assert np.abs(ours - without).max() > 0.01


@pytest.mark.slow  # importing torch dominates the time
@pytest.mark.parametrize("name", CHAINS)
def test_100_steps_are_those_of_torch(name):
    torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'jaxweights[peers]'")
    chain, optimizer = CHAINS[name]
    w = torch.tensor(W, requires_grad=True)
    theirs = optimizer(torch, w)
    for _ in range(100):
        theirs.zero_grad()
        torch.sum((torch.sin(w) - torch.tensor(TARGET)) ** 2).backward()
        theirs.step()
    (ours,) = trained(chain(jw.add_weight_decay(RATE)))
    np.testing.assert_allclose(ours, w.detach().numpy(), rtol=1e-9)


def test_decay_after_the_learning_rate_does_not_scale_with_it():
    """With zero gradients, w ← w + u − λw gives (1 − λ)ⁿ·w after n steps at any learning rate."""
    for rate in (1e-3, 1.0):
        params = {"w": jnp.asarray(W)}
        tx = optax.chain(optax.sgd(rate), jw.add_weight_decay(0.25, independent=True))
        state = tx.init(params)
        for _ in range(3):
            updates, state = tx.update({"w": jnp.zeros((5, 4))}, state, params)
            params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(params["w"], 0.75**3 * W, rtol=1e-6)


@pytest.mark.parametrize("penalty_grad", [None, jnp.sign])
def test_decay_toward_the_start_or_a_given_tree(penalty_grad):
    """L2-SP: without a gradient the weights return to the center and stay there."""
    params = {"a": jnp.asarray(W), "b": jnp.ones(4)}
    center = {"a": jnp.asarray(TARGET), "b": jnp.zeros(4)}
    tx = optax.chain(jw.add_weight_decay(0.5, toward=center, penalty_grad=penalty_grad), optax.sgd(0.1))
    state, distance = tx.init(params), W - TARGET
    for _ in range(4):
        updates, state = jax.jit(tx.update)(jax.tree.map(jnp.zeros_like, params), state, params)
        params = optax.apply_updates(params, updates)
        distance = distance - 0.05 * (distance if penalty_grad is None else np.sign(distance))
    np.testing.assert_allclose(params["a"], TARGET + distance, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(params["b"], 1)
    tx = jw.add_weight_decay(0.5, toward=params)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    np.testing.assert_array_equal(updates["a"], 0)


def test_cautious_decay_after_adam_leaves_alone_what_moves_away_from_zero():
    """Chen et al., algorithm 1: w ← w − η(u + λ·w·1[u·w >= 0]), where u is the subtracted direction."""
    params = {"w": jnp.array([[1.0, 1.0, -1.0, -1.0]])}
    grads = {"w": jnp.array([[1.0, -1.0, 1.0, -1.0]])}
    tx = optax.chain(
        optax.scale_by_adam(eps=0.0), jw.add_weight_decay(0.5, cautious=True), optax.scale_by_learning_rate(0.1)
    )
    updates, _ = tx.update(grads, tx.init(params), params)
    np.testing.assert_allclose(updates["w"], [[-0.15, 0.1, -0.1, 0.15]], rtol=1e-4)
    after = optax.chain(optax.adam(0.1, eps=0.0), jw.add_weight_decay(0.05, cautious=True, independent=True))
    updates, _ = after.update(grads, after.init(params), params)
    np.testing.assert_allclose(updates["w"], [[-0.15, 0.1, -0.1, 0.15]], rtol=1e-4)


def models():
    rngs = nnx.Rngs(0)
    net = nnx.Sequential(nnx.Conv(3, 4, (3, 3), rngs=rngs), nnx.BatchNorm(4, rngs=rngs), nnx.Linear(4, 2, rngs=rngs))
    key = jax.random.key(0)
    return {
        "dict": {"dense": {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4)}, "norm": {"scale": jnp.ones(4)}},
        "stacked dict": {"dense": {"kernel": jnp.ones((2, 3, 4)), "bias": jnp.ones((2, 4))}},
        "nnx": nnx.state(net, nnx.Param),
        "equinox": eqx.filter([eqx.nn.Linear(3, 4, key=key), eqx.nn.LayerNorm((3, 4))], eqx.is_array),
    }


@pytest.mark.parametrize("kind", models())
def test_biases_and_norm_scales_are_skipped_on_every_tree(kind):
    params = models()[kind]
    tx = jw.add_weight_decay(1.0)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    decayed = {}
    for (path, u), p in zip(jax.tree.leaves_with_path(updates), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(u, p * np.any(u))
        decayed[jax.tree_util.keystr(path)] = bool(np.any(u))
    expected = {
        "dict": {"['dense']['kernel']"},
        "stacked dict": {"['dense']['kernel']"},
        "equinox": {"[0].weight"},
        "nnx": {path for path in decayed if "kernel" in path},
    }[kind]
    assert {path for path, on in decayed.items() if on} == expected and expected
