"""Units that several arrays have in common, each of which may be scaled by a factor of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jax.extend import core

Coordinates = tuple[np.ndarray, ...]
"""For each axis of the units, the place along it of each entry of an array: integers that broadcast to its shape."""


class Slot(NamedTuple):
    """Where an argument of the program has the units.

    Attributes:
      place: of the argument.
      reads: whether it sums over them, as the kernel of the next layer does. Else it makes them.
      coordinates: which unit each entry belongs to.
    """

    place: int
    reads: bool
    coordinates: Coordinates


class Tap(NamedTuple):
    """Where the units are data that a weight is multiplied by.

    Attributes:
      product: the result.
      operand: which operand of the product the data is.
      coordinates: which unit each entry of the data belongs to.
    """

    product: core.Var
    operand: int
    coordinates: Coordinates


@dataclasses.dataclass
class Group:
    """Units, and all that has them.

    Attributes:
      shape: how many there are, along several axes perhaps, as of heads and their dimensions.
      slots: the arguments that have them.
      taps: where weights read them.
      why: why they cannot be scaled, if they cannot.
    """

    shape: tuple[int, ...]
    slots: list[Slot] = dataclasses.field(default_factory=list)
    taps: list[Tap] = dataclasses.field(default_factory=list)
    why: str | None = None


class Groups:
    """A union-find of groups."""

    def __init__(self):
        self._groups: list[Group] = []
        self._parent: list[int] = []

    def new(self, shape: Sequence[int]) -> int:
        """A group of its own."""
        self._groups.append(Group(tuple(shape)))
        self._parent.append(len(self._parent))
        return len(self._parent) - 1

    def __getitem__(self, number: int) -> Group:
        return self._groups[self.root(number)]

    def root(self, number: int) -> int:
        """The number of the group that this one is part of."""
        while self._parent[number] != number:
            number = self._parent[number]
        return number

    def unite(self, one: int, other: int) -> None:
        """Both have the same factors, unit by unit."""
        one, other = self.root(one), self.root(other)
        if one == other:
            return
        self._parent[other] = one
        into, of = self._groups[one], self._groups[other]
        into.slots += of.slots
        into.taps += of.taps
        into.why = into.why or of.why
        if into.shape != of.shape:
            self.end(one, "units of different shapes are added")

    def end(self, number: int, why: str) -> None:
        """These units cannot be scaled."""
        self[number].why = self[number].why or why

    def all(self) -> list[Group]:
        """The groups there are."""
        return [group for i, group in enumerate(self._groups) if self._parent[i] == i]
