"""Reinitialization of trees, and the resulting fans of Flax layers."""

import functools
import math

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import freeze
from flax.traverse_util import flatten_dict
from flax_modules import KEY, random_params, scanned

import jaxweights as jw
from jaxweights.core.axes import depthwise

init = jw.initializers


def check_fan(kernel, n_in):
    """Checks He's variance, 2/n_in, within six standard errors."""
    w = np.float64(kernel)
    assert abs((w**2).mean() * n_in / 2 - 1) < 6 * math.sqrt(2 / w.size)


# `kernel_init=`: Flax passes the shape of one layer, with the features of a DenseGeneral flattened.


def conv(groups=1, features=64):
    return nn.Conv(features, (3, 3), feature_group_count=groups, kernel_init=jw.he_normal)


ATTENTION = nn.MultiHeadDotProductAttention(8, kernel_init=jw.he_normal)
LAYERS = {  # module, shape of x, {path: n_in}
    "dense": (nn.Dense(64, kernel_init=jw.he_normal), (1, 48), {"kernel": 48}),
    "dense general": (
        nn.DenseGeneral((8, 16), axis=(-2, -1), kernel_init=jw.he_normal),
        (1, 6, 10),
        {"kernel": 60},
    ),
    "attention": (ATTENTION, (1, 2, 128), {f"{n}/kernel": 128 for n in ("query", "key", "value", "out")}),
    "conv": (conv(), (1, 4, 4, 16), {"kernel": 144}),
    "grouped conv": (conv(4), (1, 4, 4, 16), {"kernel": 36}),
    "depthwise conv": (conv(512, 512), (1, 4, 4, 512), {"kernel": 9}),
    "transposed conv": (nn.ConvTranspose(64, (3, 3), kernel_init=jw.he_normal), (1, 4, 4, 16), {"kernel": 144}),
}


@pytest.mark.parametrize("name", LAYERS)
def test_fans_of_linen_layers_by_kernel_init(name):
    module, shape, fans = LAYERS[name]
    params = flatten_dict(jax.jit(module.init)(KEY, jnp.ones(shape))["params"], sep="/")
    for path, n_in in fans.items():
        check_fan(params[path], n_in)


class Wide(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.Dense(x.shape[-1], kernel_init=jw.he_normal)(x), None


def test_fans_of_a_stack_by_kernel_init():
    stack = nn.scan(Wide, variable_axes={"params": 0}, split_rngs={"params": True}, length=12)()
    kernel = stack.init(KEY, jnp.ones((1, 64)), None)["params"]["Dense_0"]["kernel"]
    assert kernel.shape == (12, 64, 64)
    check_fan(kernel, 64)


@pytest.mark.parametrize(
    ("make", "n_in"),
    [
        (lambda **o: nnx.Linear(48, 64, **o), 48),
        (lambda **o: nnx.LinearGeneral((6, 10), (8, 16), axis=(-2, -1), **o), 60),
        (lambda **o: nnx.Conv(512, 512, (3, 3), feature_group_count=512, **o), 9),
        (lambda **o: nnx.MultiHeadAttention(8, 128, decode=False, **o).query, 128),
    ],
)
def test_fans_of_nnx_layers_by_kernel_init(make, n_in):
    check_fan(make(kernel_init=jw.he_normal, rngs=nnx.Rngs(0)).kernel[...], n_in)


def test_orthogonal_attention_by_kernel_init():
    module = nn.MultiHeadDotProductAttention(4, kernel_init=init.orthogonal)
    params = module.init(KEY, jnp.ones((1, 2, 32)))["params"]
    query, out = params["query"]["kernel"].reshape(32, 32), params["out"]["kernel"].reshape(32, 32)
    for m in (query, out):
        np.testing.assert_allclose(m.T @ m, np.eye(32), atol=1e-5)


# `reinitialize`: the tree reveals attention and stacks.


@pytest.mark.parametrize(
    ("module", "x_shape", "fans"),
    [
        (ATTENTION, (1, 2, 128), LAYERS["attention"][2]),
        (scanned("dense"), (1, 64), {"d/kernel": 64}),
        (scanned("attention"), (1, 64), {f"a/{n}/kernel": 64 for n in ("query", "key", "value", "out")}),
        (nn.DenseGeneral((8, 16), axis=(-2, -1)), (6, 10), {"kernel": 60}),
        # Flax passes (4·30, 50), so it counts the batch as input.
        (nn.DenseGeneral(50, batch_dims=0), (4, 30), {"kernel": 30}),
        (conv(512, 512), (1, 4, 4, 512), {"kernel": 9}),
    ],
)
def test_fans_that_follow_from_the_tree(module, x_shape, fans):
    new = jw.reinitialize(random_params(module, x_shape), KEY, {"**/kernel": jw.he_normal})
    new = flatten_dict(new, sep="/")
    for path, n_in in fans.items():
        check_fan(new[path], n_in)


def test_axes_by_hand_come_first():
    """Axes set by `functools.partial` are not inferred."""
    rule = functools.partial(jw.he_normal, mode="fan_out", axes=depthwise(512))
    new = jw.reinitialize({"kernel": jnp.zeros((3, 3, 1, 512)), "bias": jnp.zeros(512)}, KEY, {"kernel": rule})
    check_fan(new["kernel"], 9)


def test_options_by_partial_still_get_the_axes():
    params = random_params(nn.MultiHeadDotProductAttention(4), (1, 2, 32))
    rule = functools.partial(init.orthogonal, gain=2.0)
    w = jw.reinitialize(params, KEY, {"**/kernel": rule})["query"]["kernel"].reshape(32, 32)
    np.testing.assert_allclose(w.T @ w, 4 * np.eye(32), atol=1e-5)


class Equinox(eqx.Module):
    kernel: jax.Array
    bias: jax.Array
    name: str = eqx.field(static=True, default="layer")


LAYER = {"kernel": jnp.ones((6, 8)), "bias": jnp.ones(8)}
TREES = {
    "dict": LAYER,
    "FrozenDict": freeze(LAYER),
    "nnx.State": nnx.state(nnx.Linear(6, 8, rngs=nnx.Rngs(0))),
    "Equinox": Equinox(**LAYER),
    "shapes and None": {**LAYER, "none": None, "count": jnp.ones((), jnp.int32)},
}


@pytest.mark.parametrize("name", TREES)
def test_every_kind_of_tree(name):
    tree = TREES[name]
    new = jw.reinitialize(tree, KEY, {"kernel": jw.he_normal})
    assert jax.tree.structure(new) == jax.tree.structure(tree)
    expected = jw.reinitialize(LAYER, KEY, {"kernel": jw.he_normal})
    for a in (new, tree):
        leaves = {leaf.shape: leaf for leaf in jax.tree.leaves(a)}
        same = np.array_equal(leaves[6, 8], expected["kernel"])
        assert same == (a is new)
    assert np.array_equal(
        {a.shape: a for a in jax.tree.leaves(new)}[(8,)], {a.shape: a for a in jax.tree.leaves(tree)}[(8,)]
    )


def test_what_a_weight_draws_does_not_change_with_the_rest_of_the_tree():
    rules = {"**/kernel": jw.he_normal}
    one = jw.reinitialize({"b": LAYER}, KEY, rules)
    more = jw.reinitialize({"a": LAYER, "b": LAYER, "c": LAYER}, KEY, rules)
    np.testing.assert_array_equal(one["b"]["kernel"], more["b"]["kernel"])
    assert not np.allclose(more["a"]["kernel"], more["b"]["kernel"])


def test_jitted():
    def draw(key):
        return jw.reinitialize(LAYER, key, {"kernel": init.orthogonal, "bias": init.zeros})

    new, expected = jax.jit(draw)(KEY), draw(KEY)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), new, expected)
