"""Products of integers: a stored weight times activations that are rounded to 8 bits on the fly."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxweights.core.checks import check_weight
from jaxweights.core.packing import n_words, rows_of_a_period, unpack
from jaxweights.core.stored import product
from jaxweights.numerics.norms import safe_divide
from jaxweights.techniques.quantization.array import QuantizedArray
from jaxweights.techniques.quantization.grids import Integers
from jaxweights.techniques.quantization.products.product import in_stored_order, times
from jaxweights.techniques.quantization.products.tiles import block_sums, offsets, tiled_times

_LARGEST = 127  # of a rounded activation
_FEW_ROWS = 4  # of x, below which products of floats are faster
_LEAST, _MOST = 16, 256  # rows of a tile


def int8_matmul(x: jax.Array, q: QuantizedArray) -> jax.Array:
    """x @ w for a weight stored as integers, with each row of x rounded to integers of 8 bits.

    y = (x̂ @ codes)·s·scale, x̂ = round(x/s), s = max|x|/127 over each row of x. Integers are multiplied and summed
    exactly. The gradient in x is that of x @ w: the rounding is passed straight through.

    The error is that of the rounding of x, |s·x̂ − x| <= max|x|/254, so |y − x @ w| <= max|x|·Σ|w|/254. For normally
    distributed x, y errs by about 1% of its own size; an outlier in x makes it more. On CPUs this takes half to three
    quarters of the time of the product in float32 for 4 rows of x or more; for fewer rows, as long as x @ q.

    Args:
      x: float array, shape (..., *input) with the input axes of `q` last.
      q: a `QuantizedArray` of integers without batch axes.

    Returns:
      Array of shape (..., *output) and the dtype of `x`.

    Raises:
      TypeError: `x` is not a float array, or `q` not a `QuantizedArray`.
      ValueError: `q` is not stored as integers, or the shapes do not fit.

    >>> import jax.numpy as jnp
    >>> import jaxweights as jw
    >>> q = jw.quantize(jnp.array([[2.0, -1.0], [1.0, 0.5]]), 8)
    >>> print(int8_matmul(jnp.array([[1.0, 0.25]]), q).round(2))
    [[ 2.25 -0.87]]

    References: Dettmers et al., LLM.int8(), arXiv:2208.07339, 2022; Yao et al., ZeroQuant, arXiv:2206.01861, 2022.
    """
    if not isinstance(q, QuantizedArray):
        raise TypeError(f"q must be a QuantizedArray, got {type(q).__name__}: make one with quantize(w, 8)")
    if not isinstance(q.format.grid, Integers):
        kind = type(q.format.grid).__name__
        raise ValueError(f"q must be stored as integers, got a grid of {kind}: multiply by it with matmul(x, q)")
    return product(check_weight(x, "x"), q, lambda rows: _times(*in_stored_order(rows, q)))


@jax.custom_jvp
def _times(x: jax.Array, q: QuantizedArray) -> jax.Array:
    scale = jnp.max(jnp.abs(x), 1, keepdims=True, initial=0) / _LARGEST
    codes = jnp.round(safe_divide(x, scale))
    tile = _tile(q, x.shape[1])
    if x.shape[0] < _FEW_ROWS or tile is None or x.size == 0:
        return times(codes * scale, q)
    y = _integer_times(codes.astype(jnp.int8), q, tile).astype(x.dtype)
    shift = _offsets_from_center(q)
    if shift is not None:
        y = y - jnp.matmul(block_sums(codes, q), shift.astype(x.dtype), precision="highest")
    return y * scale


@_times.defjvp
def _derivative(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (x, q), (dx, _) = primals, tangents
    return _times(x, q), tiled_times(dx, q)


def _integer_times(codes: jax.Array, q: QuantizedArray, tile: int) -> jax.Array:
    """Σ codes·(code of w − center)·scale of its block, float32, over tiles that have one scale each."""
    (m, rows), columns, bits = codes.shape, q.words.shape[1], q.format.grid.bits
    (n_blocks, block), scale = q.format.blocks(rows), q.scale.values()

    def add(y: jax.Array, part: jax.Array, i: jax.Array | int) -> jax.Array:
        words = lax.dynamic_slice_in_dim(q.words, i * n_words(tile, bits), n_words(part.shape[1], bits))
        w = (unpack(words, bits, part.shape[1]) - _center(q)).astype(jnp.int8)
        sums = lax.dot_general(part, w, (((1,), (0,)), ((), ())), preferred_element_type=jnp.int32).astype(jnp.float32)
        return y + (sums * lax.dynamic_slice_in_dim(scale, i * tile // block, 1) if n_blocks > 1 else sums)

    whole = rows // tile
    y = jnp.zeros((m, columns), jnp.float32)
    if whole:
        y = add(y, codes[:, :tile], 0)
    if whole > 1:
        parts = codes[:, tile : whole * tile].reshape(m, whole - 1, tile).swapaxes(0, 1)
        y, _ = lax.scan(lambda y, a: (add(y, *a), None), y, (parts, jnp.arange(1, whole)), unroll=2)
    if rows % tile:
        y = add(y, codes[:, whole * tile :], whole)
    return y if n_blocks > 1 else y * scale


def _tile(q: QuantizedArray, rows: int) -> int | None:
    """Rows of a tile: whole periods of words that share a scale; None if blocks are too small for it."""
    (n_blocks, block), period = q.format.blocks(rows), rows_of_a_period(q.format.grid.bits)
    sizes = [n for n in range(period, _MOST + 1, period) if n_blocks == 1 or block % n == 0]
    return sizes[-1] if sizes and sizes[-1] >= _LEAST else None


def _center(q: QuantizedArray) -> int:
    """What is subtracted from a code, so that it fits in 8 bits with a sign."""
    return 2 ** (q.format.grid.bits - 1)


def _offsets_from_center(q: QuantizedArray) -> jax.Array | None:
    """What is subtracted from (code − center)·scale: (blocks, N), or None."""
    assert isinstance(q.format.grid, Integers)
    shift, apart = offsets(q), _center(q) - q.format.grid.offset
    if not apart:
        return shift
    own = jnp.broadcast_to(-apart * q.scale.values(), (q.scale.codes.shape[0], q.words.shape[1]))
    return own if shift is None else shift + own
