"""The safetensors container: a header in JSON, then the bytes of the tensors."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxweights.files.mapping import Contents, Span, check_disjoint, check_shape, map_file
from jaxweights.files.writing import Piece, replacing, write_values

_DTYPES: dict[str, np.dtype] = {
    name: np.dtype(dtype)
    for name, dtype in {
        "F64": "<f8",
        "F32": "<f4",
        "F16": "<f2",
        "I64": "<i8",
        "I32": "<i4",
        "I16": "<i2",
        "I8": "i1",
        "U64": "<u8",
        "U32": "<u4",
        "U16": "<u2",
        "U8": "u1",
        "C64": "<c8",
        "BOOL": "?",
        "BF16": ml_dtypes.bfloat16,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    }.items()
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_LARGEST_HEADER = 100_000_000  # bytes; the limit of the safetensors package


def read(path: Path) -> Contents:
    """The tensors of a safetensors file, mapped into memory, and its metadata. Raises a ValueError if it is damaged."""
    data = map_file(path)
    header, start = _header(path.name, data)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError(f"{path.name}: __metadata__ must map strings to strings, got {str(metadata)[:200]}")
    tensors, spans = {}, []
    for name, entry in header.items():
        what = f"{path.name}: tensor {name!r}"
        dtype, shape, begin, end = _entry(what, entry)
        if end > data.size - start:
            raise ValueError(
                f"{what} ends at byte {end} of {data.size - start}: the file is truncated, or its header is wrong"
            )
        needed = int(np.prod(shape, dtype=object)) * dtype.itemsize
        if end - begin != needed:
            raise ValueError(f"{what} has {end - begin} bytes, its shape {shape} of {dtype} needs {needed}")
        values = data[start + begin : start + end]
        if dtype == np.bool_ and np.any(values > 1):
            raise ValueError(f"{what} is of booleans and has bytes other than 0 and 1")
        tensors[name] = _as_array(values, dtype, shape)
        spans.append(Span(name, begin, end))
    check_disjoint(path.name, spans)
    used = sum(s.end - s.begin for s in spans)
    if used != data.size - start:
        raise ValueError(
            f"{path.name} has {data.size - start} bytes of tensors, its header tells of {used}: the file is damaged"
        )
    return Contents(tensors, metadata)


def write(path: Path, pieces: Sequence[Piece], metadata: Mapping[str, str]) -> None:
    """Writes tensors, each aligned to its dtype. The file appears once it is whole."""
    entries = {name: entry for piece in pieces for name, entry in piece.entries.items()}
    # The largest dtypes first, as the safetensors package does: every tensor is aligned then.
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    begin: dict[str, int] = {}
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: -item[1].dtype.itemsize):
        begin[name], end = end, end + entry.nbytes
        offsets = (begin[name], end)
        header[name] = {"dtype": dtype_name(name, entry.dtype), "shape": entry.shape, "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > _LARGEST_HEADER:
        raise ValueError(f"{path.name}: the header takes {len(text)} bytes, at most {_LARGEST_HEADER} can be read back")
    with replacing(path) as file:
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
        for piece in pieces:
            for name, values in piece.make().items():
                file.seek(8 + len(text) + begin[name])
                write_values(file, values)


def dtype_name(name: str, dtype: np.dtype) -> str:
    """The name of a dtype in the header, or an error if there is none."""
    if dtype not in _NAMES:
        raise ValueError(
            f"{name!r} is of dtype {dtype}, which safetensors has not: convert it to one of "
            f"{', '.join(str(d) for d in _NAMES)}"
        )
    return _NAMES[dtype]


def parse_json(what: str, text: bytes) -> Any:
    """JSON without repeated keys, or a ValueError."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise ValueError(f"{what} has {key!r} twice")
            found[key] = value
        return found

    def refuse(constant: str) -> Any:
        raise ValueError(f"{what} has the constant {constant}, which JSON has not")

    try:
        parsed = json.loads(text.decode(), object_pairs_hook=once, parse_constant=refuse)
        json.dumps(parsed, ensure_ascii=False).encode()  # a lone surrogate is no text
        return parsed
    except (UnicodeError, json.JSONDecodeError, RecursionError) as e:
        raise ValueError(f"{what} is not JSON in UTF-8: {e}") from e


def _header(name: str, data: np.ndarray) -> tuple[dict[str, Any], int]:
    """(the parsed header, where the tensors start)."""
    size = int(data[:8].view("<u8")[0]) if data.size >= 8 else 0
    if data.size < 8 or size > min(data.size - 8, _LARGEST_HEADER):
        raise ValueError(
            f"{name} has {data.size} bytes and a header of {size} (at most {_LARGEST_HEADER}): it is truncated, "
            f"or no safetensors file"
        )
    header = parse_json(f"the header of {name}", data[8 : 8 + size].tobytes())
    if not isinstance(header, dict):
        raise ValueError(f"the header of {name} must be a JSON object, got {type(header).__name__}")
    return header, 8 + size


def _entry(what: str, entry: Any) -> tuple[np.dtype, tuple[int, ...], int, int]:
    """(dtype, shape, begin, end) of a tensor in the header."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{what} must have a dtype, a shape and data_offsets, got {str(entry)[:200]}")
    dtype, offsets = entry["dtype"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ValueError(f"{what} has the dtype {str(dtype)[:200]!r}: {', '.join(_DTYPES)} can be read")
    shape = check_shape(what, entry["shape"])
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(o) is int for o in offsets):
        raise ValueError(f"{what}: data_offsets must be two integers, got {str(offsets)[:200]}")
    begin, end = offsets
    if not 0 <= begin <= end:
        raise ValueError(f"{what}: data_offsets must be 0 <= begin <= end, got {str(offsets)[:200]}")
    return _DTYPES[dtype], shape, begin, end


def _as_array(values: np.ndarray, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """Bytes as an array, without a copy."""
    if not values.size:
        return np.zeros(shape, dtype)
    return np.frombuffer(values, dtype).reshape(shape)
