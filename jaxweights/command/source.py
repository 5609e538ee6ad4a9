"""The tensors of a file of any kind, known by name and shape, and read one at a time."""

from __future__ import annotations

import json
import mmap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxweights.files import gguf
from jaxweights.files.load import Leaf, file_of, leaves, read
from jaxweights.files.mapping import Contents

KINDS = ".safetensors, .gguf, .safetensors.index.json, .npz, a folder with a model in safetensors, an Orbax checkpoint"
_TORCH = "load it with torch.load(path, weights_only=True), save it with safetensors.torch.save_file"
_REMEDIES = {
    **dict.fromkeys((".pt", ".pth", ".bin", ".ckpt"), _TORCH),
    ".npy": "save it with numpy.savez(path, weight=numpy.load(old))",
}
_POINTER = b"version https://git-lfs"


class Item(NamedTuple):
    """What is known of a tensor before it is read.

    Attributes:
      shape: its shape; None of a stored weight that only tells when it is read.
      dtype: its dtype; None of a stored weight.
      form: "" of a plain tensor; of a stored weight the name of its format in the file, "jaxweights" for ours.
      nbytes: bytes in the file.
    """

    shape: tuple[int, ...] | None
    dtype: np.dtype | None
    form: str
    nbytes: int


class Source(NamedTuple):
    """A model in a file.

    Attributes:
      path: as given.
      files: the files that hold it.
      metadata: of the file.
      items: what is known of each tensor, in the order of the file. A stored weight is one.
      read: gives the tensor of a name: a NumPy array, or a stored weight. The pages of the file that were read for it
        are given back, so that memory holds one tensor at a time.
    """

    path: Path
    files: tuple[Path, ...]
    metadata: Mapping[str, Any]
    items: dict[str, Item]
    read: Callable[[str], Any]


def open(path: str | Path) -> Source:
    """The model at a path. Only headers are read.

    Raises:
      ValueError: the file is damaged, or of a kind that is not read.
      OSError: it cannot be read.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder")
    try:
        return _open(path)
    except ValueError as e:
        for file in file_of(path).parent.iterdir():
            if file.name in str(e) and file.is_file() and _is_pointer(file):
                raise ValueError(f"{file.name} is a pointer of Git LFS: get the file with git lfs pull") from e
        raise


def _open(path: Path) -> Source:
    if path.suffix == ".npz":
        from jaxweights.command.npz import open_npz

        return open_npz(path)
    if path.is_dir():
        from jaxweights.command.orbax import is_orbax, open_orbax

        if is_orbax(path):
            return open_orbax(path)
    _check_kind(path)
    return _mapped(path)


def _check_kind(path: Path) -> None:
    """Raises unless a path is that of safetensors or GGUF."""
    file = file_of(path)
    if not file.exists():
        raise FileNotFoundError(f"{path} has no {file.name}. What is read: {KINDS}")
    if file.suffix not in (".safetensors", ".gguf") and not file.name.endswith(".safetensors.index.json"):
        remedy = f": {_REMEDIES[file.suffix]}" if file.suffix in _REMEDIES else ""
        raise ValueError(f"{file.name} is of no kind that is read{remedy}. What is read: {KINDS}")


def _is_pointer(path: Path) -> bool:
    """Whether Git LFS left a few lines in place of a file."""
    with path.open("rb") as file:
        return file.read(len(_POINTER)) == _POINTER


def _mapped(path: Path) -> Source:
    """A model in safetensors or GGUF, mapped into memory."""
    contents = read(path)
    found = leaves(path, contents)
    order = {name: i for i, name in enumerate(contents.tensors)}
    found = dict(sorted(found.items(), key=lambda item: min((order[t] for t in item[1].tensors), default=0)))
    maps = {id(m): m for tensor in contents.tensors.values() if (m := _map_of(tensor)) is not None}

    def read_one(name: str) -> Any:
        value = found[name].read() if found[name].form else np.array(contents.tensors[name])
        for m in maps.values():
            if hasattr(mmap, "MADV_DONTNEED"):
                m.madvise(mmap.MADV_DONTNEED)
        return value

    items = {name: _item(leaf, contents) for name, leaf in found.items()}
    return Source(path, _files(path), contents.metadata, items, read_one)


def _item(leaf: Leaf, contents: Contents) -> Item:
    tensors: list[Any] = [contents.tensors[t] for t in leaf.tensors]
    if not leaf.form:
        (tensor,) = tensors
        return Item(tensor.shape, tensor.dtype, "", tensor.nbytes)
    nbytes = sum(t.data.nbytes if isinstance(t, gguf.Blocks) else t.nbytes for t in tensors)
    shape = tensors[0].shape if tensors and isinstance(tensors[0], gguf.Blocks) else None
    return Item(shape, None, leaf.form, nbytes)


def _files(path: Path) -> tuple[Path, ...]:
    """The files that hold a model which was read."""
    path = file_of(path)
    if path.suffix != ".json":
        return (path,)
    shards = json.loads(path.read_bytes())["weight_map"].values()
    return (path, *(path.parent / name for name in dict.fromkeys(shards)))


def _map_of(tensor: Any) -> mmap.mmap | None:
    """The mapped file that a tensor is part of."""
    base: Any = tensor.data if isinstance(tensor, gguf.Blocks) else tensor
    while isinstance(base, np.ndarray | memoryview):
        base = base.base if isinstance(base, np.ndarray) else base.obj
    return base if isinstance(base, mmap.mmap) else None
