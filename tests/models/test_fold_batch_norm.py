"""Folding the batch norms of whole models: equal outputs for every kind of layer, and clear errors."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxweights as jw
from jaxweights.core.axes import CONV_TRANSPOSE_KERNEL, depthwise

KEY = jax.random.key(0)
X = np.float32(np.random.default_rng(0).normal(size=(2, 6, 6, 4)))
LAYERS = {
    "conv": nn.Conv(8, (3, 3)),
    "no_bias": nn.Conv(8, (1, 1), use_bias=False),
    "depthwise": nn.Conv(8, (3, 3), feature_group_count=8, use_bias=False),
    "grouped": nn.Conv(6, (3, 3), feature_group_count=2),
    "transposed": nn.ConvTranspose(5, (3, 3), use_bias=False),
    "transposed_kernel": nn.ConvTranspose(7, (3, 3), transpose_kernel=True),
    "dense": nn.Dense(3, use_bias=False),
}
PAIRS = {f"block/{name}_norm": f"block/{name}" for name in LAYERS}
AXES = {
    "block/depthwise": depthwise(8),
    "block/grouped": depthwise(2),
    "block/transposed_kernel": CONV_TRANSPOSE_KERNEL,
}


class Block(nn.Module):
    norm: bool

    @nn.compact
    def __call__(self, x):
        for name, layer in LAYERS.items():
            layer = layer.clone(parent=self, name=name, use_bias=layer.use_bias or not self.norm)
            x = layer(x)
            if self.norm:
                x = nn.BatchNorm(use_running_average=True, use_scale=name != "conv", name=f"{name}_norm")(x)
            x = nn.relu(x) if name != "dense" else x
        return x


class Model(nn.Module):
    norm: bool = True

    @nn.compact
    def __call__(self, x):
        return nn.Dense(2, name="head")(Block(self.norm, name="block")(x))


def random_variables():
    rng = np.random.default_rng(1)
    variables = jax.eval_shape(Model().init, KEY, X)
    params = jax.tree.map(lambda a: jnp.float32(rng.normal(size=a.shape)), variables["params"])
    stats = jax.tree.map(lambda a: jnp.float32(rng.uniform(0.1, 2, size=a.shape)), variables["batch_stats"])
    return params, stats


def test_every_kind_of_layer():
    params, stats = random_variables()
    # Variances that occur in trained models: tiny, denormal and 0.
    stats["block"]["conv_norm"]["var"] = stats["block"]["conv_norm"]["var"].at[:3].set([1e-12, 1e-40, 0.0])
    expected = jax.jit(Model().apply)({"params": params, "batch_stats": stats}, X)
    folded = jw.fold_batch_norms(params, stats, PAIRS, axes=AXES)
    plain = Model(norm=False)
    assert jax.tree.structure(folded) == jax.tree.structure(dict(jax.eval_shape(plain.init, KEY, X)["params"]))
    found = jax.jit(plain.apply)({"params": folded}, X)
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_a_stack_of_layers():
    class Layer(nn.Module):
        norm: bool = True

        @nn.compact
        def __call__(self, x, _):
            x = nn.Dense(4, use_bias=not self.norm, name="dense")(x)
            return nn.BatchNorm(use_running_average=True, name="norm")(x) if self.norm else x, None

    stack = nn.scan(Layer, variable_axes={"params": 0, "batch_stats": 0}, split_rngs={"params": True}, length=3)
    rng = np.random.default_rng(2)
    shapes = jax.eval_shape(stack(True).init, KEY, X, None)
    variables = jax.tree.map(lambda a: jnp.float32(rng.uniform(0.5, 1.5, a.shape)), shapes)
    expected, _ = jax.jit(stack(True).apply)(variables, X, None)
    folded = jw.fold_batch_norms(variables["params"], variables["batch_stats"], {"norm": "dense"})
    found, _ = jax.jit(stack(False).apply)({"params": folded}, X, None)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def test_it_is_jitted_and_differentiated():
    params, stats = random_variables()

    def fold(params):
        return jw.fold_batch_norms(params, stats, PAIRS, axes=AXES)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), jax.jit(fold)(params), fold(params)
    )
    grads = jax.jit(jax.grad(lambda p: Model(norm=False).apply({"params": fold(p)}, X).sum()))(params)
    expected = jax.jit(jax.grad(lambda p: Model().apply({"params": p, "batch_stats": stats}, X).sum()))(params)
    size = max(np.abs(g).max() for g in jax.tree.leaves(expected))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5 * size), grads, expected)


class Net(nnx.Module):
    def __init__(self, norm, rngs):
        self.convs = nnx.List(
            [
                nnx.Conv(4, 8, (3, 3), use_bias=False, rngs=rngs),
                nnx.ConvTranspose(8, 5, (3, 3), transpose_kernel=True, rngs=rngs),
            ]
        )
        self.norms = nnx.List([norm(8, rngs=rngs), norm(5, rngs=rngs)])
        self.head = nnx.Linear(5, 3, use_bias=False, rngs=rngs)
        self.norm = norm(3, use_scale=False, rngs=rngs)

    def __call__(self, x):
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = nnx.relu(norm(conv(x)))
        return self.norm(self.head(x), use_running_average=True)


NET_PAIRS = {"norms/0": "convs/0", "norms/1": "convs/1", "norm": "head"}


@pytest.mark.parametrize("norm", [nnx.BatchNorm, jw.nnx.BatchNorm])
def test_nnx(norm):
    net = Net(norm, nnx.Rngs(0))
    for _ in range(3):
        net(X)
    net.eval()
    net.norm.mean[...] = jnp.ones(3)
    expected = net(X)
    before = nnx.to_pure_dict(nnx.state(net))
    folded = jw.nnx.fold_batch_norms(net, NET_PAIRS, axes={"convs/1": CONV_TRANSPOSE_KERNEL})
    np.testing.assert_allclose(folded(X), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(nnx.jit(lambda m, x: m(x))(folded, X), expected, rtol=1e-4, atol=1e-5)
    assert not jax.tree.leaves(nnx.state(folded, nnx.BatchStat))
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(nnx.state(net)), before)


PARAMS = {"a": {"kernel": jnp.ones((2, 3))}, "b": {"kernel": jnp.ones((3, 3))}, "n": {}, "m": {}}
STATS = {n: {"mean": jnp.ones(3), "var": jnp.ones(3)} for n in ("n", "m")}


@pytest.mark.parametrize(
    ("layers", "options", "error", "message"),
    [
        ({"n": "a", "z": "b"}, {}, ValueError, "names 'z', which is not a batch norm. There are: m, n"),
        ({"n": "a", "m": "c"}, {}, ValueError, "'c', which has no kernel. Kernels are at: a, b"),
        ({"n": "a", "m": "a"}, {}, ValueError, "folds both 'n' and 'm' into 'a'"),
        ({"n": "a"}, {}, ValueError, "leaves out the batch norms m: name the layer"),
        ({}, {}, ValueError, "leaves out the batch norms m, n"),
        ([("n", "a")], {}, TypeError, "layers must be a dict"),
        ({"n": "a", "m": "b"}, {"axes": {"c": jw.Axes()}}, ValueError, "axes names 'c', but layers does not"),
        ({"n": "a", "m": "b"}, {"axes": [jw.Axes()]}, TypeError, "axes must be a dict"),
        ({"n": "a", "m": "b"}, {"axes": {"a": jw.Axes(-1, -2)}}, ValueError, "fold_batch_norms at 'n': mean must have"),
        ({"n": "a", "m": "b"}, {"eps": -1.0}, ValueError, "eps must be at least 0"),
    ],
)
def test_errors(layers, options, error, message):
    with pytest.raises(error, match=message):
        jw.fold_batch_norms(PARAMS, STATS, layers, **options)


def test_nnx_errors():
    net = Net(jw.nnx.BatchNorm, nnx.Rngs(0))
    with pytest.raises(ValueError, match="leaves out the batch norms"):
        jw.nnx.fold_batch_norms(net, {"norm": "head"})
    with pytest.raises(ValueError, match=r"fold_batch_norms at 'norms/0': mean must have shape \(3,\)"):
        jw.nnx.fold_batch_norms(net, {"norms/0": "head", "norms/1": "convs/1", "norm": "convs/0"})
