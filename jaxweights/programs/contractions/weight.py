"""What is known of a value that is a weight: its axes, and the loops it was sliced by."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

from jax.extend import core

from jaxweights.core.axes import Axes
from jaxweights.programs.elementwise import ELEMENTWISE, Elementwise
from jaxweights.programs.interpreter import shape


class Loop(NamedTuple):
    """A loop over an axis of a weight: how many loops are around it, and the axis that it slices."""

    depth: int
    axis: int


@dataclasses.dataclass(frozen=True)
class Weight:
    """Marks a value that is a selected weight, or one slice of it.

    Attributes:
      path: of the weight.
      axes: for each axis of the value, the axis of the weight that it is.
      loops: those of which the value is one step, the outermost first.
      flipped: axes of the weight along which the value runs backwards.
    """

    path: str
    axes: tuple[int, ...]
    loops: tuple[Loop, ...] = ()
    flipped: frozenset[int] = frozenset()

    def slice(self, depth: int) -> Weight:
        """One step of a loop over the first axis."""
        loop = Loop(depth, self.axes[0])
        return dataclasses.replace(self, axes=self.axes[1:], loops=(*self.loops, loop))

    def stack(self) -> Weight:
        """All steps of the innermost loop."""
        return dataclasses.replace(self, axes=(self.loops[-1].axis, *self.axes), loops=self.loops[:-1])

    def transpose(self, permutation: Sequence[int]) -> Weight:
        """With the axes of the value in this order."""
        return dataclasses.replace(self, axes=tuple(self.axes[a] for a in permutation))

    def flip(self, which: Sequence[int]) -> Weight:
        """Reversed along these axes of the value."""
        return dataclasses.replace(self, flipped=self.flipped ^ {self.axes[a] for a in which})

    def sort(self, which: Sequence[int]) -> tuple[int, ...]:
        """These axes of the value, in the order that they have in the weight."""
        return tuple(sorted(which, key=self.axes.__getitem__))

    def reading(self, input: Sequence[int], output: Sequence[int], batch: Sequence[int], groups: int = 1) -> Axes:
        """The axes of the weight, given those of the value; a loop is a batch axis."""

        def stored(which: Sequence[int]) -> tuple[int, ...]:
            return tuple(sorted(self.axes[a] for a in which))

        loops = tuple(loop.axis for loop in self.loops)
        return Axes(stored(input), stored(output), tuple(sorted(loops + stored(batch))), groups=groups)


def is_step(loops: Sequence[Loop], depth: int) -> bool:
    """Whether the innermost of these loops is the one at this depth."""
    return bool(loops) and loops[-1].depth == depth


def follow(eqn: core.JaxprEqn, position: int, weight: Weight) -> Weight | None:
    """The mark of the output where a weight is the input at this position and no data is involved.

    None where the output is no longer that weight.
    """
    rule = _RULES.get(eqn.primitive.name)
    return rule(eqn, position, weight) if rule else None


def _transpose(eqn: core.JaxprEqn, position: int, weight: Weight) -> Weight:
    return weight.transpose(eqn.params["permutation"])


def _rev(eqn: core.JaxprEqn, position: int, weight: Weight) -> Weight:
    return weight.flip(eqn.params["dimensions"])


def _elementwise(eqn: core.JaxprEqn, position: int, weight: Weight) -> Weight | None:
    return weight if shape(eqn.invars[position]) == shape(eqn.outvars[0]) else None


_RULES: dict[str, Callable[[core.JaxprEqn, int, Weight], Weight | None]] = {
    "transpose": _transpose,
    "rev": _rev,
    **{name: _elementwise for name, kind in ELEMENTWISE.items() if kind is not Elementwise.MAPPED},
}
