"""Finished tensors in a folder beside the output, so that a run that was interrupted goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from jaxweights.files import safetensors
from jaxweights.files.mapping import Contents
from jaxweights.files.writing import Entry, Piece, replacing

_HASHED = 2**20
_JOB, _OLD = "job.json", "old"


class Spool:
    """The folder ".OUT.jaxweights" of one job, which is described in it.

    Each finished tensor is a file that appears whole or not at all. The output is put together in the folder and takes
    its place in one step; then the folder is deleted. In a `with` statement it is deleted after an error, too, but not
    after an interrupt.

    Args:
      out: the output.
      job: what the output follows from, for JSON. The files of another job are deleted.
    """

    def __init__(self, out: Path, job: Mapping[str, Any]):
        self.out = out
        self.folder = _folder(out)
        text = json.dumps(job, sort_keys=True)
        told = self.folder / _JOB
        for part in self.folder.glob(".*.part"):  # what was being written when a run was killed
            part.unlink()
        if self.folder.exists() and not (told.exists() and told.read_text("utf-8") == text):
            if not told.exists() and any(self.folder.iterdir()):
                raise ValueError(f"{self.folder} is in the way, and was not made by jaxweights: move it away")
            self._delete()
        if not self.folder.exists():
            try:
                self.folder.mkdir()
            except OSError as e:
                raise OSError(e.errno, e.strerror, str(out)) from e
        if not told.exists():
            with replacing(told) as file:
                file.write(text.encode())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and issubclass(kind, Exception) and self.folder.exists():
            restore(self.out)
            self._delete()

    def has(self, i: int) -> bool:
        """Whether tensor `i` is finished."""
        return self._file(i).exists()

    def put(self, i: int, tensors: Mapping[str, np.ndarray], about: Mapping[str, Any]) -> None:
        """Keeps what tensor `i` became, and what there is to tell of it."""
        safetensors.write(self._file(i), [Piece.of(tensors)], {"about": json.dumps(about)})

    def about(self, i: int) -> dict[str, Any]:
        """What there is to tell of tensor `i`."""
        return json.loads(str(self._read(i).metadata["about"]))

    def piece(self, i: int) -> Piece:
        """What tensor `i` became. It is read when its turn comes to be written."""
        entries = {name: Entry.of(a) for name, a in self._read(i).tensors.items()}
        return Piece(entries, lambda: self._read(i).tensors)

    def whole(self, name: str = "") -> Path:
        """Where the output is put together."""
        return self.folder / f"whole{name}"

    def finish(self, whole: Path) -> None:
        """Moves the finished output to its place and deletes the folder."""
        if self.out.is_dir():  # a folder is not replaced in one step
            os.replace(self.out, self.folder / _OLD)
        os.replace(whole, self.out)
        self._delete()

    def _delete(self) -> None:
        """Deletes the folder; what marks it as ours last, so that a run can be killed here too."""
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != _JOB:
                path.unlink()
        (self.folder / _JOB).unlink(missing_ok=True)
        self.folder.rmdir()

    def _file(self, i: int) -> Path:
        return self.folder / f"{i:06d}.safetensors"

    def _read(self, i: int) -> Contents:
        return safetensors.read(self._file(i))


def restore(out: Path) -> None:
    """Puts an old output back that a run had moved away when it was killed, before the new one took its place."""
    old = _folder(out) / _OLD
    if old.exists() and not out.exists():
        os.replace(old, out)


def _folder(out: Path) -> Path:
    return out.parent / f".{out.name}.jaxweights"


def fingerprint(files: Sequence[Path]) -> list[list[Any]]:
    """What tells files from others and from earlier versions: names, sizes, times, and a hash of their beginnings."""
    found = []
    for path in files:
        stat = path.stat()
        with open(path, "rb") as file:
            digest = hashlib.sha256(file.read(_HASHED)).hexdigest()
        found.append([str(path.resolve()), stat.st_size, stat.st_mtime_ns, digest])
    return found
