"""Products with stored weights on TPUs. Codes are decoded as the product reads them: no dense weight is made.

XLA fuses the decoding into the product where each word, or each eight, spread over whole registers, the number of rows
is a power of two, and the other operand is hidden from it. A matrix of which this does not hold is multiplied tile by
tile; the tiles fit into the memory of the chip.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxweights.core.packing import n_words, rows_of_a_period, unpack
from jaxweights.techniques.quantization.blocks import Parts, decode
from jaxweights.techniques.quantization.formats import Format
from jaxweights.techniques.quantization.products.tiles import tiled_times

if TYPE_CHECKING:
    from jaxweights.techniques.quantization.array import QuantizedArray

_WORD = 32
_SUBLANES = 8  # rows of a register
_WORDS_OF_TILE, _VALUES_OF_TILE = 2**22, 2**23  # 16 and 32 MiB, of 128 MiB on a v5e chip
_LEAST = 256  # rows of tiles that divide those of the matrix


def times(x: jax.Array, q: QuantizedArray) -> jax.Array:
    """x @ w for x (M, K) and the stored matrix w (K, N), whose rows are in order and have no scales of their own.

    In float32, or float64 if `x` is. Both operands are rounded to bfloat16 if `x` is in it.
    """
    if x.dtype == jnp.float64 or x.size == 0:
        return tiled_times(x.astype(jnp.promote_types(x.dtype, jnp.float32)), q)
    x = x if x.dtype == jnp.bfloat16 else x.astype(jnp.float32)
    rows, bits = x.shape[1], q.format.grid.bits
    n_blocks, block = q.format.blocks(rows)
    minimum = None if q.minimum is None else q.minimum.values()
    whole = _Rows(q.words, q.scale.values(), q.zero, minimum, block, q.format)
    tile = _tile(rows, q.words.shape[1], block if n_blocks > 1 else 1, bits)
    if tile >= rows or whole.fuses(rows):
        return _product(x, whole)

    def part(i: jax.Array | int, n: int) -> jax.Array:
        return _product(lax.dynamic_slice_in_dim(x, i * tile, n, 1), whole.tile(i, tile, n))

    y = lax.fori_loop(1, rows // tile, lambda i, y: y + part(i, tile), part(0, tile))
    return y + part(rows // tile, rows % tile) if rows % tile else y


class _Rows(NamedTuple):
    """Consecutive rows of a stored matrix, and what their blocks share."""

    words: jax.Array
    scale: jax.Array
    zero: jax.Array | None
    minimum: jax.Array | None
    block: int
    format: Format

    def tile(self, i: jax.Array | int, size: int, n: int) -> _Rows:
        """The first n rows of tile i of tiles of this size."""

        def of_blocks(a: Any) -> Any:
            if a is None or a.shape[0] == 1:
                return a
            return lax.dynamic_slice_in_dim(a, i * size // self.block, -(-n // self.block))

        bits = self.format.grid.bits
        words = lax.dynamic_slice_in_dim(self.words, i * n_words(size, bits), n_words(n, bits))
        zero, minimum = map(of_blocks, (self.zero, self.minimum))
        return _Rows(words, of_blocks(self.scale), zero, minimum, self.block, self.format)

    def fuses(self, rows: int) -> bool:
        """Whether XLA fuses the decoding of this many rows into a product."""
        bits = self.format.grid.bits
        unit = _WORD if bits == 8 else _SUBLANES
        by_block = any(a is not None and a.shape[0] > 1 for a in (self.scale, self.zero, self.minimum))
        block = self.block if by_block else rows
        return _WORD % bits == 0 and rows.bit_count() == 1 and rows % max(unit, _WORD // bits) == 0 == block % unit


def _product(x: jax.Array, w: _Rows) -> jax.Array:
    """x @ w for the first rows of `w`, as many as `x` has columns."""
    rows, bits, fuses = x.shape[1], w.format.grid.bits, w.fuses(x.shape[1])

    def over_rows(a: jax.Array) -> jax.Array:
        return a if a.shape[0] == 1 else _repeat(a, w.block)[:rows]

    codes = _unpack(w.words, bits) if fuses else unpack(w.words, bits, rows)
    by_block = w.scale.shape[0] > 1 or w.minimum is not None
    scale = over_rows(w.scale) if by_block else jnp.float32(1)
    values = decode(codes, Parts(scale, None if w.zero is None else over_rows(w.zero)), w.format)
    if w.minimum is not None:
        values = values - over_rows(w.minimum)
    # Behind the barrier, XLA does not reshape both operands to undo the change of order, nor to undo what made `x`.
    x = lax.optimization_barrier(_in_order_of_registers(x) if fuses and bits == 8 else x)
    precision = None if x.dtype == jnp.bfloat16 else lax.Precision.HIGHEST
    y = jnp.matmul(x, values.astype(x.dtype), precision=precision, preferred_element_type=jnp.float32)
    return y if by_block else y * w.scale


def _unpack(words: jax.Array, bits: int) -> jax.Array:
    """The codes of one plane, spread over registers. Those of 8 bits are in the order of `_in_order_of_registers`."""
    per_word, columns = _WORD // bits, words.shape[1]
    words = words.reshape(-1, 1, _SUBLANES if bits == 8 else 1, columns)
    words = jnp.broadcast_to(words, (words.shape[0], per_word, *words.shape[2:]))
    shift = bits * jnp.arange(per_word, dtype=jnp.int32)[:, None, None]
    codes = lax.shift_right_logical(words, jnp.broadcast_to(shift, words.shape)) & (2**bits - 1)
    return codes.reshape(-1, columns)


def _in_order_of_registers(x: jax.Array) -> jax.Array:
    """The columns of `x`, 32 by 32, as `_unpack` takes them from eight words: byte 0 of each, byte 1 of each, ..."""
    return x.reshape(x.shape[0], -1, _SUBLANES, 4).swapaxes(2, 3).reshape(x.shape)


def _repeat(a: jax.Array, n: int) -> jax.Array:
    """Each row n times: XLA fuses this, and not `jnp.repeat`."""
    return jnp.broadcast_to(a[:, None], (a.shape[0], n, a.shape[1])).reshape(-1, a.shape[1])


def _tile(rows: int, columns: int, block: int, bits: int) -> int:
    """Rows of a tile: whole blocks or a part of one, times a power of two, that divide all rows if any do."""
    entries = _WORDS_OF_TILE * _WORD // bits if _WORD % bits == 0 else _VALUES_OF_TILE
    most, period = max(entries // max(columns, 1), _WORD), max(rows_of_a_period(bits), _WORD)
    whole = math.lcm(period, block)
    sizes = [whole << k for k in range(32) if whole << k <= most]
    if not sizes:
        sizes = [period << k for k in range(32) if period << k <= most and block % (period << k) == 0] or [whole]
    even = [size for size in sizes if size >= _LEAST and rows % size == 0]
    return even[-1] if even else max(size for size in sizes if size <= 4 * _LEAST or size == sizes[0])
