"""Checks of the file or folder that a command is to write."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path


def check_out(path: Path, out: Path, suffixes: Sequence[str], force: bool) -> None:
    """Raises unless `out` may be written: a file that ends in one of the suffixes, or a folder if "" is one of them.

    Args:
      path: the model that is read.
      out: the output.
      suffixes: what its name may end in.
      force: whether it is replaced if it exists.
    """
    if out.suffix not in suffixes:
        *most, last = [suffix for suffix in suffixes if suffix]
        folder = ", or have no suffix: a folder like FILE" if "" in suffixes else ""
        raise ValueError(f"OUT must end in {', '.join(most)} or {last}{folder}, got {out.name!r}")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"{out.parent} is no folder: make it first")
    if not out.exists():
        return
    if path.exists() and (
        os.path.samefile(path, out) or (out.is_dir() and path.resolve().is_relative_to(out.resolve()))
    ):
        raise ValueError(f"OUT {out} is FILE itself, or holds it: write to another place")
    if not force:
        raise FileExistsError(f"{out} exists: give --force to replace it")
    if out.is_dir() != (out.suffix == ""):
        raise ValueError(f"OUT {out} is {'a folder' if out.is_dir() else 'a file'}: write to another place")
