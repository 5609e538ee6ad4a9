"""Files that appear whole or not at all, and tensors that are made when they are written."""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

import jax
import numpy as np


class Entry(NamedTuple):
    """What a header tells of a tensor."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @classmethod
    def of(cls, array: jax.Array | np.ndarray) -> Entry:
        """The entry of an array."""
        return cls(tuple(array.shape), np.dtype(array.dtype))

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return math.prod(self.shape) * self.dtype.itemsize


class Piece(NamedTuple):
    """Tensors that are made together, when their turn comes to be written: one piece at a time is in memory.

    Attributes:
      entries: what they are, by name.
      make: gives them, by the same names.
    """

    entries: dict[str, Entry]
    make: Callable[[], Mapping[str, np.ndarray]]

    @classmethod
    def of(cls, arrays: Mapping[str, jax.Array | np.ndarray]) -> Piece:
        """The piece of arrays, which are fetched from their devices when they are written."""
        entries = {name: Entry.of(a) for name, a in arrays.items()}
        return cls(entries, lambda: {name: np.asarray(a) for name, a in arrays.items()})


def write_values(file: BinaryIO, values: np.ndarray) -> None:
    """Writes an array in C order, the lowest byte of each number first."""
    little = values.dtype.newbyteorder("<") if values.dtype.kind in "iufc" else values.dtype
    flat = np.ascontiguousarray(values, little).reshape(-1)
    file.write(flat.view(np.uint8).data)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of `path` once it is whole. An error leaves what was there as it was."""
    folder = path.parent
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder: make it first")
    descriptor, name = tempfile.mkstemp(dir=folder, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise


def _umask() -> int:
    """The mask of the permissions of new files. It can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
