"""Checkpoints of Orbax, one array at a time."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jaxweights.command.source import Item, Source
from jaxweights.files.mapping import check_shape

_MARK = "_METADATA"


def is_orbax(path: Path) -> bool:
    """Whether a folder is a checkpoint of Orbax: a tree, a step with trees in it, or a run with steps in it."""
    return any(next(path.glob(f"{depth}{_MARK}"), None) for depth in ("", "*/", "*/*/"))


def open_orbax(path: Path) -> Source:
    """The arrays of a checkpoint. Names are their paths, parted by "."; of a step they start with the item's.

    Raises:
      ImportError: Orbax is not installed.
      ValueError: the checkpoint is damaged, or the folder holds several steps.
    """
    try:
        import orbax.checkpoint as ocp
    except ImportError as e:
        raise ImportError(
            f"{path} is a checkpoint of Orbax, which is not installed: pip install orbax-checkpoint"
        ) from e
    for name in ("absl", "asyncio"):  # they repeat on stderr what the error says
        logging.getLogger(name).setLevel(logging.CRITICAL)
    items: dict[str, Item] = {}
    readers: dict[str, Callable[[], np.ndarray]] = {}
    for prefix, folder in _trees(path).items():
        for name, item, read in _arrays(ocp, folder):
            items[prefix + name], readers[prefix + name] = item, read
    files = tuple(sorted(file for file in path.rglob("*") if file.is_file()))
    return Source(path, files, {}, items, lambda name: readers[name]())


def _trees(path: Path) -> dict[str, Path]:
    """{what their names start with: folder} of the trees of a checkpoint."""
    if (path / _MARK).exists():
        return {"": path.resolve()}
    found = {f"{folder.parent.name}.": folder.parent.resolve() for folder in sorted(path.glob(f"*/{_MARK}"))}
    if not found:
        steps = sorted({str(mark.parent.parent) for mark in path.glob(f"*/*/{_MARK}")})
        raise ValueError(f"{path} holds {len(steps)} steps: give one, such as {steps[-1]}")
    return {"": next(iter(found.values()))} if len(found) == 1 else found


def _arrays(ocp: Any, folder: Path) -> list[tuple[str, Item, Callable[[], np.ndarray]]]:
    """(name, what is known of it, what reads it) of every array of a tree."""
    import jax

    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = _checked(folder, lambda: checkpointer.metadata(folder).item_metadata.tree)
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    restore = structure.unflatten([ocp.RestoreArgs(restore_type=np.ndarray)] * len(leaves))

    def reader(i: int) -> Callable[[], np.ndarray]:
        def read() -> np.ndarray:
            only = structure.unflatten([0 if j == i else ... for j in range(len(leaves))])  # ... is left out
            args = ocp.args.PyTreeRestore(item=only, restore_args=restore)
            with ocp.PyTreeCheckpointer() as checkpointer:
                found = _checked(folder, lambda: checkpointer.restore(folder, args=args))
            return np.asarray(jax.tree.leaves(found)[i])

        return read

    found = []
    for i, (keys, leaf) in enumerate(leaves):
        name = jax.tree_util.keystr(keys, simple=True, separator=".")
        if getattr(leaf, "shape", None) is not None and getattr(leaf, "dtype", None) is not None:
            shape, dtype = check_shape(f"{folder}: {name!r}", leaf.shape), np.dtype(leaf.dtype)
            found.append((name, Item(shape, dtype, "", math.prod(shape) * dtype.itemsize), reader(i)))
    return found


def _checked(folder: Path, f: Callable[[], Any]) -> Any:
    """The result of Orbax, whose errors of all kinds mean that the checkpoint is damaged."""
    try:
        return f()
    except Exception as e:
        reason = str(e).partition("[")[0][:300]
        raise ValueError(f"{folder} is damaged, or no checkpoint that Orbax reads: {type(e).__name__}: {reason}") from e
