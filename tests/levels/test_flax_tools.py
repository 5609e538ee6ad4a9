"""What else people do with a Flax module: tables, copies, bytes, checkpoints, other ways to run it."""

import copy
import inspect
import pickle
import re

import flax.linen as nn
import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx, serialization
from flax.traverse_util import flatten_dict, unflatten_dict

import jaxweights as jw
from jaxweights.levels.paths import STATE

KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (4, 6))
TRANSFORM = jw.Chain(jw.SpectralNorm(), jw.WeightNorm())


class Mlp(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="last")(nn.relu(nn.Dense(8, name="first")(x)))

    def twice(self, x):
        return 2 * self(x)


@pytest.fixture(scope="module")
def linen():
    model = jw.linen.Transformed(Mlp(), TRANSFORM)
    variables = jax.jit(model.init)(KEY, X)
    return model, variables, np.asarray(jax.jit(model.apply)(variables, X))


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_linen_copies_and_other_ways_to_run(linen):
    model, variables, y = linen
    for copied in (copy.deepcopy(model), model.clone(), pickle.loads(pickle.dumps(model))):
        assert copied == model
        close(jax.jit(copied.apply)(variables, X), y)
    bound = model.bind(variables)
    close(bound(X), y)
    close(bound.twice(X), 2 * y)
    close(jax.jit(nn.remat(jw.linen.Transformed)(Mlp(), TRANSFORM).apply)(variables, X), y)
    close(nn.jit(jw.linen.Transformed)(Mlp(), TRANSFORM).apply(variables, X), y)
    # A jitted or rematerialized wrapper moves its state as well.
    _, expected = jax.jit(lambda v: model.apply(v, X, mutable=[STATE]))(variables)
    _, moved = nn.jit(nn.remat(jw.linen.Transformed))(Mlp(), TRANSFORM).apply(variables, X, mutable=[STATE])
    jax.tree.map(close, moved, expected)


def test_linen_tables_and_shapes(linen):
    model, variables, y = linen
    table = nn.tabulate(model, KEY, console_kwargs={"width": 200})(X)
    assert "first" in table and STATE in table
    shapes = jax.eval_shape(model.init_with_output, KEY, X)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), shapes) == jax.tree.map(
        lambda a: (a.shape, a.dtype), (y, variables)
    )
    lazy = model.lazy_init(KEY, jax.ShapeDtypeStruct(X.shape, X.dtype))
    assert jax.tree.map(lambda a: a.shape, lazy) == jax.tree.map(lambda a: a.shape, variables)


def test_linen_variables_survive_bytes_flat_names_and_checkpoints(linen, tmp_path):
    _, variables, _ = linen
    zeros = jax.tree.map(np.zeros_like, variables)
    flat = flatten_dict(variables, sep="/")
    assert f"params/{STATE}/last/kernel/1.scale" in flat and f"{STATE}/first/kernel/0.v" in flat
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "variables", variables)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "variables", zeros)
    for back in (
        unflatten_dict(flat, sep="/"),
        serialization.from_bytes(zeros, serialization.to_bytes(variables)),
        serialization.from_state_dict(zeros, serialization.to_state_dict(variables)),
        restored,
    ):
        jax.tree.map(np.testing.assert_array_equal, back, variables)


def build(seed=0):
    rngs = nnx.Rngs(seed)
    layers = nnx.Sequential(nnx.Linear(6, 8, rngs=rngs), nnx.relu, nnx.Linear(8, 3, rngs=rngs))
    return jw.nnx.transformed(layers, TRANSFORM, rngs=rngs)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_nnx_tables():
    """In training mode, alone and beside a plain layer of the same class."""
    model = build()
    pair = nnx.Sequential(jw.nnx.transformed(nnx.Linear(6, 6, rngs=nnx.Rngs(0)), TRANSFORM), model)
    # After a table of a class and its subclass, whatever they are, old Flax does not restore their methods.
    old = "compute_flops" not in inspect.signature(nnx.tabulate).parameters
    for module in [model] if old else [model, pair]:
        table = re.sub(r"\x1b\[[0-9;]*m", "", nnx.tabulate(module, X, console_kwargs={"width": 250}))
        assert "TransformVariable" in table and "kernel: float32[6,8]" in table and "float32[4,3]" in table


def test_nnx_state_survives_bytes_flat_names_and_checkpoints(tmp_path):
    model, other = build(), build(seed=1)
    model.eval(), other.eval()
    y, pure = nnx.jit(lambda m: m(X))(model), nnx.to_pure_dict(nnx.state(model))
    names = {"/".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model))}
    assert f"{STATE}/fixed/layers/0/kernel/0.v" in names and f"{STATE}/learned/layers/2/kernel/1.scale" in names
    strings = serialization.to_state_dict(pure)
    assert set(flatten_dict(strings, sep="/")) == names
    by_name = unflatten_dict(flatten_dict(strings, sep="/"), sep="/")
    by_bytes = serialization.from_bytes(nnx.to_pure_dict(nnx.state(other)), serialization.to_bytes(pure))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", pure)
        checkpointer.wait_until_finished()
        by_file = checkpointer.restore(tmp_path / "state")
    for restored in (by_name, by_bytes, by_file):
        fresh, state = nnx.clone(other), nnx.state(other)
        nnx.replace_by_pure_dict(state, restored)
        nnx.update(fresh, state)
        np.testing.assert_array_equal(nnx.jit(lambda m: m(X))(fresh), y)


def test_nnx_shapes_and_text():
    model = nnx.eval_shape(build)
    shapes = lambda m: jax.tree.map(lambda a: a.shape, nnx.to_pure_dict(nnx.state(m)))
    assert shapes(model) == shapes(build())
    assert "weight_transform" in repr(model) and "TransformVariable" in str(build())


def test_optimizers_find_the_learned_entries_by_path():
    """Masks and labels by path, with the same names in Linen and NNX."""
    linen = jw.linen.Transformed(Mlp(), jw.WeightNorm())
    params = jax.jit(linen.init)(KEY, X)["params"]
    label = lambda p: jax.tree_util.tree_map_with_path(lambda k, _: "scale" if STATE in str(k) else "rest", p)
    tx = optax.multi_transform({"scale": optax.sgd(1.0), "rest": optax.set_to_zero()}, label)
    updates, _ = tx.update(jax.tree.map(np.ones_like, params), tx.init(params), params)
    moved = {path for path, u in flatten_dict(updates, sep="/").items() if np.any(u)}
    assert moved == {f"{STATE}/first/kernel/scale", f"{STATE}/last/kernel/scale"}
    decay = jw.add_weight_decay(0.5, where=f"{STATE}/*/kernel/scale")
    updates, _ = decay.update(jax.tree.map(np.zeros_like, params), decay.init(params), params)
    assert {path for path, u in flatten_dict(updates, sep="/").items() if np.any(u)} == moved
    # By default, the state is not taken for weights.
    assert set(jw.on_tree(jw.ClipWeights(1.0)).selected(params)) == {"first/kernel", "last/kernel"}
