"""Biases: which arrays a program adds to the products of its weights, and where."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

from jax.extend import core

from jaxweights.programs.follow import follow
from jaxweights.programs.interpreter import Interpreter, Rule, shape
from jaxweights.programs.outputs import output_view
from jaxweights.programs.view import View


class Bias(NamedTuple):
    """An array that is added to a product.

    Attributes:
      place: of the array among the arguments of the program.
      axes: for each axis of the array, the axis of the sum that it lies along; None for one of size 1.
      sign: 1, or −1 if it is subtracted, as the mean of a batch norm is.
    """

    place: int
    axes: tuple[int | None, ...]
    sign: int


class _Product(NamedTuple):
    """A product of a weight, before anything is added."""

    view: View


_State = View | _Product | None
"""An argument of the program, a product of one, or anything else."""

_MOVES = {
    *("broadcast_in_dim", "convert_element_type", "copy", "copy_p", "expand_dims", "mesh_cast"),
    *("optimization_barrier", "reshape", "reshard", "sharding_constraint", "squeeze", "stop_gradient", "transpose"),
}
"""The primitives that a product and a bias pass on their way to the sum."""


def find_biases(program: core.ClosedJaxpr, n_params: int) -> dict[core.Var, Bias]:
    """{the sum of a product and its bias: the bias}, of arrays that are no more than biases.

    Args:
      program: a program without calls, as `unroll` makes it.
      n_params: how many of its arguments are parameters, the first ones.
    """
    walk = _BiasWalk()
    ins: list[_State] = [
        View.whole(str(i), shape(v)) if i < n_params else None for i, v in enumerate(program.jaxpr.invars)
    ]
    outs = walk.run(program, ins)
    walk.leave(outs)
    return {v: bias for v, bias in walk.found.items() if bias.place not in walk.elsewhere}


def _product(walk: _BiasWalk, eqn: core.JaxprEqn, ins: list[_State]) -> list[_State] | None:
    views = [v for v in ins if isinstance(v, View)]
    if len(views) != 1:
        return None
    position = ins.index(views[0])
    walk.leave(ins)
    view = output_view(eqn, position, views[0])
    return None if view is None else [_Product(view)]


def _move(walk: _BiasWalk, eqn: core.JaxprEqn, ins: list[_State]) -> list[_State] | None:
    outs: list[_State] = []
    for i in range(len(eqn.outvars)):
        value = ins[i] if len(eqn.outvars) > 1 else ins[0]
        if value is None:
            outs.append(None)
            continue
        view = follow(eqn, i, value if isinstance(value, View) else value.view, i)
        if view is None:
            return None
        outs.append(view if isinstance(value, View) else _Product(view))
    return outs


def _sum(walk: _BiasWalk, eqn: core.JaxprEqn, ins: list[_State]) -> list[_State] | None:
    left, right = ins
    subtracted = eqn.primitive.name == "sub"
    if isinstance(left, View) and not subtracted:
        left, right = right, left
    if not (isinstance(left, _Product) and isinstance(right, View)):
        return None
    axes = _along(right, left.view)
    if axes is None:
        return None
    walk.found[eqn.outvars[0]] = Bias(int(right.path), axes, -1 if subtracted else 1)
    return [None]


def _along(bias: View, product: View) -> tuple[int | None, ...] | None:
    """The axis of the product that each axis of the bias lies along, if that is an axis of outputs."""
    along: list[int | None] = [None] * len(bias.shape)
    for a, (spans, outputs) in enumerate(zip(bias.axes, product.axes, strict=True)):
        spans = tuple(span for span in spans if span.axis is not None and span.size > 1)
        if not spans:
            continue
        (span, *others) = spans
        whole = not others and span == (span.axis, 1, bias.shape[span.axis or 0])
        if not whole or any(output.axis is None for output in outputs):
            return None
        along[span.axis or 0] = a
    covered = all(n == 1 or place is not None for n, place in zip(bias.shape, along, strict=True))
    return tuple(along) if covered and not bias.flipped else None


class _BiasWalk(Interpreter[_State]):
    """Follows arguments and products.

    Attributes:
      found: {sum: bias}.
      elsewhere: the places of arguments that are used otherwise.
    """

    rules: ClassVar[Mapping[str, Rule[Any]]] = {
        **dict.fromkeys(("dot_general", "conv_general_dilated"), _product),
        **dict.fromkeys(_MOVES, _move),
        **dict.fromkeys(("add", "add_any", "sub"), _sum),
    }

    def __init__(self):
        self.found: dict[core.Var, Bias] = {}
        self.elsewhere: set[int] = set()

    def constant(self, aval: Any, value: Any) -> None:
        """A value of the program itself."""
        return None

    def other(self, eqn: core.JaxprEqn, ins: list[_State]) -> list[_State]:
        """Anything else ends what was followed."""
        self.leave(ins)
        return [None for _ in eqn.outvars]

    def leave(self, values: list[_State]) -> None:
        """These are used otherwise than as a bias."""
        self.elsewhere |= {int(v.path) for v in values if isinstance(v, View)}
