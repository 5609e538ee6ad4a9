"""The tree level: any pytree, selection by globs and predicates, one batched update per shape."""

import collections
import dataclasses
import subprocess
import sys

import equinox as eqx
import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax_modules import random_params

import jaxweights as jw
from jaxweights.levels import tree as tree_level
from jaxweights.levels.paths import flatten, select

KEY = jax.random.key(0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
    kernel: jax.Array
    name: str = dataclasses.field(default="layer", metadata={"static": True})
    missing: None = None


Point = collections.namedtuple("Point", "kernel other")


def trees():
    w = 3 * jnp.ones((2, 3))
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    model.kernel[...] = w
    mlp = eqx.tree_at(lambda m: m.layers[0].weight, eqx.nn.MLP(3, 2, 1, depth=0, key=KEY), w)
    return {
        "dict": {"a": {"kernel": w, "bias": w[0]}, "steps": jnp.arange(3), "none": None, "name": "text"},
        "frozen": flax.core.freeze({"a": {"kernel": w}}),
        "tuple": (w, [w, None], 3.0),
        "namedtuple": Point(w, jax.random.key(0)),
        "dataclass": Layer(w),
        "nnx state": nnx.state(model),
        "nnx module": model,
        "equinox": mlp,
        "masked": {"a": w, "b": optax.MaskedNode()},
        "boxed": {"kernel": nn.Partitioned(w, names=("in", "out"))},
        "numpy": {"kernel": np.full((2, 3), 3.0, np.float32)},
    }


@pytest.mark.parametrize("kind", trees())
def test_any_pytree(kind):
    tree = trees()[kind]
    lifted = jw.on_tree(jw.ClipWeights(1.0))
    new = lifted.apply(tree, lifted.init(tree, KEY))
    assert jax.tree.structure(new) == jax.tree.structure(tree)
    touched = 0
    for old, leaf in zip(jax.tree.leaves(tree), jax.tree.leaves(new), strict=True):
        if getattr(old, "ndim", 0) == 2:
            np.testing.assert_array_equal(leaf, np.ones(old.shape))
            touched += 1
        else:
            assert leaf is old
    assert touched


@pytest.mark.parametrize("kind", trees())
def test_stateful_on_any_pytree(kind):
    tree = trees()[kind]
    lifted = jw.on_tree(jw.SpectralNorm())
    state = lifted.update(tree, lifted.init(tree, KEY))
    for leaf in jax.tree.leaves(lifted.apply(tree, state)):
        if getattr(leaf, "ndim", 0) == 2:
            assert np.linalg.norm(np.asarray(leaf, np.float64), 2) == pytest.approx(1, abs=1e-5)


def test_paths_name_keys_indices_and_attributes():
    assert flatten({"a": [{"b": jnp.ones(1)}, (jnp.ones(1),)]})[0] == ["a/0/b", "a/1/0"]
    assert flatten(trees()["nnx module"])[0] == ["bias", "kernel"]
    assert flatten(trees()["nnx state"])[0] == ["bias", "kernel"]
    assert flatten(trees()["boxed"])[0] == ["kernel"]
    assert flatten({"value": jnp.ones(1)})[0] == ["value"]


@pytest.mark.parametrize(
    "glob, expected",
    [
        ("**/kernel", ["a/b/kernel", "a/kernel", "kernel"]),
        ("*/kernel", ["a/kernel"]),
        ("a/**", ["a/b/kernel", "a/kernel"]),
        ("**", ["a/b/kernel", "a/kernel", "kernel", "layer_1.x"]),
        ("layer_?.x", ["layer_1.x"]),
        ("layer_[0-4].*", ["layer_1.x"]),
        (["kernel", "*.x"], ["kernel", "layer_1.x"]),
        (lambda path, w: path.count("/") == 2, ["a/b/kernel"]),
        (None, ["a/b/kernel", "a/kernel", "kernel"]),
    ],
)
def test_globs_and_predicates(glob, expected):
    w = jnp.ones((2, 2))
    tree = {"a": {"b": {"kernel": w}, "kernel": w}, "kernel": w, "layer_1.x": jnp.ones(2), "n": jnp.arange(4)}
    paths, leaves, _ = flatten(tree)
    assert sorted(paths[i] for i in select(paths, leaves, [(None, None)], glob)) == expected


def test_the_first_rule_that_matches_is_taken():
    tree = {"a": {"kernel": jnp.ones(2)}, "b": {"kernel": jnp.ones(2)}, "c": jnp.ones((2, 2))}
    lifted = jw.on_tree({"a/*": jw.ClipWeights(0.5), "**/kernel": jw.ClipWeights(0.25)})
    new = lifted.apply(tree, lifted.init(tree, KEY))
    assert [float(new["a"]["kernel"][0]), float(new["b"]["kernel"][0]), float(new["c"][0, 0])] == [0.5, 0.25, 1]
    assert {p: t.limit for p, t in lifted.selected(tree).items()} == {"a/kernel": 0.5, "b/kernel": 0.25}


def test_weights_of_one_shape_are_updated_in_one_computation():
    """The number of contractions in the program depends on shapes and roles, not on the number of leaves."""
    lifted = jw.on_tree(jw.SpectralNorm())

    def contractions(n):
        tree = {f"layer_{i}": {"kernel": jax.ShapeDtypeStruct((4, 5), jnp.float32)} for i in range(n)}
        state = jax.eval_shape(lifted.init, tree, KEY)
        return str(jax.make_jaxpr(lifted.update)(tree, state)).count("dot_general")

    assert contractions(2) == contractions(20) > 0


def test_batched_and_single_updates_agree():
    lifted = jw.on_tree(jw.SpectralNorm())
    tree = {str(i): jax.random.normal(jax.random.key(i), (4, 5)) for i in range(3)}
    state, update = jax.jit(lifted.init)(tree, KEY), jax.jit(lifted.update)
    together = update(tree, state)
    for name, w in tree.items():
        alone = update({"w": w}, jw.TreeState({}, {"w": state.fixed[name]}))
        np.testing.assert_allclose(alone.fixed["w"]["v"], together.fixed[name]["v"], rtol=1e-3, atol=1e-4)


def test_the_draws_of_a_weight_depend_on_its_path_alone():
    lifted = jw.on_tree(jw.SpectralNorm())
    w = jnp.zeros((4, 5))
    few, more = lifted.init({"b": w}, KEY), lifted.init({"a": w, "b": w, "c": jnp.zeros((2, 2))}, KEY)
    np.testing.assert_array_equal(few.fixed["b"]["v"], more.fixed["b"]["v"])
    assert not np.allclose(more.fixed["a"]["v"], more.fixed["b"]["v"])


def test_gradients_reach_weights_and_learned_state_only():
    w = jax.random.normal(KEY, (3, 4))
    lifted = jw.on_tree(jw.Chain(jw.SpectralNorm(), jw.WeightNorm()))
    state = jax.jit(lifted.init)({"w": w}, KEY)
    loss = lambda params, state: (lifted.apply(params, state)["w"] ** 3).sum()
    to_params, to_state = jax.jit(jax.grad(loss, (0, 1)))({"w": w}, state)
    assert np.abs(to_state.learned["w"]["1.scale"]).min() > 0
    assert not any(np.any(g) for g in jax.tree.leaves(to_state.fixed))
    assert np.isfinite(to_params["w"]).all()


def test_attention_is_read_as_the_operator_it_is():
    """In Flax's attention the head axes are outputs (inputs of `out`), which shapes alone do not show."""
    params = random_params(nn.MultiHeadDotProductAttention(num_heads=4), (2, 5, 64))
    lifted = jw.on_tree(jw.SpectralNorm(n_steps=200), where="**/kernel")
    new = jax.jit(lambda params: lifted.apply(params, lifted.update(params, lifted.init(params, KEY))))(params)
    for name in ("query", "key", "value", "out"):
        matrix = np.asarray(new[name]["kernel"], np.float64).reshape(64, 64)
        assert np.linalg.norm(matrix, 2) == pytest.approx(1, abs=1e-3)


def test_a_schedule_moves_with_the_updates():
    tree = {"w": jnp.full((2, 2), 9.0)}
    lifted = jw.on_tree(jw.ClipWeights(optax.linear_schedule(4.0, 0.0, 4)))
    state = lifted.init(tree, KEY)
    seen = [float(lifted.apply(tree, state)["w"][0, 0])]
    for _ in range(5):
        state = lifted.update(tree, state)
        seen.append(float(lifted.apply(tree, state)["w"][0, 0]))
    assert seen == [4, 4, 3, 2, 1, 0]


def test_a_tree_is_stored_as_it_was_trained():
    drawn = jax.random.normal(KEY, (5, 32, 6))
    params = {name: {"kernel": w, "bias": jnp.ones(6)} for name, w in zip("abcde", drawn, strict=True)}
    rules = {
        "a/kernel": jw.FakeQuantize("int4", decay=0.9),
        "b/kernel": jw.LSQ(3, block=8),
        "c/kernel": jw.Chain(jw.Prune(0.5), jw.FakeQuantize("nf4")),
        "d/kernel": jw.ClipWeights(1.0),
    }
    lifted = jw.on_tree(rules)
    state = lifted.init(params, KEY)
    trained = jax.tree.map(lambda w: 1.5 * w, params)
    state = lifted.update(trained, state)
    for store in lifted.store, jax.jit(lifted.store):
        stored = store(trained, state)
        quantized = {name: q for name, layer in stored.items() if isinstance(q := layer["kernel"], jw.QuantizedArray)}
        assert {name: str(q.format) for name, q in quantized.items()} == {"a": "int4", "b": "int3, block 8", "c": "nf4"}
        same = jax.tree.map(np.array_equal, jw.densify(stored), lifted.apply(trained, state))
        assert all(jax.tree.leaves(same))
    assert int(jnp.sum(jw.densify(stored)["c"]["kernel"] == 0)) >= 96  # the mask is kept
    assert float(jnp.max(stored["d"]["kernel"])) == 1.0


def test_tie_and_its_gradient():
    params = {"embed": jax.random.normal(KEY, (3, 2)), "head": jnp.zeros((3, 2))}
    x = jnp.array([1.0, 2.0])
    loss = lambda p: (jw.tie(p, {"head": "embed"})["head"] @ x).sum() + (p["embed"] ** 2).sum()
    grads = jax.jit(jax.grad(loss))(params)
    np.testing.assert_allclose(grads["embed"], np.tile(x, (3, 1)) + 2 * np.asarray(params["embed"]), rtol=1e-6)
    np.testing.assert_array_equal(grads["head"], 0)


def test_an_update_of_project_resolves_the_tree_once(monkeypatch):
    calls = collections.Counter()

    def count(name, original):
        def counted(*args):
            calls[name] += 1
            return original(*args)

        monkeypatch.setattr(tree_level, name, counted)

    count("select", tree_level.select)
    count("infer_axes", tree_level.infer_axes)
    tx, params = jw.project(jw.Chain(jw.ClipWeights(1.0), jw.Prune(0.5))), {"kernel": jnp.ones((4, 3))}
    state = tx.init(params)
    calls.clear()
    jax.eval_shape(tx.update, params, state, params)
    assert calls == {"select": 1, "infer_axes": 1}


def test_weights_of_one_shape_are_traced_once():
    traces = collections.Counter()

    @dataclasses.dataclass(frozen=True)
    class Counted(jw.Transform):
        def apply(self, w, state):
            traces[w.shape] += 1
            return w

    params = {f"layer_{i}/kernel": jnp.ones((4, 3 + i // 5)) for i in range(10)}
    lifted = jw.on_tree(Counted())
    jax.eval_shape(lambda params: lifted.apply(params, lifted.init(params, jax.random.key(0))), params)
    assert traces == {(4, 3): 1, (4, 4): 1}


def test_importing_the_library_leaves_flax_for_later():
    """Flax takes longer to import than the library: `jaxweights.linen` and `jaxweights.nnx` do so when asked for."""
    code = "import sys, jaxweights; assert 'flax' not in sys.modules; jaxweights.linen; assert 'flax' in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
