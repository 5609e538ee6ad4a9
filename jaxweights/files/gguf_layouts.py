"""Where the codes and scales lie in the bytes of each block type of GGUF."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from jaxweights.techniques.quantization.formats import MXFP4, Format
from jaxweights.techniques.quantization.grids import Integers
from jaxweights.techniques.quantization.scales import ScaleFormat


class Fields(NamedTuple):
    """What blocks hold. Arrays (..., blocks of the type, entries).

    Attributes:
      codes: uint8, one for each weight.
      scale: of the dtype of the format.
      outer: float16 factor of the scales, or None.
      minimum: like `scale`, or None. It is subtracted.
      minimum_outer: its factor.
    """

    codes: np.ndarray
    scale: np.ndarray
    outer: np.ndarray | None = None
    minimum: np.ndarray | None = None
    minimum_outer: np.ndarray | None = None


class Layout(NamedTuple):
    """A block type.

    Attributes:
      format: of its weights.
      split: bytes as fields.
      join: the inverse.
      has_minimum: whether there is one.
      scales: the least and the greatest code of a scale and a minimum, if they are integers.
    """

    format: Format
    split: Callable[[np.ndarray], Fields]
    join: Callable[[Fields], np.ndarray]
    has_minimum: bool = False
    scales: tuple[int, int] | None = None


def _halves(data: np.ndarray) -> np.ndarray:
    """Nibbles (..., n) as codes (..., 2n): the low ones, then the high ones."""
    return np.concatenate([data & 15, data >> 4], -1)


def _join_halves(codes: np.ndarray) -> np.ndarray:
    low, high = np.split(codes, 2, -1)
    return low | (high << 4)


def _planes(data: np.ndarray, bits: int) -> np.ndarray:
    """Bytes (..., n) as codes of so few bits (..., n·8/bits): the lowest bits of all bytes, then the next."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    codes = data[..., None, :] >> shifts & (2**bits - 1)
    return codes.reshape(*data.shape[:-1], data.shape[-1] * len(shifts))


def _join_planes(codes: np.ndarray, bits: int) -> np.ndarray:
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    split = codes.reshape(*codes.shape[:-1], len(shifts), codes.shape[-1] // len(shifts))
    return np.bitwise_or.reduce(split << shifts, -2)


def _by(codes: np.ndarray, n: int, change: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """`change` applied to each of `n` equal parts of the last axis, joined."""
    changed = change(codes.reshape(*codes.shape[:-1], n, codes.shape[-1] // n))
    return changed.reshape(*codes.shape[:-1], -1)


def _floats(data: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(data).view("<f2")


def _bytes(values: np.ndarray | None) -> np.ndarray:
    assert values is not None
    return np.ascontiguousarray(values).view(np.uint8)


def _simple(low: int, high: int, bits: int, has_minimum: bool = False) -> Layout:
    """32 weights: a scale, maybe a minimum, maybe the fifth bits in 4 bytes, and nibbles, or bytes with a sign."""
    n_halves = 1 + has_minimum
    start = 2 * n_halves

    def split(data: np.ndarray) -> Fields:
        scale, minimum = _floats(data[..., :2]), -_floats(data[..., 2:4]) if has_minimum else None
        if bits == 8:
            return Fields(data[..., start:] ^ 128, scale, None, minimum)
        codes = _halves(data[..., -16:])
        if bits == 5:
            codes = codes | np.unpackbits(data[..., start : start + 4], axis=-1, bitorder="little") << 4
        return Fields(codes, scale, None, minimum)

    def join(fields: Fields) -> np.ndarray:
        parts = [_bytes(fields.scale)]
        if fields.minimum is not None:
            parts.append(_bytes(-fields.minimum))
        if bits == 5:
            parts.append(np.packbits(fields.codes >> 4, axis=-1, bitorder="little"))
        parts.append(fields.codes ^ 128 if bits == 8 else _join_halves(fields.codes & 15))
        return np.concatenate(parts, -1)

    return Layout(Format(Integers(bits, low, high), 32, ScaleFormat("float16")), split, join, has_minimum)


def _split_mxfp4(data: np.ndarray) -> Fields:
    return Fields(_halves(data[..., 1:]), data[..., :1])


def _join_mxfp4(fields: Fields) -> np.ndarray:
    return np.concatenate([fields.scale, _join_halves(fields.codes)], -1)


def _split_q2_k(data: np.ndarray) -> Fields:
    """16 scales in low and minima in high nibbles, codes of 2 bits in 2 times 32 bytes, the two factors."""
    codes = _by(data[..., 16:80], 2, lambda part: _planes(part, 2))
    scales, floats = data[..., :16], _floats(data[..., 80:])
    return Fields(codes, scales & 15, floats[..., :1], scales >> 4, floats[..., 1:])


def _join_q2_k(fields: Fields) -> np.ndarray:
    assert fields.minimum is not None
    codes = _by(fields.codes, 2, lambda part: _join_planes(part, 2))
    scales = fields.scale | (fields.minimum << 4)
    return np.concatenate([scales, codes, _bytes(fields.outer), _bytes(fields.minimum_outer)], -1)


def _split_q3_k(data: np.ndarray) -> Fields:
    """The third bits in 32 bytes, the first two in 2 times 32, 16 scales of 6 bits less 32, their factor."""
    codes = _by(data[..., 32:96], 2, lambda part: _planes(part, 2)) | _planes(data[..., :32], 1) << 2
    scale = _halves(data[..., 96:104]) | _planes(data[..., 104:108], 2) << 4
    return Fields(codes, scale.astype(np.int8) - np.int8(32), _floats(data[..., 108:]))


def _join_q3_k(fields: Fields) -> np.ndarray:
    scale = (fields.scale + np.int8(32)).astype(np.uint8)
    codes = _by(fields.codes & 3, 2, lambda part: _join_planes(part, 2))
    scales = [_join_halves(scale & 15), _join_planes(scale >> 4, 2)]
    return np.concatenate([_join_planes(fields.codes >> 2, 1), codes, *scales, _bytes(fields.outer)], -1)


def _split_k(bits: int, data: np.ndarray) -> Fields:
    """Q4_K and Q5_K: two factors, 8 scales and 8 minima of 6 bits, maybe fifth bits, 4 times 64 nibbles.

    Bytes 0 to 3 and 4 to 7 of the scales have the low 6 bits for the first 4 scales and minima. The others have their
    low 4 bits in bytes 8 to 11, the scale's lowest, and their high 2 bits in the high bits of the first 8.
    """
    packed, first = data[..., 4:16], data[..., 4:8]
    second, low = packed[..., 4:8], packed[..., 8:]
    scale = np.concatenate([first & 63, (low & 15) | (first >> 6 << 4)], -1)
    minimum = np.concatenate([second & 63, (low >> 4) | (second >> 6 << 4)], -1)
    codes = _by(data[..., -128:], 4, _halves)
    if bits == 5:
        codes = codes | _planes(data[..., 16:48], 1) << 4
    return Fields(codes, scale, _floats(data[..., :2]), minimum, _floats(data[..., 2:4]))


def _join_k(bits: int, fields: Fields) -> np.ndarray:
    scale, minimum = fields.scale, fields.minimum
    assert minimum is not None
    first = scale[..., :4] | (scale[..., 4:] >> 4 << 6)
    second = minimum[..., :4] | (minimum[..., 4:] >> 4 << 6)
    low = (scale[..., 4:] & 15) | (minimum[..., 4:] << 4)
    parts = [_bytes(fields.outer), _bytes(fields.minimum_outer), first, second, low]
    if bits == 5:
        parts.append(_join_planes(fields.codes >> 4, 1))
    return np.concatenate([*parts, _by(fields.codes & 15, 4, _join_halves)], -1)


def _k(bits: int) -> Layout:
    format = Format(Integers(bits, 0, 2**bits - 1), 32, ScaleFormat("uint8", 8))
    return Layout(format, lambda data: _split_k(bits, data), lambda fields: _join_k(bits, fields), True, (0, 63))


def _split_q6_k(data: np.ndarray) -> Fields:
    """Low 4 bits in 2 times 64 bytes, high 2 bits in 2 times 32, 16 scales, their factor."""
    codes = _by(data[..., :128], 2, _halves) | _by(data[..., 128:192], 2, lambda part: _planes(part, 2)) << 4
    return Fields(codes, np.ascontiguousarray(data[..., 192:208]).view(np.int8), _floats(data[..., 208:]))


def _join_q6_k(fields: Fields) -> np.ndarray:
    low = _by(fields.codes & 15, 2, _join_halves)
    high = _by(fields.codes >> 4, 2, lambda part: _join_planes(part, 2))
    return np.concatenate([low, high, _bytes(fields.scale), _bytes(fields.outer)], -1)


_Q2_K, _Q3_K, _Q6_K = (
    Format(Integers(bits, low, 2**bits + low - 1), 16, ScaleFormat(dtype, 16))
    for bits, low, dtype in ((2, 0, "uint8"), (3, -4, "int8"), (6, -32, "int8"))
)
LAYOUTS = {
    "Q4_0": _simple(-8, 7, 4),
    "Q4_1": _simple(0, 15, 4, has_minimum=True),
    "Q5_0": _simple(-16, 15, 5),
    "Q5_1": _simple(0, 31, 5, has_minimum=True),
    "Q8_0": _simple(-128, 127, 8),
    "Q2_K": Layout(_Q2_K, _split_q2_k, _join_q2_k, True, (0, 15)),
    "Q3_K": Layout(_Q3_K, _split_q3_k, _join_q3_k, False, (-32, 31)),
    "Q4_K": _k(4),
    "Q5_K": _k(5),
    "Q6_K": Layout(_Q6_K, _split_q6_k, _join_q6_k, False, (-128, 127)),
    "MXFP4": Layout(MXFP4, _split_mxfp4, _join_mxfp4),
}
