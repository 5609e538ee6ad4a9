"""Evaluates a program and visits every product of a weight and an activation on the way."""

from __future__ import annotations

import dataclasses
import enum
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

from jaxweights.core.axes import Axes, axis_tuple
from jaxweights.programs.calls import CALLS, called, scan_operands
from jaxweights.programs.contractions.contraction import PRODUCTS, Contraction
from jaxweights.programs.contractions.found import Found, Use, zeros_like
from jaxweights.programs.contractions.weight import Weight, is_step
from jaxweights.programs.follow import follow
from jaxweights.programs.interpreter import Interpreter, Rule, evaluate

Visit = Callable[[Contraction], tuple[Any, jax.Array]]


class Origin(enum.Enum):
    """Marks a value that is not one weight alone."""

    DATA = "depends on data"
    OTHER = "depends on no data"


Mark = Weight | Origin


@functools.partial(jax.tree_util.register_dataclass, data_fields=["value"], meta_fields=["mark"])
@dataclasses.dataclass(frozen=True)
class Marked:
    """An array of the program, and what it is. The mark is static: it comes out of a trace, of `eval_shape` too."""

    value: Any
    mark: Mark


def _product(walk: ContractionWalk, eqn: core.JaxprEqn, ins: list[Marked]) -> list[Marked] | None:
    """A visit, where a weight meets data."""
    marks = _marks(ins)
    weight = _only_weight(marks)
    if weight is None or Origin.DATA not in marks:
        return None
    values = _values(ins)
    (y,) = evaluate(eqn, values)
    axes, contraction = walk.axes.get(weight.path), None
    if axes is not None and weight.is_whole:
        contraction = PRODUCTS[eqn.primitive.name](eqn, weight, axes, marks.index(weight), values, y)
    if contraction is not None:
        looped = [loop.axis for loop in weight.loops]
        lead = tuple(a for a in axis_tuple("batch", contraction.axes.batch) if a not in looped)
        value, y = walk.visit(contraction)
        walk.found.add({Use(weight.path, contraction.axes, lead, weight.loops): value})
    return [Marked(y, Origin.DATA)]


def _call(walk: ContractionWalk, eqn: core.JaxprEqn, ins: list[Marked]) -> list[Marked] | None:
    """A call is entered if it has weights. Otherwise it stays whole, with the derivative that it may define."""
    if not _has_weight(ins):
        return None
    outs, found = walk.within(called(eqn), ins, walk.depth)
    walk.found.add(found)
    return outs


class _Step(NamedTuple):
    """What one step of a loop gives; what is found for weights that the loop slices is `each`, the rest `shared`."""

    carry: list[Marked]
    ys: list[Marked]
    each: Found[Use]
    shared: Found[Use]


def _scan(walk: ContractionWalk, eqn: core.JaxprEqn, ins: list[Marked]) -> list[Marked] | None:
    """A loop: what is found for weights that it slices is stacked, what is found for others is added up."""
    if not _has_weight(ins):
        return None
    p, depth, origin = eqn.params, walk.depth, _origin(_marks(ins))
    consts, init, xs = scan_operands(eqn, ins)
    init = [v if isinstance(v.mark, Weight) else Marked(v.value, origin) for v in init]
    xs = [Marked(v.value, v.mark.slice(depth) or origin) if isinstance(v.mark, Weight) else v for v in xs]

    def body(carry: list[Marked], x: list[Marked]) -> _Step:
        outs, found = walk.within(p["jaxpr"], [*consts, *carry, *x], depth + 1)
        each, shared = Found[Use](), Found[Use]()
        for use, value in found.items():
            (each if is_step(use.loops, depth) else shared)[use] = value
        return _Step(outs[: len(carry)], outs[len(carry) :], each, shared)

    one = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), xs)
    abstract = jax.eval_shape(body, init, one)

    def step(state: tuple[list[Marked], Found[Use]], x: list[Marked]) -> tuple[Any, Any]:
        carry, total = state
        new = body(carry, x)
        carry = [Marked(after.value, before.mark) for before, after in zip(carry, new.carry, strict=True)]
        return (carry, jax.tree.map(jnp.add, total, new.shared)), (new.ys, new.each)

    (carry, total), (ys, each) = jax.lax.scan(
        step, (init, zeros_like(abstract.shared)), xs, length=p["length"], reverse=p["reverse"], unroll=p["unroll"]
    )
    walk.found.add({use.stack(): value for use, value in each.items()})
    walk.found.add(total)
    # A weight that leaves every step as it entered is still that weight; so is one whose slices are stacked again.
    out = [v if v.mark == s.mark else Marked(v.value, origin) for v, s in zip(carry, abstract.carry, strict=True)]
    for v in ys:
        whole = isinstance(v.mark, Weight) and is_step(v.mark.loops, depth)
        out.append(Marked(v.value, v.mark.stack() if whole else origin))
    return out


def _cond(walk: ContractionWalk, eqn: core.JaxprEqn, ins: list[Marked]) -> list[Marked] | None:
    """A choice: what is found in the branches that are not taken is zero."""
    if not _has_weight(ins):
        return None
    index, *operands = ins
    branches = [functools.partial(walk.within, branch, depth=walk.depth) for branch in eqn.params["branches"]]
    abstract = [jax.eval_shape(branch, operands) for branch in branches]
    zeros = Found[Use]()
    for _, found in abstract:
        zeros |= zeros_like(found)

    def padded(branch: Callable[..., tuple[list[Marked], Found[Use]]], operands: list[Marked]) -> tuple[Any, Found]:
        outs, found = branch(operands)
        return _values(outs), Found(zeros | found)

    values, found = jax.lax.switch(index.value, [functools.partial(padded, b) for b in branches], operands)
    walk.found.add(found)
    origin = _origin(_marks(ins))
    marks = [_agreed(of_output, origin) for of_output in zip(*(_marks(outs) for outs, _ in abstract), strict=True)]
    return [Marked(value, mark) for value, mark in zip(values, marks, strict=True)]


def _agreed(marks: Sequence[Mark], origin: Origin) -> Mark:
    """The weight that all of these are, or the origin."""
    return marks[0] if isinstance(marks[0], Weight) and len(set(marks)) == 1 else origin


class ContractionWalk(Interpreter[Marked]):
    """Evaluates a program, with a visit wherever a weight meets data.

    Attributes:
      visit: contraction -> (value, what takes the place of the product).
      axes: {path: how products with data read the weight}.
      depth: how many loops are around the program.
      found: {use: value} of the visits so far.
    """

    rules: ClassVar[Mapping[str, Rule[Any]]] = {
        **dict.fromkeys(PRODUCTS, _product),
        **dict.fromkeys(CALLS, _call),
        "scan": _scan,
        "cond": _cond,
    }

    def __init__(self, visit: Visit, axes: Mapping[str, Axes], depth: int = 0):
        self.visit = visit
        self.axes = axes
        self.depth = depth
        self.found = Found[Use]()

    def constant(self, aval: Any, value: Any) -> Marked:
        """A value that depends on no data."""
        return Marked(value, Origin.OTHER)

    def other(self, eqn: core.JaxprEqn, ins: list[Marked]) -> list[Marked]:
        """Evaluates the equation as it is."""
        marks = _marks(ins)
        weight, mark = _only_weight(marks), _origin(marks)
        if weight is not None and mark is Origin.OTHER:
            views = [follow(eqn, marks.index(weight), weight.view, i) for i in range(len(eqn.outvars))]
            outs = [mark if view is None else dataclasses.replace(weight, view=view) for view in views]
            return [Marked(value, of) for value, of in zip(evaluate(eqn, _values(ins)), outs, strict=True)]
        return [Marked(value, mark) for value in evaluate(eqn, _values(ins))]

    def within(self, program: core.ClosedJaxpr, ins: Sequence[Marked], depth: int) -> tuple[list[Marked], Found[Use]]:
        """What comes out of a program within an equation, and what is found there: all that a trace has to return."""
        walk = ContractionWalk(self.visit, self.axes, depth)
        return walk.run(program, ins), walk.found


def _values(ins: Sequence[Marked]) -> list[Any]:
    return [v.value for v in ins]


def _marks(ins: Sequence[Marked]) -> list[Mark]:
    return [v.mark for v in ins]


def _has_weight(ins: Sequence[Marked]) -> bool:
    return any(isinstance(v.mark, Weight) for v in ins)


def _only_weight(marks: Sequence[Mark]) -> Weight | None:
    """The weight among these, if there is exactly one."""
    weights = {m for m in marks if isinstance(m, Weight)}
    return weights.pop() if len(weights) == 1 else None


def _origin(marks: Sequence[Mark]) -> Origin:
    """Where a result comes from that is no weight."""
    return Origin.DATA if Origin.DATA in marks else Origin.OTHER
