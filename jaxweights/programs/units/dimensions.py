"""Dimensions that must have one size: axes as products of factors, and which factors are the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

Factors = tuple[int, ...]
"""An axis: the factors whose product it is, the outermost first. An axis of one entry has none."""


class Split(NamedTuple):
    """An axis as an outer axis and the rest of it."""

    outer: Factors
    rest: Factors


class Dimensions:
    """A union-find of factors, each of which may turn out to be a product of others.

    A factor is fixed where its size is given from outside, or where more is done to it than to map over its entries.
    """

    def __init__(self):
        self._size: list[int] = []
        self._parent: list[int] = []
        self._fixed: list[bool] = []
        self._parts: dict[int, Factors] = {}

    def new(self, size: int, *, fixed: bool = False) -> Factors:
        """An axis of so many entries."""
        return (self._add(size, fixed),) if size != 1 else ()

    def size(self, factor: int) -> int:
        """How many entries a factor has."""
        return self._size[self._root(factor)]

    def is_fixed(self, factor: int) -> bool:
        """Whether its size must stay."""
        return self._fixed[self._root(factor)]

    def resolve(self, axis: Sequence[int]) -> Factors:
        """The factors of an axis as they are known by now."""
        out: list[int] = []
        for factor in axis:
            root = self._root(factor)
            out.extend(self.resolve(self._parts[root]) if root in self._parts else (root,))
        return tuple(out)

    def fix(self, *axes: Sequence[int]) -> None:
        """The sizes of these must stay."""
        for axis in axes:
            for factor in self.resolve(axis):
                self._fixed[factor] = True

    def equate(self, a: Sequence[int], b: Sequence[int]) -> None:
        """Both are the same axis, entry by entry."""
        a, b = self.resolve(a), self.resolve(b)
        while a and b:
            n = min(self.size(a[0]), self.size(b[0]))
            left, right = self.split(a, n), self.split(b, n)
            if left is None or right is None:
                return self.fix(a, b)
            (x,), (y,) = left.outer, right.outer
            if x != y:
                self._parent[y] = x
                self._fixed[x] = self._fixed[x] or self._fixed[y]
            a, b = self.resolve(a)[1:], self.resolve(b)[1:]
        self.fix(a, b)

    def split(self, axis: Sequence[int], size: int) -> Split | None:
        """The axis as an outer axis of this size and the rest, or None where no factor divides so."""
        axis, head = self.resolve(axis), 0
        while size != 1:
            if head == len(axis):
                return None
            n = self.size(axis[head])
            if 0 in (size, n):
                return None
            if size % n and n % size == 0:
                self._parts[axis[head]] = tuple(self._add(k, self._fixed[axis[head]]) for k in (size, n // size))
                axis, n = (*axis[:head], *self._parts[axis[head]], *axis[head + 1 :]), size
            if size % n:
                return None
            size, head = size // n, head + 1
        return Split(axis[:head], axis[head:])

    def _add(self, size: int, fixed: bool) -> int:
        self._size.append(size)
        self._parent.append(len(self._parent))
        self._fixed.append(fixed)
        return len(self._parent) - 1

    def _root(self, factor: int) -> int:
        while self._parent[factor] != factor:
            self._parent[factor] = self._parent[self._parent[factor]]
            factor = self._parent[factor]
        return factor
