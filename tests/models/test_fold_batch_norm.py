"""Folding the batch norms of whole models: equal outputs for every kind of layer, and clear errors."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxweights as jw
from jaxweights.core.axes import CONV, CONV_TRANSPOSE_KERNEL, depthwise
from jaxweights.core.guesses import AxesWarning

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
    "block/no_bias": CONV,
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


def trained(norm):
    """A net with running statistics, in evaluation mode, and its outputs."""
    net = Net(norm, nnx.Rngs(0))
    for _ in range(3):
        net(X)
    net.eval()
    net.norm.mean[...] = jnp.ones(3)
    return net, net(X)


@pytest.mark.parametrize("norm", [nnx.BatchNorm, jw.nnx.BatchNorm])
def test_nnx(norm):
    net, expected = trained(norm)
    before = nnx.to_pure_dict(nnx.state(net))
    folded = jw.nnx.fold_batch_norms(net, NET_PAIRS, axes={"convs/1": CONV_TRANSPOSE_KERNEL})
    np.testing.assert_allclose(folded(X), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(nnx.jit(lambda m, x: m(x))(folded, X), expected, rtol=1e-4, atol=1e-5)
    assert not jax.tree.leaves(nnx.state(folded, nnx.BatchStat))
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(nnx.state(net)), before)


@pytest.mark.parametrize("norm", [nnx.BatchNorm, jw.nnx.BatchNorm])
def test_nnx_reads_pairs_and_axes_and_keeps_norms(norm):
    net, expected = trained(norm)
    net.train()
    folds = jw.nnx.norm_folds(net, jax.ShapeDtypeStruct(X.shape, X.dtype))
    assert {path: fold.layer for path, fold in folds.items()} == NET_PAIRS
    net.eval()
    for options in ({}, {"keep_norms": True}):
        folded = jw.nnx.fold_batch_norms(net, folds, **options)
        np.testing.assert_allclose(folded(X), expected, rtol=1e-4, atol=1e-5)
    for kept in folded.norms:
        np.testing.assert_array_equal([kept.mean[...], kept.scale[...] - 1], 0)
    assert folded.head.bias is None and isinstance(folded.norm, norm)
    # What is kept changes nothing: it can be folded again, and the norm of the head still adds its bias.
    again = jw.nnx.fold_batch_norms(folded, folds)
    np.testing.assert_array_equal(again.convs[1].kernel[...], folded.convs[1].kernel[...])


class Residual(nnx.Module):
    """Flax's block of a ResNet with a projection, and a stack of layers behind it."""

    def __init__(self, rngs):
        self.conv0, self.norm0 = nnx.Conv(4, 4, (3, 3), use_bias=False, rngs=rngs), nnx.BatchNorm(4, rngs=rngs)
        self.conv1, self.norm1 = nnx.Conv(4, 4, (3, 3), rngs=rngs), nnx.BatchNorm(4, use_scale=False, rngs=rngs)
        self.proj, self.norm_proj = nnx.Conv(4, 4, (1, 1), rngs=rngs), jw.nnx.BatchNorm(4, use_bias=False, rngs=rngs)

        @nnx.split_rngs(splits=3)
        @nnx.vmap
        def stack(rngs):
            linear = nnx.Linear(4, 4, use_bias=False, rngs=rngs)
            return nnx.Sequential(linear, nnx.BatchNorm(4, epsilon=0.1, rngs=rngs), nnx.relu)

        self.stack = stack(rngs)

    def __call__(self, x):
        y = self.norm1(self.conv1(nnx.relu(self.norm0(self.conv0(x)))))
        y = nnx.relu(y + self.norm_proj(self.proj(x)))
        return nnx.scan(lambda y, layer: layer(y), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(y, self.stack)


def test_nnx_residual_and_stack():
    net = Residual(nnx.Rngs(0))
    net(X)
    net.eval()
    folds = jw.nnx.norm_folds(net, X)
    names = {"norm0": "conv0", "norm1": "conv1", "norm_proj": "proj", "stack/layers/1": "stack/layers/0"}
    assert {path: fold.layer for path, fold in folds.items()} == names
    assert folds["stack/layers/1"].axes == jw.Axes((1,), (2,), (0,))
    folded = jw.nnx.fold_batch_norms(net, folds, keep_norms=True)
    np.testing.assert_allclose(folded(X), net(X), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(folded.stack.layers[1].scale[...], 1)
    assert not np.allclose(folded.stack.layers[0].kernel[...], net.stack.layers[0].kernel[...])


class Late(nnx.Module):
    """Norms behind nonlinearities."""

    def __init__(self, rngs, padding):
        self.first, self.norm = nnx.Conv(4, 6, (3, 3), rngs=rngs), nnx.BatchNorm(6, epsilon=0.1, rngs=rngs)
        self.second = nnx.Conv(6, 4, (2, 2), padding=padding, feature_group_count=2, rngs=rngs)

    def __call__(self, x):
        return self.second(self.norm(nnx.relu(self.first(x))))


def test_nnx_folds_into_the_layer_after_the_norm():
    folds = {}
    for padding in ("VALID", 0, "SAME", [(0, 1), (1, 0)]):
        net = Late(nnx.Rngs(0), padding)
        net(X)
        net.eval()
        fold = folds[str(padding)] = jw.nnx.norm_folds(net, X)["norm"]
        if fold.layer:
            folded = jw.nnx.fold_batch_norms(net, {"norm": jw.Fold("second", follows=True)})
            np.testing.assert_allclose(folded(X), net(X), rtol=1e-4, atol=1e-5)
        else:
            with pytest.raises(ValueError, match="'second', the layer after it, pads its input with zeros"):
                jw.nnx.fold_batch_norms(net, {"norm": jw.Fold("second", follows=True)})
    assert [fold.layer for fold in folds.values()] == ["second", "second", None, None]
    assert "after it, 'second' pads them with zeros" in folds["SAME"].why


@pytest.mark.parametrize("eps", [1e-12, 1e-6, 1e-5, 1e-3, 0.1, 0.7, 0.0])
def test_a_norm_that_is_kept_changes_no_bit(eps):
    params = {
        "dense": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)},
        "norm": {"scale": jnp.ones(3), "bias": X[0, 0, 0, :3]},
    }
    stats = {"norm": {"mean": X[0, 0, 1, :3], "var": jnp.ones(3)}}
    new, kept = jw.fold_batch_norms(params, stats, {"norm": "dense"}, eps={"norm": eps}, keep_norms=True)
    x = jnp.float32(X[..., :3]) * 1e3
    for norm in (nn.BatchNorm, jw.linen.BatchNorm):
        found = jax.jit(norm(use_running_average=True, epsilon=eps).apply)(
            {"params": new["norm"], "batch_stats": kept["norm"]}, x
        )
        np.testing.assert_array_equal(found, x)


def test_a_kernel_that_can_be_read_in_two_ways_is_named():
    params = {"up": {"kernel": jnp.ones((3, 3, 4, 4))}}
    stats = {"norm": {"mean": jnp.ones(4), "var": jnp.ones(4)}}
    with pytest.warns(AxesWarning, match="reads the kernels of up as .* norm_folds reads off the model, or axes="):
        jw.fold_batch_norms(params, stats, {"norm": "up"})
    reading = {"axes": {"up": CONV}}, {"layout": {"up/kernel": CONV}}
    for options in reading:
        jw.fold_batch_norms(params, stats, {"norm": "up"}, **options)
    jw.fold_batch_norms(params, stats, {"norm": jw.Fold("up", axes=CONV)})


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
        (
            {"n": "a", "m": jw.Fold("b", True)},
            {"keep_norms": True},
            ValueError,
            "at 'm': 'b', the layer after it, has no",
        ),
        (
            {"n": "a", "m": jw.Fold(None, why="lost")},
            {},
            ValueError,
            "no layer to fold 'm' into: lost. keep_norms=True",
        ),
        (
            {"n": "a", "m": "b"},
            {"eps": {"n": 1e-3}},
            ValueError,
            "at 'm': eps has no entry for it, but for n: give one",
        ),
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
