"""Index arrays that assign the positions of a weight to shared values: for convolutions, and by hashing."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from jaxweights.core.checks import check_integer, check_shape
from jaxweights.core.convolution import Convolution, Padding


def index_dtype(n: int) -> np.dtype:
    """The smallest integer dtype that holds −1 ... n − 1.

    >>> print(index_dtype(128), index_dtype(129), index_dtype(2**15 + 1))
    int8 int16 int32
    """
    return np.dtype(next(kind for kind in (np.int8, np.int16, np.int32) if n - 1 <= np.iinfo(kind).max))


def conv_index(
    kernel_shape: Sequence[int],
    input_shape: Sequence[int],
    *,
    strides: int | Sequence[int] = 1,
    padding: Padding = "SAME",
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> np.ndarray:
    """The index array that expresses a convolution as a matrix with shared weights.

    `x.ravel() @ share(kernel.ravel(), conv_index(kernel.shape, x.shape))` is the raveled output of
    `lax.conv_general_dilated` on one image: one kernel, shared by all positions. Entries that no kernel weight
    reaches are −1, so `share` makes them 0. For large images see `jaxweights.sharing.Convolution`, which multiplies by
    this matrix without it.

    Args:
      kernel_shape: (*window, in // groups, out), the layout of Flax (HWIO).
      input_shape: (*space, in), the layout of Flax (HWC).
      strides: one for all axes, or one per axis of the window.
      padding: "SAME", "VALID", "CIRCULAR", or (before, after) per axis of the window.
      dilation: distance between the positions of the window (`rhs_dilation`), one for all axes or one per axis.
      groups: groups of channels (`feature_group_count`).

    Returns:
      Numpy array of the smallest integer dtype that holds it, shape (input size, output size): a constant that need
      only be computed once.

    Raises:
      TypeError: a shape, stride, dilation or number of groups is not made of integers.
      ValueError: the shapes do not fit, one of the others is less than 1, or `padding` is unknown.

    >>> conv_index((2, 1, 1), (3, 1), padding="VALID")      # a window of two over three positions
    array([[ 0, -1],
           [ 1,  0],
           [-1,  1]], dtype=int8)

    References: LeCun et al., Backpropagation Applied to Handwritten Zip Code Recognition, Neural
    Computation 1989.
    """
    conv = Convolution.of(kernel_shape, input_shape, strides=strides, padding=padding, dilation=dilation, groups=groups)
    return conv_positions(conv).astype(index_dtype(math.prod(kernel_shape)))


def conv_positions(conv: Convolution) -> np.ndarray:
    """The kernel weight at each entry of the matrix of a convolution, (input size, output size); −1 where none is."""
    index = np.zeros((1, 1), np.int64)  # of the axes so far, (input size, output size)
    for axis, size in enumerate(conv.window):
        index = _joined(index, _taps(conv, axis), size)
    n_in, n_out = conv.input_shape[-1], conv.output_shape[-1]
    per_group, units = n_in // conv.groups, n_out // conv.groups
    i, o = np.arange(n_in)[:, None], np.arange(n_out)
    channels = np.where(i // per_group == o // units, i % per_group * n_out + o, -1)
    return _joined(index, channels, per_group * n_out)


def _taps(conv: Convolution, axis: int) -> np.ndarray:
    """The place in the window by which an input position reaches an output position of an axis; −1 where none does."""
    size, (before, _) = conv.window[axis], conv.pads[axis]
    n_in, n_out, step = conv.input_shape[axis], conv.output_shape[axis], conv.dilation[axis]
    place = np.arange(size)[:, None]
    source = np.arange(n_out) * conv.strides[axis] - before + place * step
    if conv.circular:
        if len({k * step % n_in for k in range(size)}) < size:
            raise ValueError(
                f"a circular window of {conv.window} overlaps itself on an image of {conv.input_shape[:-1]}, where one "
                f"position needs the sum of two weights: use a smaller window"
            )
        source %= n_in
    place, target = np.nonzero((source >= 0) & (source < n_in))
    taps = np.full((n_in, n_out), -1)
    taps[source[place, target], target] = place
    return taps


def _joined(a: np.ndarray, b: np.ndarray, size: int) -> np.ndarray:
    """The index of two axes, where the second has `size` weights."""
    rows, columns = a.shape[0] * b.shape[0], a.shape[1] * b.shape[1]
    a, b = a[:, None, :, None], b[:, None]
    return np.where((a >= 0) & (b >= 0), a * size + b, -1).reshape(rows, columns)


def hash_index(shape: Sequence[int], n: int, seed: int = 0) -> np.ndarray:
    """Hashes each position of a weight into one of `n` buckets.

    index[i] = h(i, seed) mod n with a fixed 32-bit mixing function h: the same on every machine.

    Args:
      shape: shape of the weight.
      n: number of buckets, at least 1.
      seed: integer that picks the hash function.

    Returns:
      Numpy array of the given shape, of the smallest integer dtype that holds −1 to n − 1.

    Raises:
      TypeError: `n`, `seed` or a size in `shape` is not an integer.
      ValueError: `n` is less than 1 or above 2³¹ − 1, or `seed` is negative.

    >>> hash_index((2, 4), 3).shape
    (2, 4)

    References: Chen, Wilson, Tyree, Weinberger and Chen, Compressing Neural Networks with the Hashing Trick,
    arXiv:1504.04788, 2015.
    """
    shape = check_shape("shape", shape)
    check_integer("n", n, 1, 2**31 - 1)
    check_integer("seed", seed, 0)
    h = np.arange(math.prod(shape), dtype=np.uint64) + np.uint64(int(seed) * 0x9E3779B97F4A7C15 % 2**64)
    for multiplier, shift in ((0xBF58476D1CE4E5B9, 30), (0x94D049BB133111EB, 27)):  # splitmix64
        h = (h ^ (h >> np.uint64(shift))) * np.uint64(multiplier)
    h ^= h >> np.uint64(31)
    return (h % np.uint64(n)).astype(index_dtype(n)).reshape(shape)
