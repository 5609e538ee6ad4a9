"""The axes of products, against an einsum and a window sum in NumPy built from the description alone."""

import itertools
import string

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxweights.programs.products import convolution, dot_general

RNG = np.random.default_rng(0)


def integers(*shape):
    """Small integers, whose sums are exact in any order."""
    return RNG.integers(-3, 4, shape).astype(np.float32)


def equation(f, *args):
    (eqn,) = jax.make_jaxpr(f)(*args).eqns
    return eqn


DOTS = {
    "matrices": ((2, 3), (3, 4), (((1,), (0,)), ((), ()))),
    "of the first axes": ((3, 2), (3, 4), (((0,), (0,)), ((), ()))),
    "vectors": ((3,), (3,), (((0,), (0,)), ((), ()))),
    "outer": ((2, 3), (4,), (((), ()), ((), ()))),
    "batch": ((5, 2, 3), (5, 3, 4), (((2,), (1,)), ((0,), (0,)))),
    "batch inside": ((2, 5, 3), (3, 4, 5), (((2,), (0,)), ((1,), (2,)))),
    "two of each, crossed": ((2, 3, 4, 5, 6), (6, 4, 7, 2, 3), (((1, 4), (4, 0)), ((2, 0), (1, 3)))),
    "only batch": ((2, 3), (3, 2), (((), ()), ((0, 1), (1, 0)))),
}


@pytest.mark.parametrize("name", DOTS)
def test_an_einsum_of_the_described_axes_is_the_product(name):
    left_shape, right_shape, numbers = DOTS[name]
    x, w = integers(*left_shape), integers(*right_shape)
    f = lambda x, w: lax.dot_general(x, w, numbers)
    left, right = dot_general(equation(f, x, w))
    letters = iter(string.ascii_letters)
    of_left = {a: next(letters) for a in range(x.ndim)}
    of_right = {a: of_left[right.partner[a]] if a in right.partner else next(letters) for a in range(w.ndim)}
    of_y = {place: of_right[a] for a, place in right.output.items()}
    of_y |= {place: of_left[a] for a, place in left.output.items()}
    spec = ["".join(names[a] for a in sorted(names)) for names in (of_left, of_right, of_y)]
    np.testing.assert_array_equal(np.einsum("{},{}->{}".format(*spec), x, w), f(x, w))


@pytest.mark.parametrize("name", DOTS)
def test_both_operands_have_the_same_view(name):
    left_shape, right_shape, numbers = DOTS[name]
    operands = dot_general(equation(lambda x, w: lax.dot_general(x, w, numbers), *map(jnp.ones, DOTS[name][:2])))
    assert [(o.contracted, o.batch) for o in operands] == list(zip(*numbers, strict=True))
    for o, other, n in zip(operands, operands[::-1], (len(left_shape), len(right_shape)), strict=True):
        assert sorted(o.batch + o.contracted + o.free) == list(range(n))
        assert {a: other.partner[b] for a, b in o.partner.items()} == {a: a for a in o.batch + o.contracted}
        assert [o.output[a] for a in o.batch] == [other.output[o.partner[a]] for a in o.batch]


SAME, NHWC, TURNED = [(1, 1), (1, 1)], ("NHWC", "HWIO", "NHWC"), ("NHWC", "WHIO", "NHWC")
CONVS = {
    "channels last": ((2, 5, 6, 3), (3, 2, 3, 4), dict(padding=SAME, dimension_numbers=NHWC)),
    "channels first": ((2, 3, 5, 6), (4, 3, 3, 2), dict(padding=SAME)),
    "any order": ((5, 3, 2, 6), (3, 3, 4, 2), dict(padding=SAME, dimension_numbers=("HCNW", "HIOW", "CWHN"))),
    "space in another order": (
        (2, 5, 6, 3),
        (3, 2, 3, 4),
        dict(padding=SAME, dimension_numbers=TURNED),
    ),
    "one spatial axis": ((2, 7, 3), (3, 3, 4), dict(padding=[(2, 0)], dimension_numbers=("NWC", "WIO", "NWC"))),
    "strides": ((2, 3, 7, 8), (4, 3, 3, 2), dict(padding=[(0, 1), (2, 0)], window_strides=(2, 3))),
    "cropped": ((2, 3, 7, 8), (4, 3, 3, 2), dict(padding=[(-1, 0), (0, -2)])),
    "dilated kernel": ((2, 3, 7, 8), (4, 3, 2, 2), dict(padding=SAME, rhs_dilation=(2, 3))),
    "dilated image": ((2, 3, 4, 3), (4, 3, 3, 2), dict(padding=SAME, lhs_dilation=(3, 2), window_strides=(2, 1))),
    "groups": ((2, 5, 6, 6), (3, 2, 3, 4), dict(padding=SAME, dimension_numbers=NHWC, feature_group_count=2)),
    "depthwise": ((2, 5, 6, 3), (3, 2, 1, 6), dict(padding=SAME, dimension_numbers=NHWC, feature_group_count=3)),
    "groups of samples": ((4, 3, 5, 6), (6, 3, 3, 2), dict(padding=SAME, batch_group_count=2)),
}


def summed(conv, x, w):
    """The convolution as a sum over window positions, from the description alone."""
    x = np.transpose(x, (conv.image.batch, conv.image.channels, *conv.image.space))
    w = np.transpose(w, (conv.kernel.output, conv.kernel.input, *conv.kernel.window))
    for axis, (low, high), dilation in zip((2, 3), conv.padding, conv.image_dilation, strict=False):
        x = np.moveaxis(x, axis, 0)
        dilated = np.zeros((dilation * (len(x) - 1) + 1, *x.shape[1:]))
        dilated[::dilation] = x
        pads = [(max(low, 0), max(high, 0))] + [(0, 0)] * (x.ndim - 1)
        x = np.pad(dilated, pads)[max(-low, 0) :]
        x = np.moveaxis(x[: len(x) - max(-high, 0)], 0, axis)
    window = w.shape[2:]
    reach = [d * (n - 1) + 1 for d, n in zip(conv.kernel_dilation, window, strict=True)]
    space = [(n - r) // s + 1 for n, r, s in zip(x.shape[2:], reach, conv.strides, strict=True)]
    n_out, n_in = w.shape[:2]
    n_samples = len(x) // conv.batch_groups
    y = np.zeros((n_samples, n_out, *space))
    for o, place in itertools.product(range(n_out), itertools.product(*map(range, window))):
        group, samples = o // (n_out // conv.groups), o // (n_out // conv.batch_groups)
        starts = [d * p for d, p in zip(conv.kernel_dilation, place, strict=True)]
        under = tuple(slice(a, a + s * (n - 1) + 1, s) for a, s, n in zip(starts, conv.strides, space, strict=True))
        part = x[samples * n_samples :][:n_samples, group * n_in :][:, :n_in]
        y[:, o] += np.einsum("ni...,i->n...", part[:, :, *under], w[o, :, *place])
    return np.moveaxis(y, range(y.ndim), (conv.output.batch, conv.output.channels, *conv.output.space))


@pytest.mark.parametrize("name", CONVS)
def test_a_sum_over_the_described_window_is_the_convolution(name):
    image, kernel, options = CONVS[name]
    x, w = integers(*image), integers(*kernel)
    f = lambda x, w: lax.conv_general_dilated(x, w, **{"window_strides": (1,) * (x.ndim - 2), **options})
    np.testing.assert_array_equal(summed(convolution(equation(f, x, w)), x, w), f(x, w))
