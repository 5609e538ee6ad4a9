"""Index arrays that assign the positions of a weight to shared values: for convolutions, and by hashing."""

from __future__ import annotations

import itertools
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
) -> np.ndarray:
    """The index array that expresses a convolution as a matrix with shared weights.

    `x.ravel() @ share(kernel.ravel(), conv_index(kernel.shape, x.shape))` is the raveled output of
    `lax.conv_general_dilated` on one image: one kernel, shared by all positions. Entries that no kernel weight
    reaches are −1, so `share` makes them 0.

    Args:
      kernel_shape: (*window, in, out), the layout of Flax (HWIO).
      input_shape: (*space, in), the layout of Flax (HWC).
      strides: one for all axes, or one per axis of the window.
      padding: "SAME", "VALID", "CIRCULAR", or (before, after) per axis of the window.

    Returns:
      Numpy array of the smallest integer dtype that holds it, shape (input size, output size): a constant that need
      only be computed once.

    Raises:
      TypeError: a shape or stride is not made of integers.
      ValueError: the shapes do not fit, a stride is less than 1, or `padding` is unknown.

    >>> conv_index((2, 1, 1), (3, 1), padding="VALID")      # a window of two over three positions
    array([[ 0, -1],
           [ 1,  0],
           [-1,  1]], dtype=int8)

    References: LeCun et al., Backpropagation Applied to Handwritten Zip Code Recognition, Neural
    Computation 1989.
    """
    conv = Convolution.of(kernel_shape, input_shape, strides=strides, padding=padding)
    space, out_space = conv.input_shape[:-1], conv.output_shape[:-1]
    if conv.circular and any(k > n for k, n in zip(conv.window, space, strict=True)):
        raise ValueError(
            f"a circular window of {conv.window} overlaps itself on an image of {space}, where one position needs the "
            f"sum of two weights: use a smaller window"
        )
    size = math.prod(kernel_shape)
    dtype = index_dtype(size)
    index = np.full((*space, conv.input_shape[-1], *conv.output_shape), -1, dtype)
    weights = np.arange(size, dtype=dtype).reshape(kernel_shape)
    for position in itertools.product(*map(range, out_space)):
        for offset in itertools.product(*map(range, conv.window)):
            steps = zip(position, conv.strides, conv.pads, offset, strict=True)
            source = [o * s - before + k for o, s, (before, _), k in steps]
            if conv.circular:
                source = [i % n for i, n in zip(source, space, strict=True)]
            if all(0 <= i < n for i, n in zip(source, space, strict=True)):
                index[(*source, slice(None), *position, slice(None))] = weights[offset]
    return index.reshape(math.prod(input_shape), -1)


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
