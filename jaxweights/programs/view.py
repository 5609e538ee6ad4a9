"""A value that consists of a weight's entries: which axis of the weight each of its axes is, or is a part of."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from jaxweights.core.axes import Axes


class Span(NamedTuple):
    """A run of an axis of a weight: entry i of it is entry `start + stride·i` of the axis, for some start.

    A stride of 0 says no more than that the entries are some of that axis, which an array of indices names.

    Attributes:
      axis: of the weight; None if the value repeats itself along the run, or has entries of other arrays.
      stride: distance between neighbours.
      size: number of entries.
    """

    axis: int | None
    stride: int
    size: int


Spans = tuple[Span, ...]
"""One axis of a value: runs within runs, the outermost first. An axis of size 1 may have none."""


def repeated(size: int) -> Spans:
    """An axis along which there is no axis of the weight."""
    return (Span(None, 0, size),) if size != 1 else ()


@dataclasses.dataclass(frozen=True)
class View:
    """A weight in another shape: transposed, reshaped, sliced, indexed, broadcast, or joined with other arrays.

    Attributes:
      path: of the weight.
      shape: of the weight.
      axes: what each axis of the value is.
      taken: runs of which the value has one entry: those of a loop over a stack, or of an index.
      flipped: axes of the weight along which the value runs backwards.
    """

    path: str
    shape: tuple[int, ...]
    axes: tuple[Spans, ...]
    taken: Spans = ()
    flipped: frozenset[int] = frozenset()

    @classmethod
    def whole(cls, path: str, shape: Sequence[int]) -> View:
        """The weight itself."""
        return cls(path, tuple(shape), tuple((Span(a, 1, n),) for a, n in enumerate(shape)))

    @property
    def covers(self) -> bool:
        """Whether no entry of the weight stands in several places of the value."""
        return all(span.axis is not None for spans in self.axes for span in spans)

    @property
    def rank(self) -> int:
        """Number of axes of the weight with several entries in the value, but for axes that are indexed."""
        return len({span.axis for spans in self.axes for span in spans if span.size > 1 and span.stride} - {None})

    def transpose(self, permutation: Sequence[int]) -> View:
        """With the axes of the value in this order."""
        return dataclasses.replace(self, axes=tuple(self.axes[a] for a in permutation))

    def flip(self, which: Iterable[int]) -> View:
        """Reversed along these axes of the value."""
        flipped = {span.axis for a in which for span in self.axes[a] if span.axis is not None}
        return dataclasses.replace(self, flipped=self.flipped ^ flipped)

    def take(self, which: Iterable[int]) -> View:
        """One entry along each of these axes of the value, which are left out."""
        which = set(which)
        taken = tuple(span for a in sorted(which) for span in self.axes[a] if span.axis is not None)
        rest = tuple(spans for a, spans in enumerate(self.axes) if a not in which)
        return dataclasses.replace(self, axes=rest, taken=self.taken + taken)

    def squeeze(self, which: Iterable[int]) -> View:
        """Without these axes, of size 1. Those that are of size 1 in the weight, too, say nothing of it."""
        view = self.take(which)
        return dataclasses.replace(view, taken=tuple(s for s in view.taken if not self._is_one(s) or s in self.taken))

    def _is_one(self, span: Span) -> bool:
        return span.axis is None or self.shape[span.axis] == 1

    def resize(self, shape: Sequence[int]) -> View | None:
        """With other sizes, as a slice or padding has: part of an axis is still that axis. None if it is several."""
        axes = []
        for spans, size in zip(self.axes, shape, strict=True):
            if size == math.prod(span.size for span in spans):
                axes.append(spans)
            elif len(spans) > 1:
                return None
            else:
                axes.append(tuple(span._replace(size=size) for span in spans) or repeated(size))
        return dataclasses.replace(self, axes=tuple(axes))

    def broadcast(self, places: Sequence[int], shape: Sequence[int]) -> View:
        """Of this shape, with the axes of the value in these places of it."""
        of = dict(zip(places, self.axes, strict=True))
        sizes = {a: math.prod(span.size for span in spans) for a, spans in of.items()}
        axes = tuple(of[a] if sizes.get(a) == n else repeated(n) for a, n in enumerate(shape))
        return dataclasses.replace(self, axes=axes)

    def reshape(self, shape: Sequence[int]) -> View | None:
        """With the entries in this shape. None where an axis has entries of other arrays too."""
        rest = [span for spans in self.axes for span in spans]
        axes = []
        for size in shape:
            spans: list[Span] = []
            while size > 1 or (rest and rest[0].size == 1 and not spans):
                if not rest:
                    return None
                span = rest.pop(0)
                if size % span.size == 0:
                    size //= span.size
                elif span.size % size == 0:  # the outer part of it; the inner part comes next
                    inner = span.size // size
                    rest.insert(0, span._replace(size=inner))
                    span, size = Span(span.axis, span.stride * inner, size), 1
                else:
                    return None
                spans.append(span)
            axes.append(_joined(spans))
        if any(span.size > 1 for span in rest):
            return None
        left = tuple(span for span in rest if not self._is_one(span))
        return dataclasses.replace(self, axes=tuple(axes), taken=self.taken + left)

    def in_order(self, which: Iterable[int]) -> tuple[int, ...] | None:
        """These axes of the value, such that they run through axes of the weight as they stand in it.

        None if they do not, or if they are only a part of these axes.
        """
        order = tuple(sorted(which, key=lambda a: [(span.axis or 0, -span.stride) for span in self.axes[a]]))
        spans = _joined(span for a in order for span in self.axes[a])
        whole = all(span.axis is not None and span == (span.axis, 1, self.shape[span.axis]) for span in spans)
        return order if whole else None


def _joined(spans: Iterable[Span]) -> Spans:
    """Runs that follow on each other as one."""
    joined: list[Span] = []
    for span in spans:
        if joined and joined[-1].axis == span.axis and joined[-1].stride == span.stride * span.size:
            span = span._replace(size=span.size * joined.pop().size)
        joined.append(span)
    return tuple(joined)


class Roles(NamedTuple):
    """The axes of a value by what a product does with them."""

    input: Sequence[int]
    output: Sequence[int]
    batch: Sequence[int] = ()
    window: Sequence[int] = ()


def reading(view: View, roles: Roles, groups: int = 1) -> Axes | str:
    """The axes of the weight, given those of the value; or why there is no such reading."""
    of: defaultdict[int, set[str]] = defaultdict(set)
    for role, axes in roles._asdict().items():
        for span in (span for a in axes for span in view.axes[a]):
            if span.axis is not None:
                of[span.axis].add(role)
    for span in view.taken:
        # Of an axis in two parts, such as gates and units, one may be indexed: the other tells what the axis is.
        if span.axis is not None and not of[span.axis]:
            of[span.axis].add("batch")
    for span in (span for spans in view.axes for span in spans):
        # Of the places that an array of indices names, some may have data of their own: each has an entry of a batch.
        if span.axis is not None and not span.stride and "batch" in of[span.axis]:
            of[span.axis] = {"batch"}
    for axis, several in sorted(of.items()):
        if len(several) > 1:
            return f"axis {axis} is {' and '.join(sorted(several))}"
    named = {role: tuple(a for a in sorted(of) if of[a] == {role}) for role in Roles._fields}
    # A weight's axis of size 1 that a reshape has left out is summed over, as any axis of size 1 may be.
    lost = [a for a in range(len(view.shape)) if not of.get(a)]
    return Axes(tuple(sorted([*named["input"], *lost])), named["output"], named["batch"], groups=groups)


def split_groups(view: View, output: int, groups: int) -> tuple[View, int]:
    """The groups of a convolution that are axes of their own, taken; and how many are left.

    A stack of kernels under `vmap` is one convolution with a group a layer.
    """
    spans = list(view.axes[output])
    taken = []
    while groups > 1 and len(spans) > 1 and groups % spans[0].size == 0:
        groups //= spans[0].size
        taken.append(spans.pop(0))
    axes = (*view.axes[:output], tuple(spans), *view.axes[output + 1 :])
    known = tuple(span for span in taken if span.axis is not None)
    return dataclasses.replace(view, axes=axes, taken=view.taken + known), groups
