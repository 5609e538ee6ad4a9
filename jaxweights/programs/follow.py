"""What is left of a view after each primitive that moves entries about."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from jax.extend import core

from jaxweights.programs.elementwise import ELEMENTWISE
from jaxweights.programs.interpreter import shape
from jaxweights.programs.view import Span, View, repeated

Follow = Callable[[core.JaxprEqn, int, View, int], View | None]
"""(equation, position of the view among its inputs, view, position of the output) -> the view there, or None."""


def follow(eqn: core.JaxprEqn, position: int, view: View, output: int) -> View | None:
    """The view that an output of an equation is, or None where it cannot be followed."""
    rule = _RULES.get(eqn.primitive.name)
    return rule(eqn, position, view, output) if rule else None


def _elementwise(eqn: core.JaxprEqn, position: int, view: View, output: int) -> View:
    """Axes of size 1 may broadcast, and so may a scalar."""
    return view.broadcast(range(len(view.axes)), shape(eqn.outvars[output]))


def _each(eqn: core.JaxprEqn, position: int, view: View, output: int) -> View | None:
    """Several arrays, each of which passes as it is."""
    return view if position == output else None


def _transpose(eqn: core.JaxprEqn, position: int, view: View, output: int) -> View:
    return view.transpose(eqn.params["permutation"])


def _reverse(eqn: core.JaxprEqn, position: int, view: View, output: int) -> View:
    return view.flip(eqn.params["dimensions"])


def _reshape(eqn: core.JaxprEqn, position: int, view: View, output: int) -> View | None:
    order = eqn.params.get("dimensions")
    return (view.transpose(order) if order else view).reshape(shape(eqn.outvars[0]))


def _squeeze(eqn: core.JaxprEqn, position: int, view: View, output: int) -> View:
    return view.squeeze(eqn.params["dimensions"])


def _broadcast(eqn: core.JaxprEqn, position: int, view: View, output: int) -> View:
    return view.broadcast(eqn.params["broadcast_dimensions"], eqn.params["shape"])


def _part(eqn: core.JaxprEqn, position: int, view: View, output: int) -> View | None:
    """The array is the first operand; the others are where to cut, or what to pad with."""
    return view.resize(shape(eqn.outvars[output])) if position == 0 else None


def _joined(eqn: core.JaxprEqn, position: int, view: View, output: int) -> View | None:
    """Laid beside other arrays. What was new along that axis is a stack, whose entries are different arrays."""
    axis, new = eqn.params["dimension"], shape(eqn.outvars[0])
    if all(span.axis is None or view.shape[span.axis] == 1 for span in view.axes[axis]):
        view = view.squeeze([axis])
        return dataclasses.replace(view, axes=(*view.axes[:axis], repeated(new[axis]), *view.axes[axis:]))
    return view.resize(new)


def _stack(eqn: core.JaxprEqn, position: int, view: View, output: int) -> View:
    axis = eqn.params["axis"]
    new = repeated(shape(eqn.outvars[0])[axis])
    return dataclasses.replace(view, axes=(*view.axes[:axis], new, *view.axes[axis:]))


def _unstack(eqn: core.JaxprEqn, position: int, view: View, output: int) -> View:
    return view.take([eqn.params["axis"]])


def _gather(eqn: core.JaxprEqn, position: int, view: View, output: int) -> View | None:
    """Slices at several places: the axes of a slice are those of the view, the others number the places.

    If the places are on one axis of the weight, in any order, they are that axis, with a stride of 0.
    """
    if position != 0:
        return None
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    part = view.resize(sizes)
    if part is None:
        return None
    new = shape(eqn.outvars[0])
    batching = getattr(numbers, "operand_batching_dims", ())
    left = [a for a in range(len(sizes)) if a not in (*numbers.collapsed_slice_dims, *batching)]
    places = [a for a in range(len(new)) if a not in numbers.offset_dims]
    indexed = part.take(numbers.collapsed_slice_dims).taken[len(part.taken) :]
    axes = {a: (Span(indexed[0].axis, 0, new[a]),) if len(indexed) == 1 else repeated(new[a]) for a in places}
    axes |= {out: part.axes[a] for out, a in zip(numbers.offset_dims, left, strict=True)}
    for a, of_indices in zip(batching, getattr(numbers, "start_indices_batching_dims", ()), strict=True):
        axes[places[of_indices]] = view.axes[a]
    return dataclasses.replace(view, axes=tuple(axes[a] for a in range(len(new))), taken=part.taken + indexed)


def _gathered(eqn: core.JaxprEqn, position: int, view: View, output: int) -> View | None:
    """The parts of an axis on all devices, side by side."""
    return view.resize(shape(eqn.outvars[0])) if eqn.params["tiled"] else None


def _chosen(eqn: core.JaxprEqn, position: int, view: View, output: int) -> View | None:
    """One of the operands after the first, which says which."""
    return view if position > 0 else None


_RULES: dict[str, Any] = {
    **dict.fromkeys(ELEMENTWISE, _elementwise),
    "optimization_barrier": _each,
    "select_n": _chosen,
    "transpose": _transpose,
    "rev": _reverse,
    "reshape": _reshape,
    "squeeze": _squeeze,
    "expand_dims": _reshape,
    "broadcast_in_dim": _broadcast,
    **dict.fromkeys(("slice", "dynamic_slice", "split", "pad"), _part),
    "concatenate": _joined,
    "stack": _stack,
    "unstack": _unstack,
    "gather": _gather,
    "all_gather": _gathered,
    "pvary": _each,
}
"""{name of a primitive: Follow}"""


def is_lookup(eqn: core.JaxprEqn, view: View) -> bool:
    """Whether an equation takes single vectors or numbers out of a table."""
    taken = eqn.primitive.name in ("gather", "dynamic_slice")
    return taken and view.rank <= 1 and math.prod(view.shape) > math.prod(shape(eqn.outvars[0])[-1:])
