"""A group of units: the channels, features or heads that several weights have in common."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import numpy as np

from jaxweights.core.checks import check_integer


class UnitSlot(NamedTuple):
    """Where one array has the units of a group: entry e of `axis` belongs to unit (e // inner) mod size.

    Attributes:
      path: of the array in the tree.
      axis: the axis that holds the units.
      inner: how many consecutive entries belong to one unit. 1, but for units that were flattened before other axes,
        as heads before the dimensions of each. Units flattened behind others, as channels behind the positions of an
        image, recur along the axis by themselves.
      reads: whether the array sums over the units, as the kernel of the next layer does.
    """

    path: str
    axis: int
    inner: int = 1
    reads: bool = False


@dataclasses.dataclass(frozen=True)
class UnitGroup:
    """Units that can only be removed from several arrays at once.

    Attributes:
      size: how many units there are.
      slots: every array that has them: the kernels and biases that make them, the scales, offsets and statistics of
        norms between, and the kernels that read them.
    """

    size: int
    slots: tuple[UnitSlot, ...]

    def __post_init__(self):
        check_integer("size", self.size, 1)
        slots = tuple(UnitSlot(*slot) for slot in self.slots)
        if not slots:
            raise ValueError("a group needs slots: every array that has the units, as UnitSlot(path, axis)")
        for slot in slots:
            check_integer("the axis of a slot", slot.axis, -32)
            check_integer("the inner of a slot", slot.inner, 1)
        object.__setattr__(self, "slots", slots)

    @property
    def name(self) -> str:
        """The path of the first kernel that makes the units, or of the first array there is."""
        makers = [s.path for s in self.slots if not s.reads]
        return next((p for p in makers if p.endswith("kernel")), (makers or [s.path for s in self.slots])[0])

    def entries(self, slot: UnitSlot, shape: tuple[int, ...]) -> np.ndarray:
        """The unit of each entry along the axis of a slot, for an array of this shape; an error if it does not fit."""
        if not -len(shape) <= slot.axis < len(shape):
            raise ValueError(f"{slot.path!r} has shape {shape}, the group names its axis {slot.axis}")
        n = shape[slot.axis]
        if n % (self.size * slot.inner):
            raise ValueError(
                f"axis {slot.axis} of {slot.path!r} has {n} entries, no multiple of {self.size} units of {slot.inner}: "
                f"correct size, axis or inner of the group"
            )
        return np.arange(n) // slot.inner % self.size


def check_group(group) -> None:
    """Raises unless it is a `UnitGroup`."""
    if not isinstance(group, UnitGroup):
        raise TypeError(f"a group must be a UnitGroup, got {type(group).__name__}: take one of unit_groups")


def leaf_of(slot: UnitSlot, position: dict[str, int], leaves: list) -> jax.Array:
    """The array of a slot, or an error."""
    if slot.path not in position:
        raise ValueError(f"the group names {slot.path!r}, which is not in the tree. It has: {', '.join(position)}")
    return leaves[position[slot.path]]
