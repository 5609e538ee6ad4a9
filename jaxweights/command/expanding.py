"""Makes plain arrays of the stored weights of a file, tensor by tensor."""

from __future__ import annotations

import functools
import json
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxweights.command import source
from jaxweights.command.assemble import ORIGINAL, RECIPE, nodes_of
from jaxweights.command.output import check_out
from jaxweights.command.progress import bar
from jaxweights.core.stored import is_stored
from jaxweights.files import gguf, safetensors
from jaxweights.files.load import CONFIG, OURS
from jaxweights.files.writing import Entry, Piece, replacing
from jaxweights.models.recipe import SCALES


class Array(NamedTuple):
    """An array to write."""

    name: str
    entry: Entry
    make: Callable[[], np.ndarray]


def expand(path: Path, out: Path, *, force: bool = False) -> None:
    """Writes the arrays of the model at `path` to `out`, and says so."""
    check_out(path, out, tuple(_WRITERS), force)
    model = source.open(path)
    original = original_of(model.metadata)
    with bar("expand", sum(item.nbytes for item in model.items.values())) as advance:
        arrays = [_array(model, name, original.get(name, {}), out.suffix, advance) for name in model.items]
        if repeated := [name for name, n in Counter(a.name for a in arrays).items() if n > 1]:
            raise ValueError(f"the metadata {ORIGINAL!r} gives two arrays the name {repeated[0]!r}")
        _WRITERS[out.suffix](out, arrays, _plain(model.metadata))
    stored = sum(item.form != "" for item in model.items.values())
    print(f"{out}: {len(arrays)} arrays, {stored} of them were stored; {out.stat().st_size:,} bytes")


def original_of(metadata: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What `compress` noted of the weights of the model that it read, by the names in its output."""
    if ORIGINAL not in metadata:
        return {}
    what = f"the metadata {ORIGINAL!r}"
    found = safetensors.parse_json(what, str(metadata[ORIGINAL]).encode())
    kinds = {"name": str, "dtype": str, "transposed": bool}
    if not isinstance(found, dict) or not all(isinstance(told, dict) for told in found.values()):
        raise ValueError(f"{what} must be {{name: object}}, got {str(found)[:200]}")
    for name, told in found.items():
        for key, value in told.items():
            known = isinstance(value, kinds.get(key, ())) and (key != "dtype" or value in SCALES)
            if not known:
                raise ValueError(f"{what} tells {key[:99]!r} = {str(value)[:99]} of {name!r}, which has no meaning")
    return found


def _array(
    model: source.Source, name: str, told: Mapping[str, Any], suffix: str, advance: Callable[[int], None]
) -> Array:
    """A tensor of the model as an array that is made when its turn comes."""
    item = model.items[name]

    def read() -> np.ndarray:
        leaf = model.read(name)
        if is_stored(leaf):
            leaf = np.asarray(leaf.todense())
        if told.get("transposed"):
            leaf = leaf.swapaxes(-1, -2)
        dtype = np.dtype(told.get("dtype", leaf.dtype))
        if suffix == ".npz" and dtype.kind == "V":
            dtype = np.dtype(np.float32)
        return np.asarray(leaf).astype(dtype, copy=False)

    def make() -> np.ndarray:
        values = read()
        advance(item.nbytes)
        return values

    entry = Entry(item.shape, item.dtype) if item.shape is not None and item.dtype is not None else None
    if entry is None or told or (suffix == ".npz" and entry.dtype.kind == "V"):
        entry = Entry.of(read())  # only reading tells
    return Array(told.get("name", name), entry, make)


def _plain(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata of a model of plain arrays: what was said of stored weights is left out."""
    plain = {key: value for key, value in metadata.items() if key not in (OURS, CONFIG, ORIGINAL, RECIPE)}
    if nodes := nodes_of(metadata):
        plain[OURS] = json.dumps({"version": 1, "nodes": nodes})
    return plain


def _write_safetensors(out: Path, arrays: Sequence[Array], metadata: Mapping[str, Any]) -> None:
    pieces = [Piece({a.name: a.entry}, functools.partial(_named, a)) for a in arrays]
    safetensors.write(out, pieces, {key: value for key, value in metadata.items() if isinstance(value, str)})


def _named(array: Array) -> dict[str, np.ndarray]:
    return {array.name: array.make()}


def _write_gguf(out: Path, arrays: Sequence[Array], metadata: Mapping[str, Any]) -> None:
    tensors = {a.name: gguf.Tensor(None, a.entry.shape, a.entry, a.make) for a in arrays}
    gguf.write(out, tensors, metadata)


def _write_npz(out: Path, arrays: Sequence[Array], metadata: Mapping[str, Any]) -> None:
    with replacing(out) as file, zipfile.ZipFile(file, "w") as archive:
        for a in arrays:
            with archive.open(zipfile.ZipInfo(f"{a.name}.npy"), "w", force_zip64=True) as member:
                np.lib.format.write_array(member, a.make(), allow_pickle=False)


_WRITERS = {".safetensors": _write_safetensors, ".gguf": _write_gguf, ".npz": _write_npz}
