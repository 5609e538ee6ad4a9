"""A bar of progress."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

T = TypeVar("T")


def shown(items: Iterable[T], what: str, progress: bool) -> Iterator[T]:
    """The items, with a bar of progress under this name if it is wanted."""
    if not progress:
        yield from items
        return
    from rich.progress import track  # Flax brings it; most calls do without

    yield from track(items, what, total=len(items) if isinstance(items, Sized) else None)
