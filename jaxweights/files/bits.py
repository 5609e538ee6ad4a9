"""Codes of a few bits in the words of files, and in those of a `QuantizedArray`. On the host, in NumPy."""

from __future__ import annotations

import numpy as np

from jaxweights.core.packing import n_words, planes, rows_of_a_period


def to_stream(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes along the last axis as int32 words without gaps, the first in the lowest bits. Zeros fill the last word.

    >>> print([hex(w) for w in to_stream(np.arange(8, dtype=np.uint8), 4)])
    ['0x76543210']
    """
    *lead, n = codes.shape
    filled = -(-n * bits // 32) * 32 // bits if 32 % bits == 0 else n
    codes = np.pad(codes.astype(np.uint8, copy=False), [(0, 0) for _ in lead] + [(0, filled - n)])
    if 8 % bits == 0:
        per_byte = codes.reshape(*lead, filled * bits // 8, 8 // bits)
        data = np.zeros(per_byte.shape[:-1], np.uint8)
        for i in range(8 // bits):
            data |= per_byte[..., i] << (bits * i)
    else:
        single = np.unpackbits(codes[..., None], axis=-1, count=bits, bitorder="little")
        data = np.packbits(single.reshape(*lead, n * bits), axis=-1, bitorder="little")
        data = np.pad(data, [(0, 0) for _ in lead] + [(0, -data.shape[-1] % 4)])
    return np.ascontiguousarray(data).view("<i4")


def from_stream(words: np.ndarray, bits: int, n: int) -> np.ndarray:
    """The first `n` codes of each row of words, uint8 (..., n)."""
    data = np.ascontiguousarray(words, "<i4").view(np.uint8)
    if 8 % bits == 0:
        codes = np.empty((*data.shape, 8 // bits), np.uint8)
        for i in range(8 // bits):
            codes[..., i] = (data >> (bits * i)) & (2**bits - 1)
        return codes.reshape(*data.shape[:-1], data.shape[-1] * (8 // bits))[..., :n]
    single = np.unpackbits(data, axis=-1, count=n * bits, bitorder="little").reshape(*data.shape[:-1], n, bits)
    return np.packbits(single, axis=-1, bitorder="little")[..., 0]


def to_words(codes: np.ndarray, bits: int) -> np.ndarray:
    """The words of a `QuantizedArray`, int32 (..., words, N), of codes (..., N, K): each unit's inputs lie together."""
    *lead, rows = codes.shape
    period = rows_of_a_period(bits)
    n = -(-rows // period)
    codes = np.pad(codes, [(0, 0) for _ in lead] + [(0, n * period - rows)])
    parts = [
        to_stream((codes >> low) & (2**size - 1), size).reshape(*lead, n, period * size // 32)
        for size, low in planes(bits)
    ]
    return np.concatenate(parts, -1).reshape(*lead, n_words(rows, bits)).swapaxes(-1, -2)


def from_words(words: np.ndarray, bits: int, rows: int) -> np.ndarray:
    """The codes, uint8 (..., N, K), of the words of a `QuantizedArray`: the inverse of `to_words`."""
    *lead, _, columns = words.shape
    period = rows_of_a_period(bits)
    n = -(-rows // period)
    words = words.swapaxes(-1, -2).reshape(*lead, columns, n, period * bits // 32)
    codes, first = np.zeros((*lead, columns, n * period), np.uint8), 0
    for size, low in planes(bits):
        count = period * size // 32
        part = words[..., first : first + count].reshape(*lead, columns, n * count)
        codes |= from_stream(part, size, n * period) << low
        first += count
    return codes[..., :rows]
