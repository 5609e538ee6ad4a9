"""Tensors of bitsandbytes in 4 bits: two codes a byte, the first in the high bits, blocks along the inputs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from jaxweights.core.axes import Reading
from jaxweights.files.bits import from_words
from jaxweights.files.codec import Codec, Config, columns, exactly, part, quantized
from jaxweights.files.mapping import check_shape
from jaxweights.files.safetensors import parse_json
from jaxweights.techniques.quantization.array import QuantizedArray
from jaxweights.techniques.quantization.formats import NF4, Format
from jaxweights.techniques.quantization.grids import Levels
from jaxweights.techniques.quantization.scales import ScaleFormat

_FP4_TWELFTHS = (0, 0.0625, 8, 12, 4, 6, 2, 3)
FP4_VALUES = tuple(float(np.float32(sign * v) / np.float32(12)) for sign in (1, -1) for v in _FP4_TWELFTHS)
"""The values of FP4 in bitsandbytes in the order of its codes. They are not those of E2M1: the second is 1/192."""
_GRIDS = {"nf4": NF4.grid, "fp4": Levels(FP4_VALUES)}
_DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
_STATE = ".quant_state.bitsandbytes__"
_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)


def _read(what: str, parts: Mapping[str, np.ndarray], kind: str) -> QuantizedArray:
    """Codes (N·K/2, 1), a scale "absmax" for each block of the flat weight, and the rest in JSON."""
    state = parse_json(f"{what}: the quant_state", part(what, parts, _STATE + kind, ["u1"], 1).tobytes())
    if not isinstance(state, dict) or state.get("quant_type") != kind:
        raise ValueError(
            f"{what}: the quant_state must be an object of the quant_type {kind!r}, got {str(state)[:200]}"
        )
    shape, block, dtype = (state.get(key) for key in ("shape", "blocksize", "dtype"))
    if dtype not in _DTYPES or block not in _BLOCKS:
        raise ValueError(
            f"{what}: dtype {str(dtype)[:200]!r} and blocksize {str(block)[:200]!r} are none of bitsandbytes"
        )
    sizes = check_shape(what, shape)
    if len(sizes) != 2 or 0 in sizes:
        raise ValueError(f"{what} has shape {sizes}, only matrices of bitsandbytes are read")
    n, rows = sizes
    if rows % block:
        raise ValueError(f"{what} has rows of {rows}, across which its blocks of {block} run: dequantize it first")
    packed = parts.get("")
    if packed is None or packed.nbytes != n * rows // 2:
        got = "none" if packed is None else f"{packed.nbytes} bytes"
        raise ValueError(f"{what}: a weight of shape {(n, rows)} has {n * rows // 2} bytes of codes, got {got}")
    data = np.ascontiguousarray(packed).reshape(-1).view(np.uint8)
    codes = np.empty((data.size, 2), np.uint8)
    codes[:, 0], codes[:, 1] = data >> 4, data & 15
    scale = _absmax(what, parts, state)
    if scale.shape != (n * rows // block,):
        raise ValueError(f"{what}: '.absmax' must have {n * rows // block} entries, got {scale.shape}")
    table = part(what, parts, ".quant_map", ["f4"], 1)
    grid = _GRIDS[kind]
    if not np.array_equal(table, np.asarray(grid.values, np.float32)):  # type: ignore[union-attr]
        if table.shape != (16,) or not np.all(np.isfinite(table)):
            raise ValueError(f"{what}: '.quant_map' must be 16 finite numbers, got shape {table.shape}")
        grid = Levels(tuple(map(float, table)))
    format = Format(grid, block, ScaleFormat("float32"))
    return quantized(codes.reshape(n, rows), format, columns(scale.reshape(n, rows // block)), _DTYPES[dtype])


def _absmax(what: str, parts: Mapping[str, np.ndarray], state: Mapping[str, Any]) -> np.ndarray:
    """The scales, float32. Double quantization is undone: it has a table and an offset of its own."""
    if "nested_blocksize" not in state:
        return part(what, parts, ".absmax", ["f4"], 1)
    codes = part(what, parts, ".absmax", ["u1"], 1)
    outer = part(what, parts, ".nested_absmax", ["f4"], 1)
    table = part(what, parts, ".nested_quant_map", ["f4"], 1)
    block, offset = state["nested_blocksize"], state.get("nested_offset")
    if type(block) is not int or block < 1 or type(offset) not in (int, float):
        raise ValueError(f"{what}: nested_blocksize={str(block)[:99]}, nested_offset={str(offset)[:99]} are no numbers")
    if table.shape != (256,) or outer.shape != (-(-codes.size // block),):
        raise ValueError(
            f"{what}: '.nested_quant_map' {table.shape} must have 256 entries, and '.nested_absmax' {outer.shape} one "
            f"for each {block} of '.absmax' {codes.shape}"
        )
    with np.errstate(invalid="ignore", over="ignore"):  # infinities in a damaged file
        return table[codes] * outer[np.arange(codes.size) // block] + np.float32(offset)


def _write(what: str, q: QuantizedArray) -> dict[str, np.ndarray]:
    kind = next((name for name, grid in _GRIDS.items() if grid == q.format.grid), None)
    r = Reading.of(q.axes, q.shape)
    rows, n = q.rows, q.words.shape[-1]
    _, block = q.format.blocks(rows)
    other = [name for name in ("zero", "minimum", "order", "input_scale") if getattr(q, name) is not None]
    if kind is None or r.batch or r.groups > 1 or other or block not in _BLOCKS or rows % block:
        raise ValueError(
            f"{what} cannot be saved for bitsandbytes, which has matrices of NF4 (or an FP4 of its own) in blocks of "
            f"32 to 4096 that divide the inputs: quantize with 'nf4', or leave format=None"
        )
    dtype = str(np.dtype(q.dtype))
    if dtype not in _DTYPES:
        raise ValueError(f"{what} is of dtype {dtype}, bitsandbytes has {', '.join(_DTYPES)}: cast it with astype")
    scale = np.broadcast_to(np.asarray(q.scale.values()), (rows // block, n))
    codes = from_words(np.asarray(q.words), 4, rows).reshape(-1, 2)
    state = {"quant_type": kind, "blocksize": block, "dtype": dtype, "shape": [n, rows]}
    return {
        "": (codes[:, :1] << 4) | codes[:, 1:],
        ".absmax": exactly(what, columns(scale), np.float32).reshape(-1),
        ".quant_map": np.asarray(_GRIDS[kind].values, np.float32),  # type: ignore[union-attr]
        _STATE + kind: np.frombuffer(json.dumps(state).encode(), np.uint8),
    }


def _config(weights: Mapping[str, QuantizedArray]) -> dict[str, Any]:
    kinds = {"nf4" if q.format.grid == NF4.grid else "fp4" for q in weights.values()}
    if len(kinds) > 1:
        raise ValueError("weights of bitsandbytes are all of NF4 or all of FP4, got both: save them apart")
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": kinds.pop(),
        "bnb_4bit_use_double_quant": False,
    }


def _codec(kind: str) -> Codec:
    def read(what: str, parts: Mapping[str, np.ndarray], config: Config) -> QuantizedArray:
        return _read(what, parts, kind)

    return Codec(
        "bitsandbytes",
        lead=_STATE + kind,
        parts=("", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", _STATE + kind),
        replaced="",
        reads=lambda parts, config: True,
        read=read,
        write=_write,
        config=_config,
    )


BITSANDBYTES_NF4, BITSANDBYTES_FP4 = _codec("nf4"), _codec("fp4")
"""Dettmers et al., QLoRA, arXiv:2305.14314, 2023."""
