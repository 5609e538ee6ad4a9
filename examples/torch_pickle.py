"""Load a legacy torch checkpoint as NumPy arrays, without torch and without executing arbitrary pickle code.

A pickle can only call what it can look up by name. This unpickler allows four names: a dict, a record of a tensor, and
two dtypes. It refuses any other. The tensor data is not in the pickle; it follows, storage by storage.
"""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

HEADER = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2)
"""The start of a legacy file: a magic number and the format version."""


class Storage(NamedTuple):
    """A flat buffer that tensors are views of, and how to find it."""

    dtype: str
    key: str
    size: int


class Tensor(NamedTuple):
    """A view of a storage: the arguments of `torch._utils._rebuild_tensor_v2`."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    requires_grad: bool
    hooks: Any


class StateDict(dict):
    """A dict with attributes: torch stores module versions in one."""


NAMES = {
    "collections.OrderedDict": StateDict,
    "torch._utils._rebuild_tensor_v2": Tensor,
    "torch.FloatStorage": "<f4",
    "torch.LongStorage": "<i8",
}


class Reader(pickle.Unpickler):
    """An unpickler that allows only these names."""

    def find_class(self, module: str, name: str) -> Any:
        found = NAMES.get(f"{module}.{name}")
        if found is None:
            raise pickle.UnpicklingError(f"the file asks for {module}.{name}, which no list of tensors needs: refused")
        return found

    def persistent_load(self, pid: Any) -> Storage:
        kind, dtype, key, _, size, view = pid
        if kind != "storage" or view is not None:
            raise pickle.UnpicklingError(f"the file asks for {pid!r}, which is no plain storage: refused")
        return Storage(dtype, key, size)


def load(path: str | Path) -> dict[str, np.ndarray]:
    """Returns {name: array} of a file written by `torch.save(model.state_dict(), path)` before torch 1.6."""
    with open(path, "rb") as file:
        if file.read(len(HEADER)) != HEADER:
            raise ValueError(f"{path} is no legacy torch checkpoint: save it with _use_new_zipfile_serialization=False")
        if not Reader(file).load()["little_endian"]:
            raise ValueError(f"{path} was written by a big-endian machine")
        tensors: dict[str, Tensor] = Reader(file).load()
        keys: list[str] = Reader(file).load()
        dtypes = {t.storage.key: t.storage.dtype for t in tensors.values()}
        storages = {key: _read(file, dtypes[key]) for key in keys}
    return {name: _view(name, t, storages[t.storage.key]) for name, t in tensors.items()}


def _read(file: BinaryIO, dtype: str) -> np.ndarray:
    """Reads the next storage: its length, then its data."""
    size = int.from_bytes(file.read(8), "little")
    data = file.read(size * np.dtype(dtype).itemsize)
    return np.frombuffer(data, dtype, count=size)


def _view(name: str, tensor: Tensor, numbers: np.ndarray) -> np.ndarray:
    row_major = tuple(math.prod(tensor.shape[i + 1 :]) for i in range(len(tensor.shape)))
    if tensor.strides != row_major:
        raise ValueError(f"{name} has strides {tensor.strides}, which are not row-major: call .contiguous() on it")
    return numbers[tensor.offset : tensor.offset + math.prod(tensor.shape)].reshape(tensor.shape)
