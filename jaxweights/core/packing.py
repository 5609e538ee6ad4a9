"""Codes of 1 to 8 bits, packed into 32-bit words along the rows of a matrix."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxweights.core.checks import check_integer

_ROWS = 32  # whatever the number of bits, they fill whole words


def planes(bits: int) -> list[tuple[int, int]]:
    """(bits of the plane, its lowest bit) of the parts into which a code is split: 3 bits are 2 and 1.

    >>> planes(4), planes(7)
    ([(4, 0)], [(4, 0), (2, 4), (1, 6)])
    """
    parts, low = [], 0
    for size in (8, 4, 2, 1):
        if bits & size:
            parts.append((size, low))
            low += size
    return parts


def rows_of_a_period(bits: int) -> int:
    """The number of rows that fill whole words: 32/bits where one plane holds a code, else 32."""
    return _ROWS // bits if _ROWS % bits == 0 else _ROWS


def n_words(rows: int, bits: int) -> int:
    """The number of words of a column."""
    period = rows_of_a_period(bits)
    return -(-rows // period) * period * bits // _ROWS


def pack(codes: jax.Array, bits: int) -> jax.Array:
    """Packs codes along the last axis but one.

    Every 32 rows become `bits` words: those of the plane of the most bits first. In a plane of p bits, row
    (32/p)·k + j lies in word k, at bits p·j and up. So 4 bits have row 8k + j in nibble j of word k, as in GPTQ.

    Args:
      codes: integers of 0 to 2^bits − 1, shape (..., rows, columns).
      bits: 1 to 8.

    Returns:
      int32 array (..., words, columns). The rows are padded with the code 0.

    >>> import jax.numpy as jnp
    >>> print(hex(pack(jnp.arange(8)[:, None], 4)[0, 0]))
    0x76543210
    """
    _check(codes, bits, "codes")
    *lead, rows, columns = codes.shape
    period = rows_of_a_period(bits)
    n = -(-rows // period)
    codes = jnp.pad(codes.astype(jnp.uint32), [(0, 0) for _ in lead] + [(0, n * period - rows), (0, 0)])
    codes = codes.reshape(*lead, n, period, columns)
    words = []
    for size, low in planes(bits):
        per_word = _ROWS // size
        part = (codes >> low) & jnp.uint32(2**size - 1)
        part = part.reshape(*lead, n, period // per_word, per_word, columns)
        words.append(jnp.sum(part << _shifts(size, part).astype(jnp.uint32), -2, dtype=jnp.uint32))
    joined = jnp.concatenate(words, -2) if len(words) > 1 else words[0]
    return jax.lax.bitcast_convert_type(joined.reshape(*lead, n_words(rows, bits), columns), jnp.int32)


def unpack(words: jax.Array, bits: int, rows: int) -> jax.Array:
    """The codes, int32 (..., rows, columns): the inverse of `pack`.

    >>> import jax.numpy as jnp
    >>> codes = jnp.arange(40)[:, None] % 8
    >>> bool((unpack(pack(codes, 3), 3, 40) == codes).all())
    True
    """
    _check(words, bits, "words")
    check_integer("rows", rows, 0)
    *lead, n, columns = words.shape
    if n != n_words(rows, bits):
        raise ValueError(
            f"words must have {n_words(rows, bits)} rows for {rows} codes of {bits} bits, got {words.shape}"
        )
    period = rows_of_a_period(bits)
    n = -(-rows // period)
    words = words.reshape(*lead, n, period * bits // _ROWS, columns)
    codes, first = jnp.zeros((*lead, n, period, columns), jnp.int32), 0
    for size, low in planes(bits):
        per_word = _ROWS // size
        part = words[..., first : first + period // per_word, None, :]
        first += period // per_word
        part = jax.lax.shift_right_logical(*jnp.broadcast_arrays(part, _shifts(size, part))) & (2**size - 1)
        codes = codes | part.reshape(*lead, n, period, columns) << low
    return codes.reshape(*lead, n * period, columns)[..., :rows, :]


def unpack_rows(words: jax.Array, bits: int, index: jax.Array) -> jax.Array:
    """The codes of some rows of one matrix, int32 (n, columns), without those of the others."""
    period = rows_of_a_period(bits)
    start, within = index // period * (period * bits // _ROWS), index % period
    codes, first = jnp.zeros((len(index), words.shape[-1]), jnp.int32), 0
    for size, low in planes(bits):
        per_word = _ROWS // size
        word = words[start + first + within // per_word]
        shift = jnp.broadcast_to((size * (within % per_word)).astype(jnp.int32)[:, None], word.shape)
        codes = codes | (jax.lax.shift_right_logical(word, shift) & (2**size - 1)) << low
        first += period // per_word
    return codes


def unpack_tile(words: jax.Array, bits: int, tile: jax.Array | int, size: int, rows: int) -> jax.Array:
    """The codes of the first rows of a tile of one matrix that is cut every `size` rows, int32 (rows, columns)."""
    count, start = n_words(rows, bits), tile * n_words(size, bits)
    if len(planes(bits)) == 1 or isinstance(tile, int):
        return unpack(jax.lax.dynamic_slice_in_dim(words, start, count), bits, rows)
    # Gathered, words of several planes are not fused with what unpacks them, which would be ten times slower.
    periods = words.reshape(-1, bits, words.shape[1])
    of_tile = periods[start // bits + jnp.arange(count // bits)]
    return unpack(of_tile.reshape(count, -1), bits, rows)


def _check(array: jax.Array, bits: int, name: str) -> None:
    """Raises unless there are as many bits as a code may have, and matrices of integers."""
    check_integer("bits", bits, 1, 8)
    if not hasattr(array, "dtype") or not jnp.issubdtype(array.dtype, jnp.integer):
        got = getattr(array, "dtype", type(array).__name__)
        raise TypeError(f"{name} must be an array of integers, got {got}: convert it with .astype(jnp.int32)")
    if len(array.shape) < 2:
        raise ValueError(f"{name} must be of shape (..., rows, columns), got {array.shape}: add an axis with [:, None]")


def _shifts(size: int, part: jax.Array) -> jax.Array:
    """Where each row of a word of a plane starts, of the rank of `part`."""
    shifts = size * jnp.arange(_ROWS // size, dtype=jnp.int32)
    return jnp.expand_dims(shifts, [a for a in range(part.ndim) if a != part.ndim - 2])
