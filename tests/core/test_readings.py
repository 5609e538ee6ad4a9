"""Readings of a shape: fans, defaults, groups, and errors for mismatched axes."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxweights.core.axes import (
    ATTENTION_IN,
    ATTENTION_OUT,
    CONV,
    CONV_TRANSPOSE_KERNEL,
    DENSE,
    Axes,
    Reading,
    dense_general,
    depthwise,
    fans,
)

# Fans


@pytest.mark.parametrize(
    ("shape", "axes", "expected"),
    [
        ((256, 512), None, (256, 512)),
        ((7,), None, (7, 1)),
        ((), None, (1, 1)),
        ((3, 3, 64, 128), None, (576, 1152)),
        ((3, 3, 1, 64), None, (9, 576)),
        ((3, 3, 1, 64), depthwise(64), (9, 9)),
        ((3, 3, 8, 32), depthwise(4), (72, 72)),
        ((512, 8, 64), ATTENTION_IN, (512, 512)),
        ((8, 64, 512), ATTENTION_OUT, (512, 512)),
        ((12, 256, 512), Axes(batch=0), (256, 512)),
        ((12, 3, 3, 64, 128), CONV.stacked(), (576, 1152)),
        ((3, 3, 128, 64), CONV_TRANSPOSE_KERNEL, (576, 1152)),
        ((2, 3, 4, 5), dense_general(2, 2), (6, 20)),
        ((0, 4), None, (0, 4)),
    ],
)
def test_fans(shape, axes, expected):
    assert fans(shape, axes) == expected


# Readings


def test_axes_none_reads_vectors_and_scalars_as_one_unit():
    assert Reading.of(None, (5,)) == Reading(input=(0,), output=(), batch=(), window=())
    assert Reading.of(None, ()) == Reading(input=(), output=(), batch=(), window=())


def test_split_groups_reads_groups_as_batch():
    w = jnp.arange(2 * 3 * 8.0).reshape(2, 3, 8)
    split, reading = Reading.of(depthwise(4), w.shape).split_groups(w)
    assert split.shape == (2, 3, 4, 2)
    assert reading == Reading(input=(1,), output=(3,), batch=(2,), window=(0,))
    # Output units 2i and 2i + 1 belong to group i, for any position of the output axis.
    np.testing.assert_array_equal(split[..., 1, :], w[..., 2:4])
    moved, reading = Reading.of(Axes(input=1, output=0, groups=4), (8, 3, 2)).split_groups(jnp.moveaxis(w, 2, 0))
    assert reading == Reading(input=(2,), output=(1,), batch=(0,), window=(3,))
    np.testing.assert_array_equal(moved[1], jnp.moveaxis(w, 2, 0)[2:4])


def test_size_zero_axes():
    assert Axes().matrix(jnp.ones((0, 4))).shape == (0, 4)
    assert CONV.matrix(jnp.ones((3, 0, 4, 5))).shape == (0, 5)
    assert DENSE.stacked().matrix(jnp.ones((0, 4, 5))).shape == (0, 4, 5)


def test_equal_axes_hash_alike():
    assert Axes(input=[0], output=(1, 2)) == Axes(input=0, output=[1, 2])
    assert len({Axes(input=[0], output=(1, 2)), Axes(input=0, output=[1, 2])}) == 1


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Axes(input="0"), TypeError, "input must be"),
        (lambda: Axes(output=1.0), TypeError, "output must be"),
        (lambda: Axes(batch=True), TypeError, "batch must be"),
        (lambda: Axes(groups=0), ValueError, "groups must be"),
        (lambda: Axes(input=2).matrix(jnp.ones((2, 3))), ValueError, "input axis 2"),
        (lambda: Axes(input=1, output=-1).matrix(jnp.ones((2, 3))), ValueError, "axis 1 .* both"),
        (lambda: Axes(input=0, output=1, window=()).matrix(jnp.ones((2, 3, 4))), ValueError, "axis 2 .* without"),
        (lambda: Axes().matrix(jnp.ones(3)), ValueError, "axis -2"),
        (lambda: depthwise(3).matrix(jnp.ones((2, 4))), ValueError, "groups=3 does not divide"),
        (lambda: Axes(0, (1, 2), groups=2).matrix(jnp.ones((2, 4, 4))), ValueError, "one output axis"),
        (lambda: fans((2, 3), (0, 1)), TypeError, "jaxweights.Axes"),
        (lambda: DENSE.stacked(-1), ValueError, "axis must be"),
        (lambda: DENSE.stacked(1).matrix(jnp.ones((3, 5, 4))), ValueError, "axis 1 .* both batch and input"),
        (lambda: Axes(0, 1).stacked(), ValueError, "negative"),
    ],
)
def test_errors(make, error, message):
    with pytest.raises(error, match=message):
        make()
