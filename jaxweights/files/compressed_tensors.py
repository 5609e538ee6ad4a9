"""Tensors of compressed-tensors, as vLLM and llm-compressor have them: packed integers, words along the inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from jaxweights.files.bits import from_stream, to_stream
from jaxweights.files.codec import Codec, Config, by_group, check_part_shape, columns, matrix_of, part, quantized
from jaxweights.techniques.quantization.array import QuantizedArray
from jaxweights.techniques.quantization.formats import Format
from jaxweights.techniques.quantization.grids import Integers
from jaxweights.techniques.quantization.scales import ScaleFormat

_LAYOUTS = (None, "pack-quantized", "mixed-precision")
_SCALES = (np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))


def _reads(parts: Mapping[str, np.ndarray], config: Config) -> bool:
    return config.get("format") in _LAYOUTS


def _read(what: str, parts: Mapping[str, np.ndarray], config: Config) -> QuantizedArray:
    """Codes (N, words), scales (N, groups) or (N, 1) or (1,), zero points (words of N, groups), the shape (N, K)."""
    packed = part(what, parts, ".weight_packed", ["i4"], 2)
    shape = tuple(part(what, parts, ".weight_shape", ["i4", "i8"], 1)[:3].tolist())  # of more, 3 tell
    if len(shape) != 2 or shape[0] != packed.shape[0] or min(shape) < 1:
        raise ValueError(f"{what}: '.weight_packed' {packed.shape} is no packed weight of shape {shape}")
    n, rows = shape
    bits = _bits(what, rows, packed.shape[1], config)
    if ".weight_scale" in parts and parts[".weight_scale"].size == 1:
        scale = part(what, parts, ".weight_scale", _SCALES, parts[".weight_scale"].ndim).reshape(1, 1)
        per_tensor = n > 1
    else:
        scale, per_tensor = columns(part(what, parts, ".weight_scale", _SCALES, 2)), False
        check_part_shape(what, ".weight_scale", scale.shape[::-1], (n, scale.shape[0]))
    n_groups = scale.shape[0]
    if not n_groups or rows % n_groups:
        raise ValueError(f"{what} has {n_groups} groups, which do not divide its {rows} inputs")
    block, half = rows // n_groups, 2 ** (bits - 1)
    zero = None
    if ".weight_zero_point" in parts:
        points = part(what, parts, ".weight_zero_point", ["i4"], 2)
        check_part_shape(what, ".weight_zero_point", points.shape, (-(-n * bits // 32), n_groups))
        zero = (from_stream(columns(points), bits, n).astype(np.int16) - half).astype(np.int8)
    elif _asymmetric(config, bits):
        raise ValueError(f"{what} has no tensor '.weight_zero_point', the quantization_config says symmetric=false")
    codes, order = from_stream(packed, bits, rows), None
    if ".weight_g_idx" in parts:
        g_idx = part(what, parts, ".weight_g_idx", ["i4", "i8"], 1)
        check_part_shape(what, ".weight_g_idx", g_idx.shape, (rows,))
        order = by_group(what, g_idx, n_groups, block)
        codes = codes if order is None else codes[:, order]
    grid = Integers(bits, -half, half - 1)
    stored = ScaleFormat(str(scale.dtype))
    format = Format(grid, None if n_groups == 1 else block, stored, zero is not None, per_tensor)
    return quantized(codes, format, scale, scale.dtype, zero=zero, order=order)


def _bits(what: str, rows: int, n_words: int, config: Config) -> int:
    """The number of bits with which so many inputs fill so many words. If there are several, the config tells."""
    fitting = [b for b in range(1, 9) if -(-rows * b // 32) == n_words]
    told = {bits for weights in _schemes(config) if type(bits := weights.get("num_bits")) is int}
    chosen = [b for b in fitting if b in told] if told else fitting
    if len(chosen) != 1:
        raise ValueError(
            f"{what} has {rows} inputs in {n_words} words, which is {fitting or 'no number of'} bits, and the "
            f"quantization_config says {sorted(told) or 'nothing'}: give the config.json of the model"
        )
    return chosen[0]


def _asymmetric(config: Config, bits: int) -> bool:
    """Whether the config says that all weights of so many bits have zero points."""
    told = [weights.get("symmetric", True) for weights in _schemes(config) if weights.get("num_bits") == bits]
    return bool(told) and not any(told)


def _schemes(config: Config) -> list[Mapping[str, Any]]:
    groups = config.get("config_groups")
    found = [g.get("weights") for g in groups.values() if isinstance(g, dict)] if isinstance(groups, dict) else []
    return [weights for weights in found if isinstance(weights, dict)]


def _write(what: str, q: QuantizedArray) -> dict[str, np.ndarray]:
    m, bits = matrix_of(what, q, "compressed-tensors"), q.format.grid.bits
    n, rows = m.codes.shape
    if q.order is not None or rows % max(m.block, 1):
        raise ValueError(
            f"{what} has {rows} inputs in blocks of {m.block}{'' if q.order is None else ' in another order'}, "
            f"compressed-tensors has whole blocks, in order: save with format='gptq', or leave format=None"
        )
    symmetric = m.zero is None and m.offset == 2 ** (bits - 1)
    if q.format.per_tensor and not symmetric:
        raise ValueError(f"{what} has one zero point for all, compressed-tensors packs one for each output or block")
    scale = m.scale if m.scale.dtype in _SCALES else m.scale.astype(np.float32)
    tensors = {
        ".weight_packed": to_stream(m.codes, bits),
        ".weight_scale": np.ascontiguousarray(scale[0, :1]) if q.format.per_tensor else columns(scale),
        ".weight_shape": np.array([n, rows], np.int64),
    }
    if not symmetric:
        zero = np.full(m.scale.shape, m.offset, np.int32) if m.zero is None else m.zero
        if np.any((zero < 0) | (zero >= 2**bits)):
            raise ValueError(
                f"{what} has zero points from {zero.min()} to {zero.max()}, {bits} bits hold 0 to {2**bits - 1}"
            )
        tensors[".weight_zero_point"] = columns(to_stream(columns(zero.astype(np.uint8)).T, bits))
    return tensors


def _config(weights: Mapping[str, QuantizedArray]) -> dict[str, Any]:
    groups: dict[str, dict[str, Any]] = {}
    for name, q in weights.items():
        n_blocks, block = q.format.blocks(q.rows)
        strategy = "tensor" if q.format.per_tensor else "channel" if n_blocks == 1 else "group"
        symmetric = q.zero is None and q.format.grid.offset > 0  # type: ignore[union-attr]
        scheme = {"num_bits": q.format.grid.bits, "type": "int", "symmetric": symmetric, "strategy": strategy}
        if strategy == "group":
            scheme["group_size"] = block
        group = next((g for g in groups.values() if g["weights"] == scheme), None)
        if group is None:
            group = groups.setdefault(f"group_{len(groups)}", {"targets": [], "weights": scheme})
        group["targets"].append(name)
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [],
    }


COMPRESSED_TENSORS = Codec(
    "compressed-tensors",
    lead=".weight_packed",
    parts=(".weight_packed", ".weight_scale", ".weight_shape", ".weight_zero_point", ".weight_g_idx"),
    replaced=".weight",
    reads=_reads,
    read=_read,
    write=_write,
    config=_config,
)
