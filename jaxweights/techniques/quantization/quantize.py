"""Stored quantization: codes of few bits and scales in place of the weight."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from jaxweights.core.axes import Axes
from jaxweights.core.checks import check_key, check_weight
from jaxweights.core.layer import stored_matrix
from jaxweights.core.packing import pack
from jaxweights.techniques.quantization.array import QuantizedArray
from jaxweights.techniques.quantization.blocking import Blocking, from_blocks, in_blocks
from jaxweights.techniques.quantization.blocks import Parts, encode
from jaxweights.techniques.quantization.formats import Format, format_of
from jaxweights.techniques.quantization.ranges import Range, default_range
from jaxweights.techniques.quantization.scales import Scales


def quantize(
    w: jax.Array,
    format: int | str | Format,
    *,
    axes: Axes | None = None,
    block: int | None = None,
    range: Range | None = None,
    key: jax.Array | None = None,
) -> QuantizedArray:
    """Stores a weight in few bits: codes of a format, and a scale for each output unit or block of its inputs.

    code = the code of the value of the grid nearest to w/s + zero, s = max|w|/peak over the block by default. For
    integers of b bits, peak = 2^(b−1) − 1, rounded half to even, and |w − ŵ| <= s/2.

    Args:
      w: float array of any shape.
      format: a number of bits, 2 to 8 (integers, symmetric, a scale per output unit); the name of a format in the
        field: "int2" to "int8", "nf4", "fp4", "fp8_e4m3", "fp8_e5m2", "mxfp4", "mxfp8", "nvfp4", "ternary", "binary";
        or a `jaxweights.formats.Format`.
      axes: how `w` is read as a matrix; (..., in, out) by default. A stack of layers needs its batch axes, as in
        `Axes(batch=0)`: each layer then has scales of its own.
      block: number of consecutive inputs of an output unit that share a scale, in place of that of the format. The last
        block may be shorter.
      range: how scales are chosen, one of `jaxweights.ranges`. By default `AbsMax`; `AbsMean` for ternary and binary.
      key: `jax.random` key, to round stochastically: E[ŵ] = w within the range. By default, to nearest.

    Returns:
      A `QuantizedArray`. A block of zeros has scale 0. Weights must be finite.

    Raises:
      TypeError: `w` is not a float array, `format` not a format, or `range` not one of `jaxweights.ranges`.
      ValueError: a number is out of range, or `axes` does not fit `w`.

    >>> import jax.numpy as jnp
    >>> q = quantize(jnp.array([[1.27, -0.5], [0.64, 0.25], [0.0, 0.0], [0.0, 0.0]]), 8)
    >>> print(q.codes[:2] - 128, q.nbytes)
    [[ 127 -127]
     [  64   64]] 16
    >>> w = jnp.linspace(-1, 1, 512 * 64).reshape(512, 64)
    >>> [quantize(w, format).nbytes for format in ("int4", "nf4", "mxfp4", "binary")]
    [16640, 18432, 17408, 4352]

    References: Jacob et al., arXiv:1712.05877, 2017; Nagel et al., A White Paper on Neural Network Quantization,
    arXiv:2106.08295, 2021; Gupta et al., Deep Learning with Limited Numerical Precision, arXiv:1502.02551, 2015
    (stochastic rounding).
    """
    w, format = check_weight(w), format_of(format, block)
    if key is not None:
        check_key(key)
    return _quantize(w, key, Blocking(format, axes, w.shape), check_range(range, format))


def check_range(range: Range | None, format: Format) -> Range:
    """The range, by default that of the format, or an error."""
    if range is None:
        return default_range(format)
    if not isinstance(range, Range):
        raise TypeError(f"range must be one of jaxweights.ranges, got {range!r}: write jaxweights.ranges.MSE()")
    range.check(format)
    return range


@partial(jax.jit, static_argnums=(2, 3))
def _quantize(w: jax.Array, key: jax.Array | None, blocking: Blocking, range: Range) -> QuantizedArray:
    return store(w, blocking.fit(w, range), blocking, key)


def store(w: jax.Array, parts: Parts, blocking: Blocking, key: jax.Array | None = None) -> QuantizedArray:
    """The weight with these scales and zero points: `Blocking.rounded`, in few bits."""
    format = blocking.format
    matrix, layer = stored_matrix(w, blocking.axes)
    scales = blocking.scales(parts)
    zero = None if parts.zero is None else blocking.of_matrices(parts.zero)
    of_blocks = Parts(scales.values()[..., None, :], None if zero is None else zero[..., None, :])
    uniform = None if key is None else in_blocks(jax.random.uniform(key, matrix.shape), format)
    codes = from_blocks(encode(in_blocks(matrix, format), of_blocks, format, uniform), matrix.shape)
    words = pack(codes, format.grid.bits)
    return QuantizedArray(words, scales, zero, None, None, None, format, w.dtype, layer)


def fit_matrix(matrix: jax.Array, format: Format, range: Range) -> tuple[Scales, Parts]:
    """The scales of matrices (..., K, N) as they are stored, and the parts with which `in_blocks` is coded."""
    rows = matrix.shape[-2]
    n_blocks, block = format.blocks(rows)
    padded = n_blocks * block != rows
    there = (jnp.arange(n_blocks * block) < rows).reshape(n_blocks, block, 1) if padded else None
    return fit_blocks(in_blocks(matrix, format), format, range, there)


def fit_blocks(
    blocks: jax.Array, format: Format, range: Range, there: jax.Array | None = None, outer: jax.Array | None = None
) -> tuple[Scales, Parts]:
    """The scales of blocks (..., blocks, rows of a block, N) as they are stored, and the parts that code them.

    Args:
      blocks: weights in float32 or wider.
      format: what they are for.
      range: how the scales are chosen.
      there: whether each row is one of the matrix, and not padding. None: all are.
      outer: the factors of the scales, if they are chosen already.
    """
    over = (-2, -1) if format.per_tensor else (-2,)
    parts = range.fit(blocks, tuple(a % blocks.ndim for a in over), format, there)
    assert parts.reach is not None
    scale, reach = jnp.squeeze(parts.scale, -2), jnp.squeeze(parts.reach, -2)
    scales = format.scale.encode(scale, reach, format.grid.peak, outer)
    return scales, parts._replace(scale=scales.values()[..., None, :])


def dequantize(q: QuantizedArray) -> jax.Array:
    """The weight that a `QuantizedArray` represents, in its original dtype.

    >>> import jax.numpy as jnp
    >>> print(dequantize(quantize(jnp.array([2.0, -1.0, 0.0]), 2)))
    [2. 0. 0.]
    """
    if not isinstance(q, QuantizedArray):
        raise TypeError(
            f"q must be a QuantizedArray, got {type(q).__name__}: make one with quantize(w, bits), or dequantize all "
            f"of a tree with jaxweights.densify(tree)"
        )
    return q.todense()
