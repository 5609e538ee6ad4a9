"""What is known of an array: a parameter, units with factors, or one number; and which unit each of its entries is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jax.extend import core

from jaxweights.programs import products
from jaxweights.programs.interpreter import shape
from jaxweights.programs.scalings.groups import Coordinates
from jaxweights.programs.view import Spans, View


class Param(NamedTuple):
    """An argument of the program that is a parameter."""

    view: View

    @property
    def place(self) -> int:
        """Which one."""
        return int(self.view.path)


class Units(NamedTuple):
    """An array that the factors of a group of units scale."""

    group: int
    view: View


class Constant(NamedTuple):
    """An array of one number."""

    number: float


State = Param | Units | Constant | None
"""None is any other array: no factor changes it."""


def along(spans: Spans, n_axes: int) -> list[np.ndarray | None]:
    """For each axis of the units, the place along it of each entry of an axis of a value; None if it is not there."""
    total = int(np.prod([span.size for span in spans], dtype=np.int64))
    found: list[np.ndarray | None] = [None] * n_axes
    inner = total
    for span in spans:
        inner //= span.size
        if span.axis is not None:
            step = np.arange(total) // inner % span.size * span.stride
            before = found[span.axis]
            found[span.axis] = step if before is None else before + step
    return found


def is_whole(view: View) -> bool:
    """Whether a value has all units, and for each entry it is known which of them it is."""
    spans = [span for axis in view.axes for span in axis if span.axis is not None]
    sizes = [int(np.prod([span.size for span in spans if span.axis == a])) for a in range(len(view.shape))]
    strided = all(span.stride for span in spans)
    return tuple(sizes) == view.shape and strided and not view.flipped and not view.taken


def plain_axes(view: View) -> list[int | None] | None:
    """For each axis of a value, the axis of the array that it is; None for one of size 1. None if they are others."""
    found: list[int | None] = []
    for spans in view.axes:
        spans = tuple(span for span in spans if span.size > 1)
        if len(spans) > 1 or any(s.axis is None or s != (s.axis, 1, view.shape[s.axis]) for s in spans):
            return None
        found.append(spans[0].axis if spans else None)
    named = sorted(a for a in found if a is not None)
    there = [a for a, n in enumerate(view.shape) if n > 1]
    return found if named == there and not view.flipped else None


def has_units(spans: Spans) -> bool:
    """Whether units lie along an axis of a value."""
    return any(span.axis is not None for span in spans)


def is_zero(value: State) -> bool:
    """Whether an array is known to be 0."""
    return isinstance(value, Constant) and value.number == 0


def lying(numbers: np.ndarray, axes: Sequence[int], ndim: int) -> np.ndarray:
    """An array with its axes in these places of so many, in ascending order."""
    return np.expand_dims(numbers, [a for a in range(ndim) if a not in axes])


def places(units: Units, of: Mapping[int, int | None], ndim: int) -> Coordinates | None:
    """Which unit each entry of an array belongs to, given the axis of it that an axis of the units' value is.

    None if they do not all lie along these axes.
    """
    found: list[np.ndarray | None] = [None] * len(units.view.shape)
    for a, spans in enumerate(units.view.axes):
        if not has_units(spans):
            continue
        axis = of.get(a)
        if axis is None:
            return None
        for u, numbers in enumerate(along(spans, len(found))):
            if numbers is not None:
                there, before = lying(numbers, [axis], ndim), found[u]
                found[u] = there if before is None else before + there
    return tuple(numbers for numbers in found if numbers is not None)


def read(eqn: core.JaxprEqn, position: int, kernel: Param, axes: Sequence[int | None], x: Units) -> Coordinates | None:
    """Which unit each entry of a kernel is multiplied by. None if it does not sum over them."""
    ndim = len(kernel.view.shape)
    if eqn.primitive.name == "dot_general":
        operand = products.dot_general(eqn)[position]
        return places(x, {partner: axes[a] for a, partner in operand.partner.items()}, ndim)
    conv = products.convolution(eqn)
    if any(has_units(spans) for a, spans in enumerate(x.view.axes) if a != conv.image.channels):
        return None
    # Each group of input channels meets a run of output channels of its own.
    n_in, n_out = (shape(eqn.invars[1])[a] for a in (conv.kernel.input, conv.kernel.output))
    channel = np.arange(n_out) // (n_out // conv.groups) * n_in + np.arange(n_in)[:, None]
    input, output = axes[conv.kernel.input], axes[conv.kernel.output]
    named = [a for a in (input, output) if a is not None]
    found = []
    for numbers in along(x.view.axes[conv.image.channels], len(x.view.shape)):
        assert numbers is not None
        of_entry = numbers[channel if conv.groups > 1 else channel[:, :1]]
        if named != sorted(named):
            of_entry = of_entry.T
        sizes = [1] * ndim
        for a in named:
            sizes[a] = of_entry.shape[sorted(named).index(a)] if len(named) == 2 else of_entry.size
        found.append(of_entry.reshape(sizes))
    return tuple(found)


def beside(param: View, units: View) -> Coordinates | None:
    """Which unit each entry of an array belongs to that is added to units. None if it has one entry for several."""
    of: dict[int, int | None] = {}
    for a, spans in enumerate(param.axes):
        named = [span for span in spans if span.axis is not None and span.size > 1]
        if named:
            axis = named[0].axis
            if len(named) > 1 or axis is None or named[0] != (axis, 1, param.shape[axis]):
                return None
            of[a] = axis
    there = sorted(a for a in of.values() if a is not None)
    if there != [a for a, n in enumerate(param.shape) if n > 1] or param.flipped:
        return None
    return places(Units(0, units), of, len(param.shape))
