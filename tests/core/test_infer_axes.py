"""Axes inferred from the other weights of a tree, and cases where nothing can be inferred."""

from collections.abc import Callable

import equinox as eqx
import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict
from flax_modules import random_params, scanned

import jaxweights as jw
from jaxweights.core.axes import (
    ATTENTION_IN,
    ATTENTION_OUT,
    DENSE,
    Axes,
    Reading,
    dense_general,
    in_words,
)
from jaxweights.core.inference import infer, infer_axes
from jaxweights.levels.paths import flatten


def shapes(tree):
    """{path: shape} of a nested dict."""
    return {"/".join(path): tuple(np.shape(a)) for path, a in flatten_dict(tree).items()}


def nnx_shapes(module):
    return shapes(nnx.to_pure_dict(nnx.state(module, nnx.Param)))


def readings(found, tree):
    return {path: Reading.of(axes, tree[path]) for path, axes in found.items()}


@pytest.mark.parametrize("use_bias", [True, False])
def test_infer_attention(use_bias):
    module = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=6, use_bias=use_bias)
    tree = shapes(random_params(module, (1, 4)))
    assert infer_axes(tree) == {f"{n}/kernel": ATTENTION_IN for n in ("query", "key", "value")} | {
        "out/kernel": ATTENTION_OUT
    }


def test_infer_nnx_attention():
    layer = nnx.MultiHeadAttention(2, 4, qkv_features=6, decode=False, rngs=nnx.Rngs(0))
    found = infer_axes(nnx_shapes(layer))
    assert found == {f"{n}/kernel": ATTENTION_IN for n in ("query", "key", "value")} | {"out/kernel": ATTENTION_OUT}
    assert infer_axes(nnx.state(layer, nnx.Param)) == found


def test_infer_from_parameters_as_they_are():
    """Nested dicts of arrays, of shapes, abstract or frozen, are {path: shape}."""
    module = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=6)
    params = {"block": random_params(module, (1, 4)), "none": None}
    expected = infer_axes(shapes({"block": params["block"]}))
    assert set(expected) == {f"block/{n}/kernel" for n in ("query", "key", "value", "out")}
    flat = {"/".join(path): a for path, a in flatten_dict(params["block"]).items()}
    trees = (params, flax.core.freeze(params), jax.tree.map(np.shape, params), jax.eval_shape(lambda: params))
    assert all(infer_axes(tree) == expected for tree in trees)
    assert infer_axes(flat) == {path.removeprefix("block/"): axes for path, axes in expected.items()}


@pytest.mark.parametrize(
    ("kind", "width", "expected"),
    [
        ("dense", 3, Axes(input=1, output=2, batch=0)),
        ("conv", 4, Axes(input=2, output=3, batch=0)),
        ("general", 6, Axes(input=1, output=(2, 3), batch=0)),
    ],
)
def test_infer_linen_scan(kind, width, expected):
    tree = shapes(random_params(scanned(kind), (1, width)))
    kernel = tree["d/kernel"]
    assert readings(infer_axes(tree), tree) == {"d/kernel": Reading.of(expected, kernel)}


def test_infer_linen_scan_of_attention():
    tree = shapes(random_params(scanned("attention"), (1, 4)))
    batched = lambda axes, path: Reading.of(axes.stacked(), tree[path])
    expected = {f"a/{n}/kernel": batched(ATTENTION_IN, f"a/{n}/kernel") for n in ("query", "key", "value")}
    expected["a/out/kernel"] = batched(ATTENTION_OUT, "a/out/kernel")
    assert readings(infer_axes(tree), tree) == expected


def test_infer_nnx_vmap():
    stack = nnx.vmap(lambda key: nnx.Linear(3, 7, rngs=nnx.Rngs(key)))(jax.random.split(jax.random.key(0), 4))
    tree = nnx_shapes(stack)
    assert readings(infer_axes(tree), tree) == {"kernel": Reading.of(DENSE.stacked(), (4, 3, 7))}


@pytest.mark.parametrize(
    ("features", "axis", "x_shape"),
    [((4, 5), -1, (3,)), ((4, 5), (-2, -1), (2, 3)), ((2, 4, 5), -1, (3,))],
)
def test_infer_dense_general(features, axis, x_shape):
    tree = shapes(random_params(nn.DenseGeneral(features, axis=axis), x_shape))
    expected = dense_general(len(x_shape), len(features))
    assert infer_axes(tree) == {"kernel": expected}


@pytest.mark.parametrize(
    "tree",
    [
        {"kernel": (3, 4), "bias": (4,)},
        {"conv/kernel": (3, 3, 4, 5), "conv/bias": (5,)},
        {"conv/kernel": (3, 3, 4, 5)},
        {"stack/kernel": (4, 3, 5)},  # without a bias, could be a stack or a convolution
        {"query/kernel": (4, 2, 3), "key/kernel": (4, 2, 3)},  # not all four attention projections
        {"out/kernel": (2, 3, 4), "out/bias": (4,)},
        {"kernel": (3, 4, 5), "bias": (2, 5)},  # fits nothing
        {"kernel": (3, 4, 5), "bias": (3, 4, 5)},
    ],
    ids=str,
)
def test_infer_nothing(tree):
    assert infer_axes(tree) == {}


# What is a kernel, and how its axes are read, in words. A "?" marks a guess.
TABLE = {
    # The bias beside it.
    "in_first": {"kernel": ((3, 4), "in out"), "bias": ((4,), "")},
    "out_first": {"kernel": ((3, 4), "out in"), "bias": ((3,), "")},
    "haiku": {"w": ((3, 4), "in out"), "b": ((4,), "")},
    "haiku_stack": {"w": ((5, 3, 4), "batch in out"), "b": ((5, 4), "")},
    "by_hand": {"w1": ((3, 4), "in out"), "b1": ((4,), ""), "w2": ((5, 4), "out in"), "b2": ((5,), "")},
    "torch": {
        "weight_ih": ((8, 3), "out in"),
        "bias_ih": ((8,), ""),
        "weight_hh": ((8, 8), "out in"),
        "bias_hh": ((8,), ""),
    },
    "stack_or_general": {"kernel": ((4, 4, 5), "batch in out?"), "bias": ((4, 5), "")},
    "stacks": {"kernel": ((5, 8, 8, 3), "batch batch in out?"), "bias": ((5, 8, 3), "")},
    "unknown": {"embed": ((3, 3), "in out?"), "bias": ((3,), "")},
    "transposed": {"kernel": ((3, 3, 5, 4), "win win out in"), "bias": ((5,), "")},
    "ConvTranspose_0": {"kernel": ((3, 3, 4, 4), "win win in out?"), "bias": ((4,), "")},
    "not_its_bias": {"kernel": ((3, 3, 4, 5), "win win in out"), "b": ((3,), "")},
    # Its own name.
    "flax": {"kernel": ((4, 4), "in out")},
    "equinox": {"weight": ((4, 4), "out in"), "bias": ((4,), "")},
    "equinox_without_bias": {"weight": ((4, 3), "out in?")},
    "equinox_conv": {"weight": ((8, 4, 3, 3), "out in win win"), "bias": ((8, 1, 1), "")},
    "equinox_stack": {"weight": ((5, 4, 4), "batch out in"), "bias": ((5, 4), "")},
    "table": {"embedding": ((9, 4), "in out")},
    "head": {"matrix": ((9, 4), "in out?")},
    "depthwise": {"kernel": ((3, 3, 1, 8), "win win in out, 8 groups")},
    "keras": {"depthwise_kernel": ((3, 3, 8, 2), "win win batch out")},
    "Conv_0": {"kernel": ((3, 4, 5), "win in out")},
    # Shape alone.
    "resnet": {"kernel": ((7, 7, 3, 5), "win win in out")},
    "dense_scan": {"kernel": ((5, 4, 6), "win in out?")},
    "dense_general_scan": {"kernel": ((3, 4, 2, 8), "win win in out?")},
    "gemma": {"w": ((2, 2, 16, 8), "win win in out?")},
    "gray": {"kernel": ((3, 3, 1, 32), "win win in out")},
    "after_gray": {"kernel": ((3, 3, 32, 64), "win win in out")},
    "one_channel": {"kernel": ((3, 3, 1, 64), "win win in out?")},
    # No kernels.
    "scan_of_norms": {"scale": ((5, 4), ""), "offset": ((5, 4), ""), "gamma": ((5, 4), ""), "beta": ((5, 4), "")},
    "vit": {"cls_token": ((1, 1, 8), ""), "pos_embedding": ((1, 5, 8), ""), "mask_token": ((1, 1, 8), "")},
    "swin": {"relative_position_bias_table": ((9, 2), ""), "position_embeddings": ((1, 5, 8), ""), "cls": ((1, 8), "")},
    "layer_norm": {"weight": ((2, 3), ""), "bias": ((2, 3), "")},
    "rms_norm": {"weight": ((5, 3), "")},
    # Kernels in spite of their names.
    "lora": {"lora_a": ((8, 2), "in out?"), "lora_b": ((2, 8), "in out?")},
    "letters": {"a": ((8, 2), "in out?"), "b": ((2, 8), "in out?")},
}


def test_the_table_of_names_and_shapes():
    tree = {f"{module}/{name}": case for module, weights in TABLE.items() for name, case in weights.items()}
    found = infer({path: shape for path, (shape, _) in tree.items()})
    words = {p: in_words(one.axes, tree[p][0]) + ("?" if one.others else "") for p, one in found.items()}
    assert words == {path: expected for path, (_, expected) in tree.items()}


# Models of several frameworks, against the program and against Jacobians.


def normal(*shape):
    return jnp.asarray(np.random.default_rng(len(shape)).normal(size=shape), jnp.float32)


def linen(module, *shape):
    """f(params, x), its params, and x."""
    return (lambda params, x: module.apply({"params": params}, x)), random_params(module, shape), normal(*shape)


def equinox(module, *shape):
    params, static = eqx.partition(module, eqx.is_array)
    return (lambda params, x: eqx.combine(params, static)(x)), params, normal(*shape)


def equinox_attention():
    params, static = eqx.partition(eqx.nn.MultiheadAttention(2, 4, key=KEY), eqx.is_array)
    return (lambda params, x: eqx.combine(params, static)(x, x, x)), params, normal(3, 4)


def equinox_stack():
    make = lambda key: eqx.nn.Linear(4, 4, key=key)
    params, static = eqx.partition(eqx.filter_vmap(make)(jax.random.split(KEY, 5)), eqx.is_array)
    return (lambda p, x: jax.lax.scan(lambda x, p: (eqx.combine(p, static)(x), None), x, p)[0]), params, normal(4)


def from_nnx(module, *shape):
    graph, params = nnx.split(module)
    return (lambda params, x: nnx.merge(graph, params)(x)), params, normal(*shape)


class Within(nn.Module):
    """A layer by its name."""

    make: Callable[[], nn.Module]

    @nn.compact
    def __call__(self, x):
        return self.make()(x)


class Scan(nn.Module):
    """A stack of layers without a bias."""

    @nn.compact
    def __call__(self, x):
        layers = nn.scan(
            lambda layer, x, _: (layer(x), None), variable_axes={"params": 0}, split_rngs={"params": True}, length=5
        )
        return layers(nn.Dense(x.shape[-1], use_bias=False), x, None)[0]


KEY = jax.random.key(0)
SURE = {
    "dense": lambda: linen(nn.Dense(5), 2, 4),
    "general": lambda: linen(nn.DenseGeneral((2, 8)), 2, 4),
    "attention": lambda: linen(nn.MultiHeadDotProductAttention(2, qkv_features=6, use_bias=False), 2, 3, 4),
    "scan": lambda: linen(scanned("dense"), 2, 4),
    "scan of attention": lambda: linen(scanned("attention"), 2, 3, 4),
    "conv": lambda: linen(nn.Conv(6, (3, 3), use_bias=False), 1, 5, 5, 4),
    "conv of rows": lambda: linen(nn.Conv(6, (3,)), 1, 5, 4),
    "transposed conv": lambda: linen(nn.ConvTranspose(6, (3, 3), transpose_kernel=True), 1, 5, 5, 4),
    "depthwise": lambda: linen(Within(lambda: nn.Conv(6, (3, 3), feature_group_count=6, name="depthwise")), 1, 5, 5, 6),
    "equinox": lambda: equinox(eqx.nn.MLP(4, 4, 4, 2, key=KEY), 4),
    "equinox stack": equinox_stack,
    "equinox conv": lambda: equinox(eqx.nn.Conv2d(3, 6, 3, key=KEY), 3, 5, 5),
    "nnx": lambda: from_nnx(nnx.Linear(4, 4, rngs=nnx.Rngs(0)), 2, 4),
    "out first": lambda: (
        lambda p, x: x @ p["kernel"].T + p["bias"],
        {"kernel": normal(3, 4), "bias": normal(3)},
        normal(2, 4),
    ),
}
GUESSED = {
    "q_proj": lambda: linen(Within(lambda: nn.DenseGeneral((2, 8), use_bias=False, name="q_proj")), 2, 4),
    "scan without a bias": lambda: linen(Scan(), 2, 4),
    "depthwise by another name": lambda: linen(nn.Conv(6, (3, 3), feature_group_count=6), 1, 5, 5, 6),
    "equinox attention": equinox_attention,
    "einsum": lambda: (
        lambda p, x: jnp.einsum("btd,sndh->sbtnh", x, p["w"]),
        {"w": normal(3, 2, 4, 5)},
        normal(2, 3, 4),
    ),
    "experts": lambda: (lambda p, x: x @ p["experts"][1], {"experts": normal(3, 4, 5)}, normal(2, 4)),
}


@pytest.mark.parametrize("name", [*SURE, *GUESSED])
def test_a_reading_is_that_of_the_program_or_a_guess(name):
    f, params, x = (SURE | GUESSED)[name]()
    program = jw.layout(f, params, x)
    tree = flatten(params).by_path
    found = infer({path: w.shape for path, w in tree.items()})
    assert set(program) == {path for path, one in found.items() if one.axes is not None}
    for path, axes in program.items():
        assert bool(found[path].others) == (name in GUESSED)
        if name in SURE:
            shape = tree[path].shape
            one, other = (Reading.of(a, shape).squeezed(shape) for a in (axes, found[path].axes))
            assert one == other


@pytest.mark.parametrize("name", ["dense", "general", "equinox", "nnx", "out first"])
def test_every_output_unit_has_norm_1(name):
    """A row of the Jacobian is what an output unit multiplies its inputs by."""
    f, params, x = equinox(eqx.nn.Linear(4, 5, key=KEY), 4) if name == "equinox" else SURE[name]()
    unit = jw.on_tree(jw.projections.BoundNorm(1.0, 1.0))
    new = unit.apply(params, unit.init(params, KEY))
    rows = np.asarray(jax.jacobian(lambda x: f(new, x))(x)).reshape(-1, x.size)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, rtol=1e-5)


def test_every_layer_of_a_stack_has_norm_1():
    normalize = jw.on_tree(jw.SpectralNorm(n_steps=30))
    params = SURE["scan"]()[1]
    for kernel in normalize.apply(params, normalize.init(params, KEY))["d"]["kernel"]:
        layer = lambda x, k=kernel: nn.Dense(4).apply({"params": {"kernel": k, "bias": jnp.ones(4)}}, x)
        np.testing.assert_allclose(np.linalg.norm(jax.jacobian(layer)(jnp.ones(4)), 2), 1, atol=1e-2)
