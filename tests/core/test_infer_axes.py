"""Axes inferred from the other weights of a tree, and cases where nothing can be inferred."""

import flax
import flax.linen as nn
import jax
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict
from flax_modules import random_params, scanned

from jaxweights.core.axes import (
    ATTENTION_IN,
    ATTENTION_OUT,
    DENSE,
    Axes,
    Reading,
    dense_general,
    infer_axes,
)


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
        {"x/embedding": (4, 2, 3), "x/bias": (2, 3)},  # not a kernel
        {"kernel": (4, 4, 5), "bias": (4, 5)},  # a stack, or a DenseGeneral
        {"kernel": (5, 8, 8, 3), "bias": (5, 8, 3)},  # a stack of DenseGeneral, or a stack of stacks
        {"kernel": (3, 4, 5), "bias": (2, 5)},  # fits nothing
        {"kernel": (3, 4, 5), "bias": (3, 4, 5)},
    ],
    ids=str,
)
def test_infer_nothing(tree):
    assert infer_axes(tree) == {}
