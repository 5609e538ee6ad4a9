"""The bytes of a file, mapped into memory, and the tensors among them."""

from __future__ import annotations

import itertools
import math
import mmap
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

LARGEST_SIZE = 2**59
"""No shape has as many entries, counting axes of size 0 as 1."""


class Contents(NamedTuple):
    """What a file holds: tensors by name, and metadata."""

    tensors: dict[str, np.ndarray]
    metadata: dict[str, object]


class Span(NamedTuple):
    """Where the bytes of a tensor are."""

    name: str
    begin: int
    end: int


def map_file(path: Path) -> np.ndarray:
    """The bytes of a file as a read-only array. They are read from disk when they are looked at."""
    with open(path, "rb") as file:
        try:
            return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
        except ValueError as e:
            raise ValueError(f"{path.name} is empty: write it again, or download it again") from e


def on_device(values: np.ndarray) -> jax.Array:
    """A copy of `values` on the device. Unlike `jnp.array`, it compiles nothing, however many shapes there are."""
    return jax.device_put(np.array(values))


def check_shape(what: str, shape: object) -> tuple[int, ...]:
    """`shape` as a tuple, or an error unless it is a list of sizes that an array can have."""
    sizes: list[int] = list(shape) if isinstance(shape, list | tuple) else [-1]
    if len(sizes) > 32 or not all(type(s) is int and s >= 0 for s in sizes):
        raise ValueError(f"{what}: the shape must be at most 32 integers of at least 0, got {str(shape)[:200]}")
    if math.prod(max(s, 1) for s in sizes) >= LARGEST_SIZE:
        raise ValueError(f"{what}: no array has the shape {str(shape)[:200]}")
    return tuple(sizes)


def check_disjoint(what: str, spans: Sequence[Span]) -> None:
    """Raises if two tensors share bytes."""
    ordered = sorted((s for s in spans if s.begin < s.end), key=lambda s: s.begin)
    for one, other in itertools.pairwise(ordered):
        if other.begin < one.end:
            raise ValueError(
                f"{what}: tensors {one.name!r} and {other.name!r} overlap: bytes {one.begin} to {one.end} "
                f"and {other.begin} to {other.end}"
            )
