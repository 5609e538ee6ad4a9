"""Biases are corrected layer by layer, for whatever wrote the model and however its weights are stored."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxweights as jw

KEY = jax.random.key(0)


def coarse(tree, step=0.25):
    """Kernels rounded to a coarse grid, which shifts the means."""
    return jax.tree.map(lambda a: jnp.floor(a / step) * step if a.ndim >= 2 else a, tree)


def mlp(params, x):
    for layer in params[:-1]:
        x = jax.nn.relu(x @ layer["w"] + layer["b"])
    return x @ params[-1]["w"] + params[-1]["b"]


def random_mlp(sizes=(6, 9, 7, 3)):
    rng = np.random.default_rng(0)
    pairs = itertools.pairwise(sizes)
    return [{"w": jnp.float32(rng.normal(size=s)), "b": jnp.float32(rng.normal(size=s[1]))} for s in pairs]


def reference(old, new, x):
    """The corrections of one batch, from the paper's formula in float64."""
    y, z = np.asarray(x, np.float64), np.asarray(x, np.float64)
    shifts = []
    for before, after in zip(old, new, strict=True):
        b = np.asarray(before["b"], np.float64)
        y, z = y @ np.asarray(before["w"], np.float64) + b, z @ np.asarray(after["w"], np.float64) + b
        shifts.append(np.mean(y - z, 0))
        y, z = np.maximum(y, 0), np.maximum(z + shifts[-1], 0)
    return shifts


def test_biases_are_those_of_the_formula():
    params, batches = random_mlp(), list(jax.random.normal(KEY, (2, 32, 6)) + 0.5)
    new = coarse(params)
    found = jw.correct_biases(mlp, params, new, batches)
    each = [reference(params, new, x) for x in batches]
    for i, layer in enumerate(found):
        expected = np.asarray(params[i]["b"]) + np.mean([shifts[i] for shifts in each], 0)
        np.testing.assert_allclose(layer["b"], expected, atol=2e-5)
        np.testing.assert_array_equal(layer["w"], new[i]["w"])


class ConvNet(nn.Module):
    """Convolutions, grouped ones, several output axes, a layer without a bias, and an array that is added elsewhere."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3), name="stem")(x))
        x = nn.relu(nn.Conv(8, (3, 3), feature_group_count=8, name="depthwise")(x))
        x = nn.Dense(6, use_bias=False, name="mix")(x.mean((1, 2)))
        x = x * self.param("scale", nn.initializers.ones, (6,))
        x = nn.relu(nn.DenseGeneral((2, 4), name="heads")(x))
        return nn.DenseGeneral(3, axis=(-2, -1), name="out")(x)


def test_the_means_of_the_outputs_are_those_before():
    model, x = ConvNet(), jax.random.normal(KEY, (16, 6, 6, 3))
    params = model.init(KEY, x)["params"]
    f = jax.jit(lambda params, x: model.apply({"params": params}, x))
    new = coarse(params)
    found = jw.correct_biases(f, params, new, [x])
    expected = f(params, x).mean(0)
    assert np.abs(f(new, x).mean(0) - expected).max() > 0.01
    np.testing.assert_allclose(f(found, x).mean(0), expected, atol=1e-5)
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, params)
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), new, found)
    moved = {name: {"kernel": False, "bias": True} for name in ("stem", "depthwise", "heads", "out")}
    assert changed == moved | {"mix": {"kernel": False}, "scale": False}


def test_a_stack_of_layers_is_the_layers_one_by_one():
    params, x = random_mlp((5, 5, 5, 5)), jax.random.normal(KEY, (32, 5))
    stack = jax.tree.map(lambda *layers: jnp.stack(layers), *params)

    def looped(stack, x):
        return jax.lax.scan(lambda x, p: (jax.nn.relu(x @ p["w"] + p["b"]), None), x, stack)[0]

    def written_out(params, x):
        return jax.nn.relu(mlp(params, x))

    expected = jw.correct_biases(written_out, params, coarse(params), [x])
    found = jw.correct_biases(looped, stack, stack | {"w": coarse(stack["w"])}, [x])
    np.testing.assert_allclose(found["b"], jnp.stack([layer["b"] for layer in expected]), atol=1e-5)


def test_the_running_mean_stands_in_for_a_bias():
    class Normed(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.BatchNorm(use_running_average=True)(nn.Dense(4, use_bias=False)(x))

    model, x = Normed(), jax.random.normal(KEY, (32, 5)) + 1
    variables = model.init(KEY, x)
    found = jw.correct_biases(model.apply, variables, coarse(variables), [x])
    assert (found["params"]["BatchNorm_0"]["bias"] == 0).all()
    shift = x @ (variables["params"]["Dense_0"]["kernel"] - found["params"]["Dense_0"]["kernel"])
    np.testing.assert_allclose(found["batch_stats"]["BatchNorm_0"]["mean"], -shift.mean(0), atol=1e-5)


def test_stored_weights_stay_stored():
    params, x = random_mlp(), jax.random.normal(KEY, (32, 6)) + 0.5
    stored = [layer | {"w": jw.quantize(layer["w"], 3)} for layer in params]
    found = jw.correct_biases(mlp, params, stored, [x])
    assert all(isinstance(layer["w"], jw.QuantizedArray) for layer in found)
    np.testing.assert_allclose(jw.with_stored(mlp)(found, x).mean(0), mlp(params, x).mean(0), atol=1e-4)


def test_models_of_other_libraries():
    eqx = pytest.importorskip("equinox", reason="equinox is not installed: pip install 'jaxweights[peers]'")
    x = jax.random.normal(KEY, (16, 3, 6, 6))

    class Net(eqx.Module):
        conv: eqx.nn.Conv2d
        out: eqx.nn.Linear

        def __call__(self, x):
            return self.out(jax.nn.relu(self.conv(x)).mean((1, 2)))

    net = Net(eqx.nn.Conv2d(3, 5, 3, key=KEY), eqx.nn.Linear(5, 2, key=KEY))
    new = eqx.tree_at(lambda n: n.out.weight, net, coarse(net.out.weight))
    new = eqx.tree_at(lambda n: n.conv.weight, new, coarse(net.conv.weight))

    def f(net, x):
        return jax.vmap(net)(x)

    found = jw.correct_biases(f, net, new, [x])
    np.testing.assert_allclose(f(found, x).mean(0), f(net, x).mean(0), atol=1e-5)
    assert found.conv.bias.shape == (5, 1, 1)

    dense = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    graph, state = nnx.split(dense)
    y = jax.random.normal(KEY, (8, 4)) + 1
    changed = jw.correct_biases(lambda state, y: nnx.merge(graph, state)(y), state, coarse(state), [y])
    np.testing.assert_allclose(nnx.merge(graph, changed)(y).mean(0), dense(y).mean(0), atol=1e-5)


def test_an_array_with_another_use_is_left():
    params = {"w": jnp.ones((3, 2)), "b": jnp.ones(2), "v": jnp.ones((2, 2)), "c": jnp.zeros(2)}

    def f(params, x):
        return ((x @ params["w"] + params["b"]) * params["b"]) @ params["v"] + params["c"]

    found = jw.correct_biases(f, params, params | {"w": jnp.zeros((3, 2))}, [jnp.ones((4, 3))])
    np.testing.assert_array_equal(found["b"], params["b"])
    np.testing.assert_allclose(found["c"], [6, 6])
