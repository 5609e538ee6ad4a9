"""Tied trees: views, summed gradients, donation and optimizers, with every leaf still in the tree."""

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


KINDS = {
    "table": jax.random.normal(jax.random.key(2), (5, 3)),
    "square": jax.random.normal(jax.random.key(3), (3, 3)),
    "stack": {"q": jax.random.normal(jax.random.key(4), (2, 3, 4, 6)), "b": jnp.arange(8.0).reshape(2, 4)},
    "as it is": jnp.zeros((3, 3)),
    "transposed": jnp.zeros((3, 5)),
    "square transposed": jnp.zeros((3, 3)),
    "turned": jnp.zeros((4, 6, 2, 3)),
    "last": {"q": jnp.zeros((3, 4, 6)), "b": jnp.zeros(4)},
    "moved": jnp.zeros((6, 3, 4)),
    "heads": jnp.zeros((4, 6, 3)),
}
VIEWS = {
    "as it is": "square",
    "transposed": "table",
    "square transposed": jw.Tied("square", transpose=(1, 0)),
    "turned": "stack/q",
    "last": jw.Tied("stack", index=-1),
    "moved": jw.Tied("stack/q", transpose=(2, 0, 1), index=0),
    "heads": jw.Tied("stack/q", index=0),
}


@pytest.mark.parametrize("how", ["eager", "jit", "numpy", "shapes", "vmap"])
def test_views(how):
    def tied(tree):
        return jw.tie(tree, VIEWS)

    trees = {"numpy": jax.tree.map(np.asarray, KINDS), "shapes": jax.eval_shape(lambda: KINDS)}
    many = jax.tree.map(lambda a: jnp.stack([a, -a]), KINDS)
    if how == "vmap":
        got = jax.tree.map(lambda a: a[0], jax.vmap(tied)(many))
    else:
        got = (jax.jit(tied) if how == "jit" else tied)(trees.get(how, KINDS))
    table, square, q, b = map(np.asarray, (KINDS["table"], KINDS["square"], KINDS["stack"]["q"], KINDS["stack"]["b"]))
    expected = {
        "as it is": square,
        "transposed": table.T,
        "square transposed": square.T,
        "turned": q.transpose(2, 3, 0, 1),
        "last": {"q": q[1], "b": b[1]},
        "moved": np.moveaxis(q[0], -1, 0),
        "heads": np.moveaxis(q[0], 0, -1),
    }
    for place, array in expected.items():
        for a, e in zip(jax.tree.leaves(got[place]), jax.tree.leaves(array), strict=True):
            assert (a.shape, a.dtype) == (e.shape, e.dtype)
            if how != "shapes":
                np.testing.assert_array_equal(a, e)
            assert isinstance(a, {"numpy": np.ndarray, "shapes": jax.ShapeDtypeStruct}.get(how, jax.Array))
    if how == "eager":  # no two places share memory, not even where a view moves nothing
        one = jw.tie({"a": KINDS["table"], "b": KINDS["table"]}, {"a": jw.Tied("b", transpose=(0, 1))})
        leaves = [*jax.tree.leaves(got), *jax.tree.leaves(one)]
        assert len({leaf.unsafe_buffer_pointer() for leaf in leaves}) == len(leaves) - 1  # b is the table itself


def test_the_gradient_of_a_table_and_its_transpose_is_their_sum():
    x, g = (np.random.default_rng(i).normal(size=(4, 5)) for i in range(2))
    table = np.asarray(KINDS["table"], np.float64)

    def value(p):
        tied = jw.tie(p, {"head": "table"})
        return jnp.vdot(g, x @ tied["table"] @ tied["head"])

    grads = jax.grad(value)({"table": KINDS["table"], "head": jnp.ones((3, 5))})
    np.testing.assert_allclose(grads["table"], x.T @ (g @ table) + g.T @ (x @ table), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(grads["head"], 0)


def test_a_stored_weight_stays_stored_in_each_place():
    table = jax.random.normal(jax.random.key(5), (12, 8))
    stack = jw.quantize(jax.random.normal(jax.random.key(6), (3, 8, 8)), "nf4", axes=jw.Axes(batch=0))
    stored = jw.quantize(table, 4, axes=jw.Axes(1, 0))
    params = {"embed": stored, "head": jnp.zeros((8, 12)), "stack": stack, "layer": jnp.zeros((8, 8))}
    ties = {"head": "embed", "layer": jw.Tied("stack", index=1)}
    tied = jw.tie(params, ties)
    for place, expected in {"head": stored.todense().T, "layer": stack.todense()[1]}.items():
        assert isinstance(tied[place], jw.QuantizedArray)
        np.testing.assert_array_equal(tied[place].todense(), expected)
    shapes = jw.tie(jax.eval_shape(lambda: params), ties)
    assert jax.tree.map(jnp.shape, tied) == jax.tree.map(jnp.shape, shapes)
    pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(tied)]
    assert len(set(pointers)) == len(pointers)
    x = jnp.ones((2, 8))
    np.testing.assert_allclose(x @ tied["head"], x @ stored.todense().T, rtol=1e-5, atol=1e-5)


def test_on_a_mesh_a_transpose_moves_no_data():
    mesh = jax.make_mesh((2, 4), ("x", "y"))
    spec = jax.sharding.PartitionSpec
    placed = lambda shape, *names: jax.device_put(
        jax.random.normal(jax.random.key(0), shape), jax.sharding.NamedSharding(mesh, spec(*names))
    )
    params = {"embed": placed((8, 12), "x", "y"), "head": placed((12, 8), "y", "x")}
    tied = jw.tie(params, {"head": "embed"})
    assert tied["head"].sharding.is_equivalent_to(params["head"].sharding, 2)
    np.testing.assert_array_equal(tied["head"], params["embed"].T)
    compiled = jax.jit(lambda p: jw.tie(p, {"head": "embed"}), out_shardings=jax.tree.map(lambda a: a.sharding, params))
    text = compiled.lower(params).compile().as_text()
    assert "all-" not in text and "collective" not in text
