"""Tensors of GPTQ: words along the inputs, zero points packed along the outputs, groups in any order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxweights.files.bits import from_stream, to_stream
from jaxweights.files.codec import (
    Codec,
    Config,
    agree,
    by_group,
    check_part_shape,
    columns,
    exactly,
    matrix_of,
    part,
    quantized,
)
from jaxweights.techniques.quantization.array import QuantizedArray
from jaxweights.techniques.quantization.formats import Format
from jaxweights.techniques.quantization.grids import Integers
from jaxweights.techniques.quantization.scales import ScaleFormat

_BITS = (2, 3, 4, 8)


def _reads(parts: Mapping[str, np.ndarray], config: Config) -> bool:
    method = config.get("quant_method")
    if method is not None:
        return method == "gptq"
    qweight, scales = parts[".qweight"], parts.get(".scales")
    of_awq = scales is not None and qweight.ndim == scales.ndim == 2 and qweight.shape[1] * 8 == scales.shape[1]
    return not of_awq


def _read(what: str, parts: Mapping[str, np.ndarray], config: Config) -> QuantizedArray:
    """Codes (K·bits/32, N), zero points (groups, N·bits/32) less one in version 1, scales (groups, N), g_idx (K,)."""
    qweight = part(what, parts, ".qweight", ["i4"], 2)
    qzeros = part(what, parts, ".qzeros", ["i4"], 2)
    scales = part(what, parts, ".scales", ["f2"], 2)
    n_groups, n = scales.shape
    bits = next((b for b in _BITS if n * b == qzeros.shape[1] * 32), None)
    if bits is None or not scales.size or not qweight.size or qweight.shape[0] * 32 % bits:
        raise ValueError(
            f"{what}: '.qweight' {qweight.shape}, '.qzeros' {qzeros.shape} and '.scales' {scales.shape} fit no "
            f"number of bits among {', '.join(map(str, _BITS))}"
        )
    agree(what, config, "bits", bits)
    rows = qweight.shape[0] * 32 // bits
    check_part_shape(what, ".qweight", qweight.shape, (rows * bits // 32, n))
    check_part_shape(what, ".qzeros", qzeros.shape, (n_groups, qzeros.shape[1]))
    block = _block(what, rows, n_groups, config)
    g_idx = part(what, parts, ".g_idx", ["i4", "i8"], 1) if ".g_idx" in parts else None
    order = None
    if g_idx is not None:
        check_part_shape(what, ".g_idx", g_idx.shape, (rows,))
        order = by_group(what, g_idx, n_groups, block)
    codes = from_stream(columns(qweight), bits, rows)
    if order is not None:
        codes = codes[:, order]
    half = 2 ** (bits - 1)
    layout = config.get("checkpoint_format", "gptq")
    if layout not in ("gptq", "gptq_v2"):
        raise ValueError(
            f"{what} is in the layout {str(layout)[:200]!r} of GPTQ, of which 'gptq' and 'gptq_v2' are read"
        )
    version_1 = layout == "gptq"
    zeros = from_stream(qzeros, bits, n).astype(np.int16) + version_1 - half
    zero_point = bool(np.any(zeros))
    if np.any(zeros > 127):
        raise ValueError(f"{what}: '.qzeros' has the zero point 256, which is no code of 8 bits")
    grid = Integers(bits, -half, half - 1)
    format = Format(grid, None if n_groups == 1 else block, ScaleFormat("float16"), zero_point)
    return quantized(codes, format, scales, np.float16, zero=zeros.astype(np.int8) if zero_point else None, order=order)


def _block(what: str, rows: int, n_groups: int, config: Config) -> int:
    """The inputs of a group."""
    size = config.get("group_size")
    if type(size) is int and not config.get("dynamic"):
        block = rows if size == -1 else size
        if block < 1 or -(-rows // block) != n_groups:
            raise ValueError(f"{what} has {n_groups} groups of its {rows} inputs, group_size={size} does not fit")
        return block
    return -(-rows // n_groups)


def _write(what: str, q: QuantizedArray, version: int) -> dict[str, np.ndarray]:
    m, bits = matrix_of(what, q, "GPTQ"), q.format.grid.bits
    n, rows = m.codes.shape
    if bits not in _BITS:
        raise ValueError(f"{what} has {bits} bits, GPTQ has {', '.join(map(str, _BITS))}: leave format=None")
    if rows * bits % 32 or n * bits % 32:
        raise ValueError(
            f"{what} has {rows} inputs and {n} outputs, GPTQ has multiples of {32 // bits if 32 % bits == 0 else 32}: "
            f"pad the weight"
        )
    zero = np.full(m.scale.shape, m.offset, np.int32) if m.zero is None else m.zero
    stored = zero - (version == 1)
    if np.any((stored < 0) | (stored >= 2**bits)):
        raise ValueError(
            f"{what} has zero points from {zero.min()} to {zero.max()}, GPTQ version {version} holds "
            f"{int(version == 1)} to {2**bits - 1 + (version == 1)}: save with format='gptq_v2'"
        )
    return {
        ".qweight": columns(to_stream(m.codes, bits)),
        ".qzeros": to_stream(stored.astype(np.uint8), bits),
        ".scales": exactly(what, m.scale, np.float16),
        ".g_idx": m.group,
    }


def _config(weights: Mapping[str, QuantizedArray], version: int) -> dict[str, Any]:
    formats = {(q.format.grid.bits, q.format.block or -1) for q in weights.values()}
    bits, block = formats.pop()
    if formats:
        raise ValueError(f"weights of GPTQ share a number of bits and a block, got {[(bits, block), *formats]}")
    return {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": block,
        "desc_act": any(q.order is not None for q in weights.values()),
        "sym": all(q.zero is None for q in weights.values()),
        "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
    }


def _codec(version: int) -> Codec:
    return Codec(
        "gptq" if version == 1 else "gptq_v2",
        lead=".qweight",
        parts=(".qweight", ".qzeros", ".scales", ".g_idx"),
        replaced=".weight",
        reads=_reads,
        read=_read,
        write=lambda what, q: _write(what, q, version),
        config=lambda weights: _config(weights, version),
    )


GPTQ, GPTQ_V2 = _codec(1), _codec(2)
"""Frantar et al., GPTQ, arXiv:2210.17323, 2022. Version 1 stores zero points less one, version 2 as they are."""
