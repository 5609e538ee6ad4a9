"""Tensors of AWQ: 4 bits, words along the outputs, in an order that suits its kernels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxweights.files.codec import Codec, Config, agree, check_part_shape, columns, exactly, matrix_of, part, quantized
from jaxweights.techniques.quantization.array import QuantizedArray
from jaxweights.techniques.quantization.formats import Format
from jaxweights.techniques.quantization.grids import Integers
from jaxweights.techniques.quantization.scales import ScaleFormat

_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the column whose code is in nibble i of a word


def _reads(parts: Mapping[str, np.ndarray], config: Config) -> bool:
    method = config.get("quant_method")
    if method is not None:
        return method == "awq"
    qweight, scales = parts[".qweight"], parts.get(".scales")
    return scales is not None and qweight.ndim == scales.ndim == 2 and qweight.shape[1] * 8 == scales.shape[1]


def _read(what: str, parts: Mapping[str, np.ndarray], config: Config) -> QuantizedArray:
    """Codes (K, N/8), zero points (groups, N/8), scales (groups, N)."""
    qweight = part(what, parts, ".qweight", ["i4"], 2)
    scales = part(what, parts, ".scales", ["f2"], 2)
    qzeros = part(what, parts, ".qzeros", ["i4"], 2)
    rows, n = qweight.shape[0], qweight.shape[1] * 8
    n_groups = scales.shape[0]
    check_part_shape(what, ".scales", scales.shape, (n_groups, n))
    check_part_shape(what, ".qzeros", qzeros.shape, (n_groups, n // 8))
    if not scales.size or not rows or rows % n_groups:
        raise ValueError(f"{what} has {n_groups} groups, which do not divide its {rows} inputs")
    block = rows // n_groups
    if (version := config.get("version", "gemm")) != "gemm":
        raise ValueError(f"{what} is in the version {str(version)[:200]!r} of AWQ, of which only 'gemm' is read")
    agree(what, config, "bits", 4)
    if config.get("group_size") != -1 or n_groups != 1:
        agree(what, config, "group_size", block)
    zeros = _unpack(qzeros).astype(np.int8) - np.int8(8)
    format = Format(Integers(4, -8, 7), None if n_groups == 1 else block, ScaleFormat("float16"), True)
    return quantized(columns(_unpack(qweight)), format, scales, np.float16, zero=zeros)


def _write(what: str, q: QuantizedArray) -> dict[str, np.ndarray]:
    m = matrix_of(what, q, "AWQ")
    n, rows = m.codes.shape
    if q.format.grid.bits != 4 or n % 8 or rows % max(m.block, 1) or q.order is not None:
        raise ValueError(
            f"{what} has {q.format.grid.bits} bits, {rows} inputs in blocks of {m.block} and {n} outputs"
            f"{'' if q.order is None else ' in another order'}; AWQ has 4 bits, whole blocks, a multiple of 8 outputs, "
            f"and the inputs in order: save with format='gptq', or leave format=None"
        )
    zero = np.full(m.scale.shape, m.offset, np.int32) if m.zero is None else m.zero
    if np.any((zero < 0) | (zero > 15)):
        raise ValueError(f"{what} has zero points from {zero.min()} to {zero.max()}, AWQ holds 0 to 15")
    return {
        ".qweight": _pack(columns(m.codes)),
        ".qzeros": _pack(zero.astype(np.uint8)),
        ".scales": exactly(what, m.scale, np.float16),
    }


def _config(weights: Mapping[str, QuantizedArray]) -> dict[str, Any]:
    blocks = {q.format.block or -1 for q in weights.values()}
    if len(blocks) > 1:
        raise ValueError(f"weights of AWQ share a block, got {sorted(blocks)}")
    return {"quant_method": "awq", "bits": 4, "group_size": blocks.pop(), "zero_point": True, "version": "gemm"}


def _unpack(words: np.ndarray) -> np.ndarray:
    """int32 (..., N/8) as codes, uint8 (..., N)."""
    codes = np.empty((*words.shape, 8), np.uint8)
    unsigned = np.ascontiguousarray(words, "<i4").view("<u4")
    for i, column in enumerate(_ORDER):
        codes[..., column] = (unsigned >> (4 * i)) & 15
    return codes.reshape(*words.shape[:-1], words.shape[-1] * 8)


def _pack(codes: np.ndarray) -> np.ndarray:
    """The inverse of `_unpack`."""
    columns = codes.reshape(*codes.shape[:-1], codes.shape[-1] // 8, 8).astype("<u4")
    words = np.zeros(columns.shape[:-1], "<u4")
    for i, column in enumerate(_ORDER):
        words |= columns[..., column] << (4 * i)
    return words.view("<i4")


AWQ = Codec(
    "awq",
    lead=".qweight",
    parts=(".qweight", ".qzeros", ".scales"),
    replaced=".weight",
    reads=_reads,
    read=_read,
    write=_write,
    config=_config,
)
"""Lin et al., AWQ, arXiv:2306.00978, 2023."""
