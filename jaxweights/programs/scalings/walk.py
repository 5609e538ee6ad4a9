"""Follows units from the weights that make them to those that read them, through what a factor passes unchanged.

A function g is positively homogeneous if g(c·x) = c·g(x) for every c > 0. If nothing but such functions lie on the way,
the weights that make a unit may be divided by a factor and those that read it multiplied: the model stays the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from jax.extend import core

from jaxweights.programs.interpreter import Interpreter, Rule, shape
from jaxweights.programs.outputs import output_view
from jaxweights.programs.scalings.groups import Coordinates, Group, Groups, Slot, Tap
from jaxweights.programs.scalings.rules import RULES
from jaxweights.programs.scalings.values import Constant, Param, State, Units, is_whole, lying, places, plain_axes, read
from jaxweights.programs.view import View


def scalings(program: core.ClosedJaxpr, n_params: int) -> list[Group]:
    """The groups of units of a program, with the reason where units cannot be scaled.

    Args:
      program: a program without calls, as `unroll` makes it.
      n_params: how many of its arguments are parameters, the first ones.
    """
    walk = ScalingWalk()
    ins: list[State] = [
        Param(View.whole(str(i), shape(v))) if i < n_params else None for i, v in enumerate(program.jaxpr.invars)
    ]
    walk.leave(walk.run(program, ins), "it is returned")
    return walk.finished()


class ScalingWalk(Interpreter[State]):
    """Follows parameters and units.

    Attributes:
      groups: the groups of units.
    """

    rules: ClassVar[Mapping[str, Rule[Any]]] = RULES

    def __init__(self):
        self.groups = Groups()
        self._group_of: dict[tuple[int, bool], tuple[int, Coordinates]] = {}
        self._elsewhere: set[int] = set()  # parameters that are used otherwise
        self._reads_others: set[int] = set()  # kernels that also read what has no units

    def constant(self, aval: Any, value: Any) -> State:
        """A number, or an array of anything."""
        return Constant(float(np.asarray(value).reshape(()))) if np.size(value) == 1 else None

    def other(self, eqn: core.JaxprEqn, ins: list[State]) -> list[State]:
        """Anything else ends what was followed."""
        self.leave(ins, f"{eqn.primitive.name} lies on the way")
        return [None for _ in eqn.outvars]

    def leave(self, values: Sequence[State], why: str = "") -> None:
        """These are used otherwise."""
        for value in values:
            if isinstance(value, Param):
                self._elsewhere.add(value.place)
            elif isinstance(value, Units):
                self.groups.end(value.group, why)

    def followed(self, value: Param | Units, view: View | None, eqn: core.JaxprEqn) -> State:
        """The value after an equation, of which it is this view."""
        if view is None or (isinstance(value, Units) and not is_whole(view)):
            self.leave([value], f"{eqn.primitive.name} takes some of the units")
            return None
        return value._replace(view=view)

    def united(self, units: Sequence[Units]) -> Units | None:
        """Units that have the same factors from now on. None if they do not lie alike."""
        first, *others = units
        if any(v.view.axes != first.view.axes for v in others):
            return None
        for v in others:
            self.groups.unite(first.group, v.group)
        return first

    def made(self, param: Param, view: View) -> State:
        """The units that a parameter makes, of which a value is this view. None if there is only one."""
        there = sorted({s.axis for axis in view.axes for s in axis if s.axis is not None and s.size > 1})
        if not there:
            return None
        number = {a: i for i, a in enumerate(there)}
        sizes = tuple(param.view.shape[a] for a in there)
        spans = [
            tuple(s._replace(axis=None if s.axis is None else number[s.axis]) for s in axis if s.size > 1)
            for axis in view.axes
        ]
        group = self.groups.new(sizes)
        made = Units(group, View(str(group), sizes, tuple(spans)))
        if not is_whole(made.view) or view.taken or view.flipped:
            self._elsewhere.add(param.place)
            return None
        ndim = len(param.view.shape)
        coordinates = tuple(lying(np.arange(n), [a], ndim) for a, n in zip(there, sizes, strict=True))
        self.add_slot(group, Slot(param.place, False, coordinates))
        return made

    def multiply(self, eqn: core.JaxprEqn, position: int, kernel: Param, x: State) -> list[State] | None:
        """[the units that a kernel makes of data], or None where it cannot be said which of them it reads."""
        axes, view = plain_axes(kernel.view), output_view(eqn, position, kernel.view)
        if axes is None or view is None or isinstance(x, Param):
            return None
        if isinstance(x, Units):
            coordinates = read(eqn, position, kernel, axes, x)
            if coordinates is None:
                return None
            self.add_slot(x.group, Slot(kernel.place, True, coordinates))
            axes_of_data = {a: a for a in range(len(x.view.axes))}
            data = places(x, axes_of_data, len(axes_of_data))
            assert data is not None
            self.groups[x.group].taps.append(Tap(eqn.outvars[0], 1 - position, data))
        else:
            self._reads_others.add(kernel.place)
        return [self.made(kernel, view)]

    def add_slot(self, group: int, slot: Slot) -> None:
        """The parameter has these units. If it has others by the same axes, they are the same."""
        key = slot.place, slot.reads
        if key not in self._group_of:
            self._group_of[key] = group, slot.coordinates
            self.groups[group].slots.append(slot)
            return
        before, coordinates = self._group_of[key]
        self.groups.unite(before, group)
        pairs = zip(coordinates, slot.coordinates, strict=False)
        if len(coordinates) != len(slot.coordinates) or not all(np.array_equal(a, b) for a, b in pairs):
            self.groups.end(group, "a weight is used in two ways")

    def finished(self) -> list[Group]:
        """All groups."""
        for group in self.groups.all():
            if {slot.place for slot in group.slots} & self._elsewhere:
                group.why = group.why or "a weight is used otherwise too"
            if {slot.place for slot in group.slots if slot.reads} & self._reads_others:
                group.why = group.why or "a weight reads other data too"
        return self.groups.all()
