"""What each primitive does to parameters and units: whether it is positively homogeneous."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
from jax.extend import core

from jaxweights.programs import products
from jaxweights.programs.follow import follow
from jaxweights.programs.interpreter import Rule, shape
from jaxweights.programs.outputs import output_view
from jaxweights.programs.scalings.groups import Slot
from jaxweights.programs.scalings.values import Constant, Param, State, Units, beside, has_units, is_zero
from jaxweights.programs.view import repeated

if TYPE_CHECKING:
    from jaxweights.programs.scalings.walk import ScalingWalk


def _product(walk: ScalingWalk, eqn: core.JaxprEqn, ins: list[State]) -> list[State] | None:
    """A kernel that reads units and makes others; or data that is mixed along other axes than the units."""
    for position, kernel in enumerate(ins):
        if isinstance(kernel, Param):
            made = walk.multiply(eqn, position, kernel, ins[1 - position])
            if made is not None:
                return made
    units = [i for i, v in enumerate(ins) if isinstance(v, Units)]
    if len(units) != 1 or eqn.primitive.name != "dot_general":
        return None
    (position,) = units
    value, operand = ins[position], products.dot_general(eqn)[position]
    assert isinstance(value, Units)
    view = output_view(eqn, position, value.view)
    if view is None or any(has_units(value.view.axes[a]) for a in operand.contracted):
        return None
    walk.leave([v for v in ins if isinstance(v, Param)])
    return [walk.followed(value, view, eqn)]


def _move(walk: ScalingWalk, eqn: core.JaxprEqn, ins: list[State]) -> list[State] | None:
    """Entries that are moved, or joined by zeros."""
    name = eqn.primitive.name
    each = name == "optimization_barrier"
    if not each and any(isinstance(v, Param | Units) for v in ins[1:]):
        return None
    if name == "pad" and isinstance(ins[0], Units) and not is_zero(ins[1]):
        return None
    outs: list[State] = []
    for i in range(len(eqn.outvars)):
        value = ins[i if each else 0]
        if isinstance(value, Param | Units):
            view = follow(eqn, i if each else 0, value.view, i)
            outs.append(walk.followed(value, view, eqn))
        else:
            outs.append(value if name in ("broadcast_in_dim", "reshape", "convert_element_type") else None)
    return outs


def _same(walk: ScalingWalk, eqn: core.JaxprEqn, ins: list[State]) -> list[State] | None:
    """−x and |x|."""
    return [ins[0]] if isinstance(ins[0], Units) else None


def _sum(walk: ScalingWalk, eqn: core.JaxprEqn, ins: list[State]) -> list[State] | None:
    """Units of one factor; or units and their bias."""
    units = [v for v in ins if isinstance(v, Units)]
    others = [v for v in ins if not isinstance(v, Units)]
    if not units or (eqn.primitive.name == "sub" and not isinstance(ins[0], Units) and not is_zero(ins[0])):
        return None
    result = walk.united(units)
    for v in others:
        if isinstance(v, Param) and result is not None:
            coordinates = beside(v.view, result.view)
            if coordinates is None:
                return None
            walk.add_slot(result.group, Slot(v.place, False, coordinates))
        elif not is_zero(v):
            return None
    return None if result is None else [result]


def _extreme(walk: ScalingWalk, eqn: core.JaxprEqn, ins: list[State]) -> list[State] | None:
    """The larger or the smaller one of units and 0."""
    units = [v for v in ins if isinstance(v, Units)]
    if not units or not all(isinstance(v, Units) or is_zero(v) for v in ins):
        return None
    result = walk.united(units)
    return None if result is None else [result]


def _select(walk: ScalingWalk, eqn: core.JaxprEqn, ins: list[State]) -> list[State] | None:
    """Units or 0, by what no factor changes."""
    return None if isinstance(ins[0], Param | Units) else _extreme(walk, eqn, ins[1:])


def _clamp(walk: ScalingWalk, eqn: core.JaxprEqn, ins: list[State]) -> list[State] | None:
    low, x, high = ins
    bounds = all(isinstance(v, Constant) and (v.number == 0 or np.isinf(v.number)) for v in (low, high))
    return [x] if bounds and isinstance(x, Units) else None


def _compare(walk: ScalingWalk, eqn: core.JaxprEqn, ins: list[State]) -> list[State] | None:
    """The sign of units."""
    others = [v for v in ins if not isinstance(v, Units)]
    return [None] if len(others) == len(ins) - 1 and all(map(is_zero, others)) else None


def _scaled(walk: ScalingWalk, eqn: core.JaxprEqn, ins: list[State]) -> list[State] | None:
    """Units times what no factor changes; or a vector times data, as the scale of a norm, which makes units."""
    position = 1 if isinstance(ins[1], Units) or not isinstance(ins[0], Param | Units) else 0
    value, other = ins[position], ins[1 - position]
    if isinstance(other, Units) or (eqn.primitive.name == "div" and position == 1):
        return None
    if isinstance(value, Units):
        walk.leave([other])
        return [walk.followed(value, follow(eqn, position, value.view, 0), eqn)]
    if not isinstance(value, Param) or isinstance(other, Param):
        return None
    view = follow(eqn, position, value.view, 0)
    if len(value.view.shape) != 1:
        return [Param(view)] if isinstance(other, Constant) and view is not None else None
    return None if view is None else [walk.made(value, view)]


def _reduce(walk: ScalingWalk, eqn: core.JaxprEqn, ins: list[State]) -> list[State] | None:
    value, over = ins[0], eqn.params["axes"]
    if not isinstance(value, Units) or any(has_units(value.view.axes[a]) for a in over):
        return None
    return [Units(value.group, value.view.take(over))]


def _pool(walk: ScalingWalk, eqn: core.JaxprEqn, ins: list[State]) -> list[State] | None:
    value = ins[0]
    if not isinstance(value, Units):
        return None
    axes = []
    for spans, window, size in zip(
        value.view.axes, eqn.params["window_dimensions"], shape(eqn.outvars[0]), strict=True
    ):
        same = window == 1 and size == np.prod([span.size for span in spans], dtype=int)
        if not same and has_units(spans):
            return None
        axes.append(spans if same else repeated(size))
    return [Units(value.group, dataclasses.replace(value.view, axes=tuple(axes)))]


_MOVES = (
    *("broadcast_in_dim", "convert_element_type", "copy", "copy_p", "dynamic_slice", "expand_dims", "mesh_cast"),
    *("optimization_barrier", "pad", "reduce_precision", "reshape", "reshard", "rev", "sharding_constraint", "slice"),
    *("squeeze", "stop_gradient", "transpose"),
)

RULES: dict[str, Rule[Any]] = {
    **dict.fromkeys(("dot_general", "conv_general_dilated"), _product),
    **dict.fromkeys(_MOVES, _move),
    **dict.fromkeys(("abs", "neg"), _same),
    **dict.fromkeys(("add", "add_any", "sub"), _sum),
    **dict.fromkeys(("max", "min"), _extreme),
    **dict.fromkeys(("eq", "ge", "gt", "le", "lt", "ne", "sign"), _compare),
    **dict.fromkeys(("mul", "div"), _scaled),
    **dict.fromkeys(("reduce_max", "reduce_min", "reduce_sum"), _reduce),
    **dict.fromkeys(("reduce_window_max", "reduce_window_min", "reduce_window_sum"), _pool),
    "select_n": _select,
    "clamp": _clamp,
}
"""{name of a primitive: rule}. Anything else ends what was followed."""
