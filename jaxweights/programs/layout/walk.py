"""Follows all weights of a program to what they meet: a product, a sum, a table that is looked up, or a dead end."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

from jax.extend import core

from jaxweights.programs import products
from jaxweights.programs.calls import called, scan_operands
from jaxweights.programs.elementwise import ELEMENTWISE
from jaxweights.programs.follow import follow, is_lookup
from jaxweights.programs.interpreter import Interpreter, Rule, shape
from jaxweights.programs.view import Roles, View, reading, split_groups


class Value(NamedTuple):
    """What is known of an array.

    Attributes:
      views: the weights that it consists of, if it is no more than their entries.
      data: whether it depends on data, be it only by an index.
    """

    views: tuple[View, ...] = ()
    data: bool = False


class Fate(enum.Enum):
    """What becomes of a weight, the most telling first."""

    PRODUCT = "product"
    LOOKED_UP = "looked up"
    SCALED = "scales"
    ADDED = "added"
    JOINED = "joined to data"
    LOST = "not followed"


@dataclasses.dataclass(frozen=True)
class Event:
    """What a weight meets.

    Attributes:
      path: of the weight.
      fate: what becomes of it.
      axes: how a product reads it, or why no `Axes` says that; of another event, the name of the primitive.
      mapped: where it is under `vmap`, a name for the innermost one.
      convolution: the product, if it is one of a convolution.
      image: shape of the image, if it is that of a convolution.
    """

    path: str
    fate: Fate
    axes: Any
    mapped: str | None = None
    convolution: products.Convolution | None = None
    image: tuple[int, ...] | None = None


def _dot_general(walk: LayoutWalk, eqn: core.JaxprEqn, ins: list[Value]) -> list[Value] | None:
    position = _weight(ins)
    if position is None:
        return None
    operand = products.dot_general(eqn)[position]
    for view in ins[position].views:
        if operand.contracted:
            walk.add(view.path, Fate.PRODUCT, reading(view, Roles(operand.contracted, operand.free, operand.batch)))
        else:
            walk.add(view.path, Fate.SCALED, "outer product")
    return [Value(data=True)]


def _convolution(walk: LayoutWalk, eqn: core.JaxprEqn, ins: list[Value]) -> list[Value] | None:
    if _weight(ins) != 1:
        return None
    conv, image = products.convolution(eqn), shape(eqn.invars[0])
    kernel = conv.kernel
    for view in ins[1].views:
        view, groups = split_groups(view, kernel.output, conv.groups)
        roles = Roles((kernel.input,), (kernel.output,), window=kernel.window)
        axes = reading(view, roles, groups) if conv.batch_groups == 1 else "of groups of samples"
        walk.add(view.path, Fate.PRODUCT, axes, convolution=conv, image=image)
    return [Value(data=True)]


def _weight(ins: Sequence[Value]) -> int | None:
    """Which operand of a product is the weight, if one is and the other is data."""
    left, right = ins
    if not (left.data or right.data):
        return None
    pure = [bool(v.views) and not v.data for v in ins]
    if any(pure):
        return pure.index(True)
    indexed = [bool(v.views) for v in ins]
    return indexed.index(True) if sum(indexed) == 1 else None


def _ragged_dot(walk: LayoutWalk, eqn: core.JaxprEqn, ins: list[Value]) -> list[Value] | None:
    """Runs of rows, each with a matrix of its own."""
    if _weight(ins[:2]) != 1:
        return None
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (_, contracted), (_, batch) = numbers.dot_dimension_numbers
    batch = (*batch, *numbers.rhs_group_dimensions)
    free = [a for a in range(len(shape(eqn.invars[1]))) if a not in (*contracted, *batch)]
    for view in ins[1].views:
        walk.add(view.path, Fate.PRODUCT, reading(view, Roles(contracted, free, batch)))
    return [Value(data=True)]


def _shard_map(walk: LayoutWalk, eqn: core.JaxprEqn, ins: list[Value]) -> list[Value]:
    """The program of one device, whose part of an axis is still that axis."""
    body = called(eqn)
    outs = walk.run(body, [_resized(walk, v, variable) for v, variable in zip(ins, body.jaxpr.invars, strict=True)])
    return [_resized(walk, v, variable) for v, variable in zip(outs, eqn.outvars, strict=True)]


def _resized(walk: LayoutWalk, value: Value, variable: core.Var) -> Value:
    """The value with the sizes of the variable."""
    resized = {view: view.resize(shape(variable)) for view in value.views}
    for view in (old for old, new in resized.items() if new is None):
        walk.add(view.path, Fate.LOST, "shard_map")
    return Value(tuple(new for new in resized.values() if new is not None), value.data)


def _scan(walk: LayoutWalk, eqn: core.JaxprEqn, ins: list[Value]) -> list[Value]:
    consts, carry, xs = scan_operands(eqn, ins)
    step = [Value(tuple(view.take([0]) for view in v.views), v.data) for v in xs]
    outs = walk.loop(eqn.params["jaxpr"], consts, carry, step)
    return [*outs[: len(carry)], *(Value(data=v.data) for v in outs[len(carry) :])]


def _while(walk: LayoutWalk, eqn: core.JaxprEqn, ins: list[Value]) -> list[Value]:
    n = eqn.params["cond_nconsts"]
    first = n + eqn.params["body_nconsts"]
    walk.run(eqn.params["cond_jaxpr"], [*ins[:n], *ins[first:]])
    return walk.loop(eqn.params["body_jaxpr"], ins[n:first], ins[first:], [])


def _cond(walk: LayoutWalk, eqn: core.JaxprEqn, ins: list[Value]) -> list[Value]:
    index, *operands = ins
    branches = [walk.run(branch, operands) for branch in eqn.params["branches"]]
    return [_either([*outs, Value(data=index.data)]) for outs in zip(*branches, strict=True)]


def _either(values: Iterable[Value]) -> Value:
    """What may be any of these."""
    values = list(values)
    return Value(_distinct(view for v in values for view in v.views), any(v.data for v in values))


def _distinct(views: Iterable[View]) -> tuple[View, ...]:
    return tuple(dict.fromkeys(views))


_MEETING = {
    **dict.fromkeys(("add", "add_any", "sub"), Fate.ADDED),
    **dict.fromkeys(("mul", "div"), Fate.SCALED),
    **dict.fromkeys(("concatenate", "stack", "dynamic_update_slice", "select_n"), Fate.JOINED),
}
"""{name of a primitive: what becomes of a weight that is one operand, where another one is data}"""


def _arrays(eqn: core.JaxprEqn, ins: Sequence[Value]) -> list[Value]:
    """The operands whose entries are in the result: not those that say which entries to take."""
    name = eqn.primitive.name
    if name in ("gather", "dynamic_slice"):
        return [ins[0]]
    return list(ins[1:] if name == "select_n" else ins)


class LayoutWalk(Interpreter[Value]):
    """Runs a program on what is known of its arrays, and notes what becomes of the weights.

    Attributes:
      events: what weights meet, in the order of the program.
      scope: the names of the functions and transformations around the program.
    """

    rules: ClassVar[Mapping[str, Rule[Any]]] = {
        "dot_general": _dot_general,
        "conv_general_dilated": _convolution,
        "ragged_dot_general": _ragged_dot,
        "shard_map": _shard_map,
        "scan": _scan,
        "while": _while,
        "cond": _cond,
    }

    def __init__(self) -> None:
        self.events: dict[Event, None] = {}
        self.scope = ""

    def constant(self, aval: Any, value: Any) -> Value:
        """An array that depends on nothing."""
        return Value()

    def equation(self, eqn: core.JaxprEqn, ins: list[Value]) -> Sequence[Value]:
        """The values of the outputs, within the scope of the equation."""
        outside, self.scope = self.scope, f"{self.scope}/{eqn.source_info.name_stack}"
        outs = super().equation(eqn, ins)
        self.scope = outside
        return outs

    def other(self, eqn: core.JaxprEqn, ins: list[Value]) -> list[Value]:
        """The views that survive the equation, and notes on those that do not."""
        arrays = _arrays(eqn, ins)
        views = [view for v in arrays for view in v.views]
        if views and len(eqn.outvars) == 1 and any(v.data and not v.views for v in arrays):
            name = eqn.primitive.name
            for view in views:
                self.add(view.path, _MEETING.get(name, Fate.LOST), name)
            return [Value(data=True)]
        data = any(v.data for v in ins)
        return [self._followed(eqn, ins, i, data) for i in range(len(eqn.outvars))]

    def _followed(self, eqn: core.JaxprEqn, ins: Sequence[Value], output: int, data: bool) -> Value:
        """One output of an equation."""
        views = {}
        for position, value in enumerate(ins):
            for view in value.views:
                views[view] = follow(eqn, position, view, output)
        kept = {old: new for old, new in views.items() if new is not None}
        for view in (view for view in views if view not in kept):
            self.add(view.path, Fate.LOST, eqn.primitive.name)
        if data and any(is_lookup(eqn, new) for new in kept.values()):
            for view in kept:
                self.add(view.path, Fate.LOOKED_UP, eqn.primitive.name)
            return Value(data=True)
        if eqn.primitive.name in ELEMENTWISE and any(new.covers for new in kept.values()):
            # Factors that repeat along an axis, such as a norm of the weight, scale the weight that does not.
            for old in [old for old, new in kept.items() if not new.covers]:
                self.add(old.path, Fate.SCALED, "weight")
                del kept[old]
        return Value(_distinct(kept.values()), data)

    def add(self, path: str, fate: Fate, what: Any, **more: Any) -> None:
        """Notes what becomes of a weight."""
        before, vmap, _ = self.scope.rpartition("vmap(")
        self.events[Event(path, fate, what, before + vmap if vmap else None, **more)] = None

    def loop(
        self, program: core.ClosedJaxpr, consts: Sequence[Value], carry: Sequence[Value], step: Sequence[Value]
    ) -> list[Value]:
        """What comes out of a loop, with what it carries such as it is in every step."""
        carry = list(carry)
        while True:
            outs = self.run(program, [*consts, *carry, *step])
            # A weight that a step replaces by anything else is no weight in the next one.
            after = [
                Value(tuple(view for view in old.views if view in new.views), old.data or new.data)
                for old, new in zip(carry, outs[: len(carry)], strict=True)
            ]
            if after == carry:
                return outs
            carry = after
