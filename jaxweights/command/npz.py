"""Arrays in .npz files of NumPy, one at a time. Pickles are not read."""

from __future__ import annotations

import contextlib
import lzma
import math
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from numpy.lib import format as npy

from jaxweights.command.source import Item, Source
from jaxweights.files.mapping import check_shape

_DAMAGE = (
    *(zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, EOFError, NotImplementedError, RuntimeError),
    *(SyntaxError, tokenize.TokenError, TypeError, ValueError, OverflowError),
)
_MOST = 1032
"""Bytes that one byte of a deflated member becomes at most."""


def open_npz(path: Path) -> Source:
    """The arrays of a .npz file. Only their headers are read. Raises a ValueError if it is damaged."""
    with _readable(path), zipfile.ZipFile(path) as archive:
        members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        if len(members) < len(archive.infolist()):
            raise ValueError("it has two arrays of one name")
        items = {name: _item(archive, info) for name, info in members.items()}

    def read(name: str) -> Any:
        with _readable(path), zipfile.ZipFile(path) as archive, archive.open(members[name]) as file:
            return npy.read_array(file, allow_pickle=False)

    return Source(path, (path,), {}, items, read)


def _item(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Item:
    """The header of an array, or an error if the bytes of the member cannot hold it."""
    what = f"the array {info.filename!r}"
    with archive.open(info) as file:
        version = npy.read_magic(file)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"{what} is of version {version} of NumPy's format, 1.0 and 2.0 are read")
        header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, _, dtype = header(file)
        begin = file.tell()
    if dtype.hasobject:
        raise ValueError(f"{what} is of Python objects, which would be run: save arrays of numbers")
    shape = check_shape(what, shape)
    needed = math.prod(shape) * dtype.itemsize
    if info.file_size - begin != needed or info.file_size > info.compress_size * _MOST + _MOST:
        raise ValueError(f"{what} needs {needed} bytes for shape {shape} of {dtype}, the file has other ones")
    return Item(shape, dtype, "", needed)


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Makes one kind of error of what damage leads to."""
    try:
        yield
    except (*_DAMAGE, OSError) as e:
        if isinstance(e, OSError) and e.filename is not None:  # it cannot be opened
            raise
        raise ValueError(f"{path.name} is damaged, or no .npz file: {str(e)[:300]}") from e
