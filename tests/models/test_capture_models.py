"""Capture of Linen, NNX and Equinox models: what is called, with which keys, and what stays as it is."""

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax import nnx
from flax_modules import KEY

import jaxweights as jw


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def close(a, b, rtol=1e-5):
    b = np.asarray(b, np.float64)
    np.testing.assert_allclose(np.asarray(a, np.float64), b, rtol=rtol, atol=rtol * np.abs(b).max(initial=1e-30))


class Encoder(nnx.Module):
    """A stack under `nnx.scan` and attention, with batch norm and dropout in training mode."""

    def __init__(self, rngs):
        self.layers = nnx.vmap(lambda key: nnx.Linear(6, 6, rngs=nnx.Rngs(key)))(jax.random.split(KEY, 3))
        self.norm = nnx.BatchNorm(6, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 6, decode=False, rngs=rngs)

    def __call__(self, x):
        step = nnx.scan(lambda layer, x: nnx.tanh(layer(x)), in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        return self.attention(self.dropout(self.norm(step(self.layers, x))))

    def encode(self, x):
        return self.layers.kernel[0].T @ x


def test_an_nnx_model_stays_as_it_is():
    model, x = Encoder(nnx.Rngs(0)), normal(2, 4, 6)
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.RngKey))))
    stats = jw.nnx.capture(model, [x, x])
    after = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.RngKey))))
    jax.tree.map(np.testing.assert_array_equal, before, after)
    assert sorted(stats) == [f"attention/{n}/kernel" for n in ("key", "out", "query", "value")] + ["layers/kernel"]
    assert stats["layers/kernel"].count.tolist() == [16] * 3
    hidden = np.float64(x).reshape(8, 6)
    for i in range(3):
        close(stats["layers/kernel"].products[i], 2 * hidden.T @ hidden)
        hidden = np.tanh(hidden @ np.float64(model.layers.kernel[i]) + np.float64(model.layers.bias[i]))
    assert stats["attention/out/kernel"].axes == jw.Axes((0, 1), (2,))


def test_what_to_call_is_free():
    x = normal(3, 5)

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, *, train):
            return nn.Dense(4)(nn.Dropout(0.5)(x, deterministic=not train))

    variables = Model().init(KEY, x, train=False)
    stats = jw.linen.capture(Model(), variables, [x], call=lambda m, x: m(2 * x, train=False))
    close(stats["Dense_0/kernel"].products, 4 * x.T @ x)
    double = jw.nnx.capture(nnx.Linear(5, 4, rngs=nnx.Rngs(0)), [(x, x)], call=lambda m, a, b: m(a + b))
    close(double["kernel"].products, 4 * x.T @ x)


def test_linen_draws_other_keys_in_every_batch():
    """With dropout and batch statistics, as in training: the norms are those of what the dense layer is given."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dropout(0.5, deterministic=False)(nn.BatchNorm(use_running_average=False)(x))
            self.sow("intermediates", "given", x)
            return nn.Dense(2)(x)

    model, key, x = Model(), jax.random.key(3), normal(50, 6)
    variables = model.init({"params": KEY, "dropout": KEY}, x)
    stats = jw.linen.capture(model, variables, [x, x, x], rngs={"dropout": key})["Dense_0/kernel"]
    run = jax.jit(lambda key: model.apply(variables, x, rngs={"dropout": key}, mutable=True)[1]["intermediates"])
    given = np.float64([run(jax.random.fold_in(key, i))["given"][0] for i in range(3)])
    assert ((given[0] == 0) != (given[1] == 0)).any()
    close(stats.norm, np.sqrt((given**2).sum((0, 1))))
    assert stats.count == 150


def test_an_equinox_module_is_captured_as_it_is():
    """Activation functions and flags among its leaves stay as they are."""
    eqx = pytest.importorskip("equinox")

    class Model(eqx.Module):
        mlp: eqx.nn.MLP
        attention: eqx.nn.MultiheadAttention
        flag: bool
        width: float

        def __call__(self, x):
            x = jax.vmap(self.mlp)(x) * (self.width if self.flag else 0)
            return self.attention(x, x, x)

    attention = eqx.nn.MultiheadAttention(2, 4, key=jax.random.key(1))
    model, x = Model(eqx.nn.MLP(3, 4, 8, 1, key=KEY), attention, True, 2.0), normal(5, 3)
    stats = jw.capture(lambda model, x: model(x), model, [x, 2 * x])
    assert list(stats) == [f"mlp/layers/{i}/weight" for i in range(2)] + [
        f"attention/{name}_proj/weight" for name in ("query", "key", "value", "output")
    ]
    first, layer = np.float64(x), model.mlp.layers[0]
    hidden = lambda x: np.maximum(x @ np.float64(layer.weight).T + np.float64(layer.bias), 0)
    close(stats["mlp/layers/0/weight"].norm, np.sqrt(5) * np.linalg.norm(first, axis=0))
    close(stats["mlp/layers/1/weight"].norm, np.sqrt((hidden(first) ** 2 + hidden(2 * first) ** 2).sum(0)))
