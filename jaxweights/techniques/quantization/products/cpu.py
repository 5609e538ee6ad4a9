"""Products with stored weights on CPUs. The codes are read once, and no dense weight is written to memory.

A few rows of x: one fused pass. Each field of a word is turned into a float by a mask and the bits of an exponent,
without a shift or a conversion; the powers of two that are left over are multiplied into x. More rows: a loop over
tiles of the weight, each dequantized just before its product.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxweights.core.packing import planes, unpack
from jaxweights.techniques.quantization.grids import Floats, Grid, Integers, Levels
from jaxweights.techniques.quantization.products.tiles import block_sums, offsets, tiled_times

if TYPE_CHECKING:
    from jaxweights.techniques.quantization.array import QuantizedArray

_WORD = 32
_FRACTION = 23  # bits of the fraction of a float32
_USES = 15  # of an array in one fusion, beyond which XLA writes it to memory first
_ONE_PASS = 2  # rows of x up to which a pass for each is faster than the loop over tiles


def times(x: jax.Array, q: QuantizedArray) -> jax.Array:
    """x @ w for x (M, K) and the stored matrix w (K, N), whose rows are in order and have no scales of their own."""
    # In a loop with the same weight, XLA would move the dequantizing out of it if the words did not depend on x.
    x, words = lax.optimization_barrier((x, q.words))
    q, (n_blocks, block) = dataclasses.replace(q, words=words), q.format.blocks(x.shape[1])
    strip = _strip(q.format.grid, block if n_blocks > 1 else 0)
    if strip is None or x.shape[0] > _ONE_PASS:
        return tiled_times(x, q)
    y = jnp.concatenate([_one_pass(x[i : i + 1], q, strip) for i in range(x.shape[0])])
    shift = offsets(q)
    return y if shift is None else y - jnp.matmul(block_sums(x, q), shift, precision="highest")


def _strip(grid: Grid, block: int) -> int | None:
    """The number of rows that are summed in one strip of the fused pass; None if it does not do this grid and block."""
    one_plane = len(planes(grid.bits)) == 1
    if not (isinstance(grid, Integers) or (one_plane and grid.bits <= (8 if isinstance(grid, Floats) else 4))):
        return None
    strips = (_WORD, _WORD // 2) if one_plane and grid.bits > 1 else (_WORD,)
    return next((strip for strip in strips if block % strip == 0), None)


def _one_pass(x: jax.Array, q: QuantizedArray, strip: int) -> jax.Array:
    """x @ (values·scale) for one row x: whole blocks, then the rest of strips, then the rows that fill no strip."""
    rows, bits = x.shape[1], q.format.grid.bits
    n_blocks, block = q.format.blocks(rows)
    scale = q.scale.values()
    by_block = n_blocks > 1
    cuts = sorted({0, rows // block * block if by_block else 0, rows // strip * strip, rows})
    y = jnp.zeros((1, q.words.shape[1]), x.dtype)
    for start, stop in pairwise(cuts):
        words = q.words[start * bits // _WORD : -(-stop * bits // _WORD)]
        part, of_part = x[:, start:stop], scale[start // block : -(-stop // block)] if by_block else scale
        if (stop - start) % strip:
            values = q.format.grid.decode(unpack(q.words[start * bits // _WORD :], bits, stop - start))
            y += jnp.matmul(part, values, precision="highest") * of_part
        else:
            y += _strips(part, words, q.format.grid, of_part, strip)
    return y


def _strips(x: jax.Array, words: jax.Array, grid: Grid, scale: jax.Array, strip: int) -> jax.Array:
    """x @ (values·scale) for one row x. Strips divide the rows and the blocks. There is one block for each scale."""
    x, blocks = x.reshape(-1, strip), scale.shape[0]
    total = jnp.zeros((), x.dtype)
    for row, factor, value in _fields(words, grid, strip):
        total = total + x[:, row, None] * factor * value
    if blocks > 1:
        total = (total.reshape(blocks, -1, words.shape[1]) * scale[:, None]).reshape(x.shape[0], -1)
    # A product with ones: what a sum is of, XLA would not compute in one pass.
    y = jnp.matmul(jnp.ones((1, x.shape[0]), x.dtype), lax.optimization_barrier(total), precision="highest")
    return y if blocks > 1 else y * scale


def _fields(words: jax.Array, grid: Grid, strip: int) -> Iterator[tuple[int, float, jax.Array]]:
    """(row of the strip, factor, value/factor) of all fields of words (n, columns)."""
    first, of_strip = 0, strip * grid.bits // _WORD
    in_strips, uses = words.reshape(-1, of_strip, words.shape[1]), 1 + isinstance(grid, Floats)
    for size, low in planes(grid.bits):
        per_word = _WORD // size
        for row in range(strip):
            i, field = first + row // per_word, row % per_word
            # What is used once too often is taken from the same words in another way, which is slower in loops.
            word = words[i::of_strip] if (field + 1) * uses > _USES else in_strips[:, i]
            at = size * field
            if isinstance(grid, Integers):
                factor, value = _integer(word, at, size, grid.offset >> low if low + size == grid.bits else 0)
                yield row, factor * 2.0**low, value
            elif isinstance(grid, Floats):
                yield row, *_float(word, at, grid)
            else:
                assert isinstance(grid, Levels)
                yield row, 1.0, grid.decode(_shift_right(word, at) & (2**size - 1))
        first += strip // per_word


def _integer(word: jax.Array, at: int, size: int, center: int) -> tuple[float, jax.Array]:
    """(factor, value/factor) of the integer in `size` bits from bit `at` of a word, less the center.

    Field·2^k is the fraction of a float of exponent 2^23, from which 2^23 + center·2^k is subtracted: both exact.
    """
    per_fraction = _FRACTION // size * size
    word, k = _shift_right(word, at // per_fraction * per_fraction), at % per_fraction
    fraction = word & ((2**size - 1) << k)
    return 2.0**-k, _from_bits(fraction | _bits_of(2.0**_FRACTION)) - np.float32(2.0**_FRACTION + center * 2.0**k)


def _float(word: jax.Array, at: int, grid: Floats) -> tuple[float, jax.Array]:
    """(factor, value/factor) of the small float from bit `at` of a word.

    Its exponent and fraction become those of a float32 f of least exponent e. Normal numbers are f. Subnormal ones,
    without the leading 1, are 2·f − 2^(e+1), which is less than f for them alone.
    """
    magnitude_bits = grid.exponent + grid.mantissa
    exponent = 127 & ~(2**grid.exponent - 1)
    up = _FRACTION - grid.mantissa - at
    moved = word << up if up > 0 else _shift_right(word, -up)
    magnitude = moved & ((2**magnitude_bits - 1) << (_FRACTION - grid.mantissa))
    f = _from_bits(magnitude | (exponent << _FRACTION))
    value = jnp.minimum(f, 2 * f - np.float32(2.0 ** (exponent - 126)))
    if grid.n_special:
        least = (2**magnitude_bits - grid.n_special) << (_FRACTION - grid.mantissa)
        value = jnp.where(magnitude < least, value, jnp.nan)
    sign = (moved << (_WORD - 1 - _FRACTION - grid.exponent)) & np.int32(-(2**31))
    bias = 2 ** (grid.exponent - 1) - 1
    return 2.0 ** (127 - exponent - bias), _from_bits(lax.bitcast_convert_type(value, jnp.int32) ^ sign)


def _shift_right(words: jax.Array, n: int) -> jax.Array:
    return lax.shift_right_logical(words, jnp.full_like(words, n)) if n else words


def _from_bits(bits: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(bits, jnp.float32)


def _bits_of(number: float) -> int:
    return int(np.float32(number).view(np.int32))
