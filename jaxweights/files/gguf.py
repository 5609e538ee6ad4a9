"""The GGUF container: typed metadata, then tensors, plain or in blocks of codes."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jaxweights.files.mapping import Contents, Span, check_disjoint, check_shape, map_file
from jaxweights.files.writing import Entry, replacing, write_values

_PLAIN: dict[int, np.dtype] = {
    number: np.dtype(dtype)
    for number, dtype in {
        0: "<f4",
        1: "<f2",
        24: "i1",
        25: "<i2",
        26: "<i4",
        27: "<i8",
        28: "<f8",
        30: ml_dtypes.bfloat16,
    }.items()
}
_PLAIN_NUMBERS = {dtype: number for number, dtype in _PLAIN.items()}


class BlockType(NamedTuple):
    """A type whose rows are cut into blocks of codes with their scales."""

    number: int
    rows: int  # weights of a block
    nbytes: int


BLOCK_TYPES = {
    "Q4_0": BlockType(2, 32, 18),
    "Q4_1": BlockType(3, 32, 20),
    "Q5_0": BlockType(6, 32, 22),
    "Q5_1": BlockType(7, 32, 24),
    "Q8_0": BlockType(8, 32, 34),
    "Q2_K": BlockType(10, 256, 84),
    "Q3_K": BlockType(11, 256, 110),
    "Q4_K": BlockType(12, 256, 144),
    "Q5_K": BlockType(13, 256, 176),
    "Q6_K": BlockType(14, 256, 210),
    "MXFP4": BlockType(39, 32, 17),
}
_BLOCK_NAMES = {t.number: name for name, t in BLOCK_TYPES.items()}
# Types that are not read, to name them.
_OTHERS = {
    **{9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S"},
    **{22: "IQ2_S", 23: "IQ4_XS", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 40: "NVFP4"},
}

_SCALARS: dict[int, np.dtype] = {
    number: np.dtype(dtype)
    for number, dtype in {
        **{0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?"},
        **{10: "<u8", 11: "<i8", 12: "<f8"},
    }.items()
}
_SCALAR_NUMBERS = {dtype: number for number, dtype in _SCALARS.items()}
_STRING, _ARRAY = 8, 9
_MAGIC, _VERSION, _ALIGNMENT, _LONGEST_NAME, _MOST_AXES = b"GGUF", 3, 32, 63, 4


class Blocks(NamedTuple):
    """A tensor of a block type. Its last axis is cut into blocks.

    Attributes:
      type: a name in `BLOCK_TYPES`.
      shape: shape of the weight.
      data: uint8 array (*shape[:-1], blocks, bytes of a block).
    """

    type: str
    shape: tuple[int, ...]
    data: np.ndarray


class Tensor(NamedTuple):
    """A tensor to write.

    Attributes:
      type: a name in `BLOCK_TYPES`, or None for the dtype of the entry.
      shape: shape of the weight.
      entry: what the array is that holds it.
      make: gives that array.
    """

    type: str | None
    shape: tuple[int, ...]
    entry: Entry
    make: Callable[[], np.ndarray]


def read(path: Path) -> Contents:
    """The tensors of a GGUF file, mapped into memory, and its metadata. Raises a ValueError if it is damaged.

    Tensors of block types are `Blocks`. Numbers in the metadata are NumPy scalars and arrays, of the types in the file.
    """
    data = map_file(path)
    reader = _Reader(path.name, data)
    if reader.take(4) != _MAGIC:
        raise ValueError(f"{path.name} is no GGUF file: it does not start with {_MAGIC.decode()}")
    if (version := reader.integer("<u4")) not in (2, 3):
        raise ValueError(
            f"{path.name} is GGUF version {version}, of which only 2 and 3 in little-endian order are read"
        )
    n_tensors, n_fields = reader.integer("<u8"), reader.integer("<u8")
    metadata: dict[str, Any] = {}
    reader.check_count("metadata entries", n_fields, 13)
    for _ in range(n_fields):
        key = reader.string("the name of a metadata entry")
        if key in metadata:
            raise ValueError(f"{path.name} has the metadata {key!r} twice")
        metadata[key] = reader.value(f"the metadata {key!r}", reader.integer("<u4"))
    reader.check_count("tensors", n_tensors, 24)
    infos: dict[str, tuple[tuple[int, ...], int, int]] = {}
    for _ in range(n_tensors):
        name = reader.string("the name of a tensor")
        if name in infos:
            raise ValueError(f"{path.name} has the tensor {name!r} twice")
        what = f"{path.name}: tensor {name!r}"
        if (n_axes := reader.integer("<u4")) > _MOST_AXES:
            raise ValueError(f"{what} has {n_axes} axes, at most {_MOST_AXES} are read: the file is damaged")
        sizes = [reader.integer("<u8") for _ in range(n_axes)]
        infos[name] = check_shape(what, sizes[::-1]), reader.integer("<u4"), reader.integer("<u8")
    alignment = _alignment(path.name, metadata)
    start = -(-reader.at // alignment) * alignment
    tensors, spans = {}, []
    for name, (shape, number, offset) in infos.items():
        what = f"{path.name}: tensor {name!r}"
        nbytes = _nbytes(what, shape, number)
        if offset % alignment:
            raise ValueError(f"{what} starts at byte {offset}, which is no multiple of the alignment {alignment}")
        if nbytes and start + offset + nbytes > data.size:
            raise ValueError(
                f"{what} ends at byte {start + offset + nbytes} of {data.size}: the file is truncated, or its "
                f"header is wrong"
            )
        tensors[name] = _tensor(data[start + offset :][:nbytes], shape, number)
        spans.append(Span(name, offset, offset + nbytes))
    check_disjoint(path.name, spans)
    return Contents(tensors, metadata)


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Writes tensors one after the other. The file appears once it is whole."""
    alignment = _alignment(path.name, metadata)
    header = bytearray(_MAGIC + struct.pack("<IQQ", _VERSION, len(tensors), len(metadata)))
    for key, value in metadata.items():
        number, text = _encoded(f"metadata {key!r}", value)
        header += _string(key) + struct.pack("<I", number) + text
    offset = 0
    for name, tensor in tensors.items():
        check_writable(name, tensor)
        number = BLOCK_TYPES[tensor.type].number if tensor.type else _PLAIN_NUMBERS[tensor.entry.dtype]
        sizes = tensor.shape[::-1]
        header += _string(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, number, offset)
        offset += -(-tensor.entry.nbytes // alignment) * alignment
    with replacing(path) as file:
        file.write(header + bytes(-len(header) % alignment))
        for tensor in tensors.values():
            write_values(file, tensor.make())
            file.write(bytes(-tensor.entry.nbytes % alignment))


def check_writable(name: str, tensor: Tensor) -> None:
    """Raises if GGUF has no such name, shape or dtype."""
    if len(name.encode()) > _LONGEST_NAME:
        raise ValueError(
            f"{name!r} takes {len(name.encode())} bytes, a name in GGUF at most {_LONGEST_NAME}: shorten it"
        )
    if len(tensor.shape) > _MOST_AXES:
        raise ValueError(f"{name!r} has shape {tensor.shape}, a tensor of GGUF at most {_MOST_AXES} axes: reshape it")
    if tensor.type is None and tensor.entry.dtype not in _PLAIN_NUMBERS:
        dtypes = ", ".join(str(d) for d in _PLAIN_NUMBERS)
        raise ValueError(
            f"{name!r} is of dtype {tensor.entry.dtype}, which GGUF has not: convert it to one of {dtypes}"
        )


class _Reader:
    """Reads a header from the front. Whatever goes beyond the end of the file is an error."""

    def __init__(self, name: str, data: np.ndarray):
        self.name, self.data, self.at = name, data, 0

    def take(self, n: int) -> bytes:
        if n > self.data.size - self.at:
            raise ValueError(
                f"{self.name} ends within its header, at byte {self.data.size}: it is truncated or damaged"
            )
        self.at += n
        return self.data[self.at - n : self.at].tobytes()

    def integer(self, dtype: str) -> int:
        return int(np.frombuffer(self.take(int(dtype[-1])), dtype)[0])

    def string(self, what: str) -> str:
        try:
            return self.take(self.integer("<u8")).decode()
        except UnicodeDecodeError as e:
            raise ValueError(f"{self.name}: {what} is not in UTF-8") from e

    def check_count(self, what: str, n: int, least: int) -> None:
        """Raises if `n` things of at least so many bytes cannot follow."""
        if n > (self.data.size - self.at) // least:
            raise ValueError(
                f"{self.name} tells of {n} {what}, for which its {self.data.size} bytes are too few: it is truncated "
                f"or damaged"
            )

    def value(self, what: str, number: int, depth: int = 0) -> Any:
        if number == _STRING:
            return self.string(what)
        if number in _SCALARS:
            return self._numbers(what, number, 1)[0]
        if number != _ARRAY or depth == 4:
            raise ValueError(f"{self.name}: {what} is of the unknown type {number}, or nested too deeply")
        of, n = self.integer("<u4"), self.integer("<u8")
        if of in _SCALARS:
            return self._numbers(what, of, n)
        self.check_count(f"entries of {what}", n, 8)
        return [self.value(what, of, depth + 1) for _ in range(n)]

    def _numbers(self, what: str, number: int, n: int) -> np.ndarray:
        dtype = _SCALARS[number]
        self.check_count(f"entries of {what}", n, dtype.itemsize)
        raw = self.take(n * dtype.itemsize)
        if dtype == np.bool_ and max(raw, default=0) > 1:
            raise ValueError(f"{self.name}: {what} is of booleans and has bytes other than 0 and 1")
        return np.frombuffer(raw, dtype)


def _alignment(name: str, metadata: Mapping[str, Any]) -> int:
    value = metadata.get("general.alignment", _ALIGNMENT)
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise ValueError(f"{name}: general.alignment must be an integer, got {str(value)[:200]}")
    if not 8 <= value <= 2**20 or value & (value - 1):
        raise ValueError(f"{name}: general.alignment must be a power of two from 8 to {2**20}, got {value}")
    return int(value)


def _nbytes(what: str, shape: tuple[int, ...], number: int) -> int:
    if number in _PLAIN:
        return math.prod(shape) * _PLAIN[number].itemsize
    if number not in _BLOCK_NAMES:
        kinds = ", ".join(BLOCK_TYPES)
        named = _OTHERS.get(number, f"number {number}")
        raise ValueError(f"{what} is of type {named}: F32, F16, BF16, F64, I8, I16, I32, I64, {kinds} are read")
    kind = BLOCK_TYPES[_BLOCK_NAMES[number]]
    if not shape or 0 in shape or shape[-1] % kind.rows:
        raise ValueError(f"{what} has shape {shape}, {_BLOCK_NAMES[number]} needs rows of a multiple of {kind.rows}")
    return math.prod(shape) // kind.rows * kind.nbytes


def _tensor(values: np.ndarray, shape: tuple[int, ...], number: int) -> Any:
    if number in _PLAIN:
        return np.frombuffer(values, _PLAIN[number]).reshape(shape) if values.size else np.zeros(shape, _PLAIN[number])
    name = _BLOCK_NAMES[number]
    rows, nbytes = BLOCK_TYPES[name][1:]
    return Blocks(name, shape, values.reshape(*shape[:-1], shape[-1] // rows, nbytes))


def _string(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def _encoded(what: str, value: Any) -> tuple[int, bytes]:
    """(type, bytes) of a metadata value. Python integers become uint32 where they fit, floats float32."""
    if isinstance(value, str):
        return _STRING, _string(value)
    if isinstance(value, bool | int | float | np.generic):
        array = _typed(what, [value])
        return _SCALAR_NUMBERS[array.dtype], array.tobytes()
    if isinstance(value, np.ndarray) and value.ndim == 1:
        array = _typed(what, value)
        return _ARRAY, struct.pack("<IQ", _SCALAR_NUMBERS[array.dtype], len(array)) + array.tobytes()
    if not isinstance(value, list | tuple):
        raise ValueError(
            f"{what} must be a string, a number, a boolean, or a list or vector of such, got {type(value).__name__}"
        )
    if value and all(isinstance(v, bool | int | float | np.generic) for v in value):
        return _encoded(what, _typed(what, value))
    of = [_encoded(what, v) for v in value]
    if len({number for number, _ in of}) > 1:
        raise ValueError(f"{what} must be a list of values of one type, got {str(value)[:200]}")
    number = of[0][0] if of else _STRING
    return _ARRAY, struct.pack("<IQ", number, len(of)) + b"".join(text for _, text in of)


def _typed(what: str, values: Sequence[Any] | np.ndarray) -> np.ndarray:
    """Numbers as an array of a dtype that GGUF has."""
    array = np.asarray(values)
    if not isinstance(values, np.ndarray) and all(type(v) is int for v in values):
        small = np.all(array >= 0) and np.all(array < 2**32)
        array = array.astype(np.uint32) if small else array
    elif not isinstance(values, np.ndarray) and all(type(v) is float for v in values):
        array = array.astype(np.float32)
    if array.dtype not in _SCALAR_NUMBERS:
        raise ValueError(f"{what} must be numbers of a dtype that GGUF has, got {array.dtype}: {str(values)[:200]}")
    return array
