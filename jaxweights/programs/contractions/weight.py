"""What is known of a value that is a weight: a view of it, and the loops that it was sliced by."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from jaxweights.programs.view import Span, View


class Loop(NamedTuple):
    """A loop over an axis of a weight: how many loops are around it, and the axis that it slices."""

    depth: int
    axis: int


@dataclasses.dataclass(frozen=True)
class Weight:
    """Marks a value that is a selected weight, or one slice of it.

    Attributes:
      view: which entries of the weight it has, and where.
      loops: those of which the value is one step, the outermost first.
    """

    view: View
    loops: tuple[Loop, ...] = ()

    @property
    def path(self) -> str:
        """The path of the weight."""
        return self.view.path

    def slice(self, depth: int) -> Weight | None:
        """One step of a loop over the first axis; None unless that is an axis of the weight."""
        order = self.view.in_order([0])
        if order is None or len(self.view.axes[0]) != 1:
            return None
        (span,) = self.view.axes[0]
        assert span.axis is not None  # or it would not be in order
        return Weight(self.view.take([0]), (*self.loops, Loop(depth, span.axis)))

    def stack(self) -> Weight:
        """All steps of the innermost loop."""
        *loops, (_, axis) = self.loops
        view, span = self.view, Span(axis, 1, self.view.shape[axis])
        taken = tuple(s for s in view.taken if s != span)
        return Weight(dataclasses.replace(view, axes=((span,), *view.axes), taken=taken), tuple(loops))

    @property
    def is_whole(self) -> bool:
        """Whether the value has all entries of the weight, but for the loops around it."""
        shape, looped = self.view.shape, {loop.axis for loop in self.loops}
        return all(s.axis is None or shape[s.axis] == 1 or s.axis in looped for s in self.view.taken)


def is_step(loops: Sequence[Loop], depth: int) -> bool:
    """Whether the innermost of these loops is the one at this depth."""
    return bool(loops) and loops[-1].depth == depth
