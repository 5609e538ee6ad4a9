"""Models and trees with stored weights: Linen, NNX, Equinox, the levels, checkpoints."""

import itertools

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from stored_weights import OURS, STORES, normal, same, thin

import jaxweights as jw
from jaxweights.core.axes import Reading, axes_or_default
from jaxweights.core.stored import is_stored
from jaxweights.levels.paths import flatten

# Models


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(16, name="dense")(nn.LayerNorm()(x)), None


class Model(nn.Module):
    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(24, 16, name="embed")
        blocks = nn.scan(nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        x, _ = blocks(name="blocks")(embed(ids), None)
        x = nn.MultiHeadDotProductAttention(2, name="attention")(x)
        return embed.attend(nn.Conv(16, (3,), name="conv")(x))


AXES = {
    "blocks/dense/kernel": jw.Axes(batch=0),
    "attention/out/kernel": jw.axes.ATTENTION_OUT,
    **{f"attention/{part}/kernel": jw.axes.ATTENTION_IN for part in ("query", "key", "value")},
}


def stored_tree(params, axes, first):
    """The tree with all kernels and tables stored, in different ways in turn."""
    tree = flatten(params)
    kernels = [p for p in tree.paths if p.endswith(("kernel", "embedding", "weight"))]
    stores = itertools.islice(itertools.cycle(OURS), first, None)
    return tree.replaced(
        {p: STORES[store](tree.by_path[p], axes(p)) for p, store in zip(kernels, stores, strict=False)}
    )


in_turn = pytest.mark.parametrize("first", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in (1, 2, 3))])


@in_turn
def test_a_linen_model(first):
    model, ids = Model(), jnp.array([[1, 5, 23, 0]])
    params = model.init(jax.random.key(0), ids)["params"]
    stored = stored_tree(params, AXES.get, first)
    assert sum(map(is_stored, flatten(stored).leaves)) == 7
    f = lambda params, ids: model.apply({"params": params}, ids)
    same(jax.jit(jw.with_stored(f))(stored, ids), jax.jit(f)(jw.densify(stored), ids))


class Stack(nnx.Module):
    def __init__(self, rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap
        def layers(rngs):
            return nnx.Linear(8, 8, rngs=rngs)

        self.layers, self.head = layers(rngs), nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def run(x, layer):
            return jnp.tanh(layer(x))

        return self.head(run(x, self.layers))


@in_turn
def test_an_nnx_model(first):
    graph, state = nnx.split(Stack(nnx.Rngs(0)))
    stored = stored_tree(state, {"layers/kernel": jw.Axes(batch=0)}.get, first)
    assert sum(map(is_stored, flatten(stored).leaves)) == 2
    f = lambda state, x: nnx.merge(graph, state)(x)
    same(jax.jit(jw.with_stored(f))(stored, normal(3, 8)), jax.jit(f)(jw.densify(stored), normal(3, 8)))


@in_turn
def test_an_equinox_model(first):
    model = eqx.nn.MLP(8, 4, 16, 2, key=jax.random.key(0))
    weights, others = eqx.partition(model, eqx.is_array)
    stored = eqx.combine(
        stored_tree(weights, lambda path: jw.Axes(input=-1, output=-2), first), others, is_leaf=is_stored
    )
    f = lambda model, x: jax.vmap(model)(x)
    same(eqx.filter_jit(jw.with_stored(f))(stored, normal(3, 8)), eqx.filter_jit(f)(jw.densify(stored), normal(3, 8)))


# Levels


def tree_of_stores():
    params = {name: {"kernel": store(normal(8, 4)), "bias": normal(4)} for name, store in STORES.items()}
    return {**params, "dense": {"kernel": normal(8, 4), "bias": normal(4)}}


def bits(tree):
    return [np.asarray(a).tobytes() for a in jax.tree.leaves(tree)]


def test_levels_take_a_stored_weight_for_one_leaf():
    params = tree_of_stores()
    assert set(flatten(params).paths) == {f"{name}/{leaf}" for name in params for leaf in ("kernel", "bias")}
    assert jw.on_tree(jw.Prune(0.5)).selected(params).keys() == {"dense/kernel"}
    lifted = jw.on_tree(jw.Prune(0.5))
    pruned = lifted.apply(params, lifted.init(params, jax.random.key(0)))
    assert jnp.sum(pruned["dense"]["kernel"] == 0) == 16
    for name in STORES:
        assert bits(pruned[name]) == bits(params[name])
        assert type(pruned[name]["kernel"]) is type(params[name]["kernel"])
    same(jw.densify(params)["packed"]["kernel"], thin(normal(8, 4)), 0)
    assert {r.path for r in jw.summarize(params, "**/kernel").rows} == {f"{name}/kernel" for name in params}


def test_optimizers_leave_a_stored_weight_alone():
    params = tree_of_stores()
    rounding = jw.round_stochastically(jax.random.key(0))
    for tx in (
        optax.chain(jw.add_weight_decay(0.1), rounding, jw.project(jw.ClipWeights(0.1))),
        jw.confine(optax.identity(), jw.Prune(0.5)),
    ):
        updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
        for name in STORES:
            assert not any(np.any(a) for a in jax.tree.leaves(updates[name]))
        assert np.any(updates["dense"]["kernel"])


def test_capture_sees_the_arrays_beside_stored_weights():
    params, x = tree_of_stores(), normal(5, 8, seed=1)

    def model(params, x):
        return sum(x @ p["kernel"] + p["bias"] for p in params.values())

    ((path, stats),) = jw.capture(jw.with_stored(model), params, [x]).items()
    assert path == "dense/kernel"
    np.testing.assert_allclose(stats.second_moment, np.float64(x).T @ np.float64(x) / 5, rtol=1e-5, atol=1e-5)


def test_a_checkpoint_keeps_what_is_stored(tmp_path):
    params = tree_of_stores() | {"stack": jw.sparse.pack(thin(normal(3, 8, 4)), axes=jw.Axes(batch=0))}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "params", params)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "params", jax.tree.map(ocp.utils.to_shape_dtype_struct, params))
    assert jax.tree.structure(restored) == jax.tree.structure(params)
    assert bits(restored) == bits(params)


def test_bytes_are_true():
    w = thin(normal(3, 64, 32), jw.Axes(batch=0))
    for stored, expected in (
        (jw.quantize(w, 8, axes=jw.Axes(batch=0)), 3 * (64 * 32 + 4 * 32)),
        (jw.sparse.pack(w, axes=jw.Axes(batch=0)), 3 * 64 * 32 * 4 * 17 // 32),
        (jw.sparse.pack_blocks(w.at[:, 32:].set(0), block=(32, 32), axes=jw.Axes(batch=0)), 3 * (32 * 32 * 4 + 8)),
    ):
        assert stored.nbytes == expected and stored.shape == w.shape
        assert (stored.ndim, stored.size) == (3, 3 * 64 * 32)
        assert Reading.of(stored.axes, stored.shape) == Reading.of(jw.Axes(batch=0), stored.shape)
        assert axes_or_default(stored.axes, 3) == stored.axes
