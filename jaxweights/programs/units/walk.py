"""Follows the axes of every array of a program: which are the same, and which must stay as they are."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

from jax.extend import core

from jaxweights.programs.elementwise import ELEMENTWISE, Elementwise
from jaxweights.programs.interpreter import Interpreter, Rule, shape
from jaxweights.programs.products import convolution, dot_general
from jaxweights.programs.units.dimensions import Dimensions, Factors


@dataclasses.dataclass(frozen=True)
class Traced:
    """The axes of an array, and the weights it is computed from; None if from data too."""

    axes: tuple[Factors, ...]
    weights: frozenset[int] | None


class Read(NamedTuple):
    """An axis of a weight that a product sums over."""

    weight: int
    axis: Factors


AxesRule = Callable[["UnitWalk", core.JaxprEqn, list[Traced]], Sequence[Factors] | None]
"""(walk, equation, operands) -> the axes of the result, or None where they cannot be followed."""


def _elementwise(walk: UnitWalk, eqn: core.JaxprEqn, ins: list[Traced]) -> list[Factors]:
    """Axes that meet are the same; one of size 1, which has no factors, broadcasts against the others."""
    out: list[Factors] = []
    for meeting in zip(*(v.axes for v in ins if v.axes), strict=True):
        full = [axis for axis in meeting if axis]
        for axis in full[1:]:
            walk.dims.equate(full[0], axis)
        out.append(full[0] if full else ())
    return out


def _broadcast(walk: UnitWalk, eqn: core.JaxprEqn, ins: list[Traced]) -> list[Factors]:
    to = {out: axis for out, axis in zip(eqn.params["broadcast_dimensions"], ins[0].axes, strict=True) if axis}
    return [to.get(a) or walk.dims.new(n) for a, n in enumerate(eqn.params["shape"])]


def _reshape(walk: UnitWalk, eqn: core.JaxprEqn, ins: list[Traced]) -> list[Factors] | None:
    rest: Factors = tuple(k for axis in ins[0].axes for k in axis)
    out: list[Factors] = []
    for n in shape(eqn.outvars[0]):
        split = walk.dims.split(rest, n)
        if split is None or eqn.params.get("dimensions"):
            return None
        out.append(split.outer)
        rest = split.rest
    return out if not rest else None


def _squeeze(walk: UnitWalk, eqn: core.JaxprEqn, ins: list[Traced]) -> list[Factors]:
    return [axis for a, axis in enumerate(ins[0].axes) if a not in eqn.params["dimensions"]]


def _transpose(walk: UnitWalk, eqn: core.JaxprEqn, ins: list[Traced]) -> list[Factors]:
    return [ins[0].axes[a] for a in eqn.params["permutation"]]


def _reduce(walk: UnitWalk, eqn: core.JaxprEqn, ins: list[Traced]) -> list[Factors]:
    over = eqn.params["axes"]
    walk.dims.fix(*(ins[0].axes[a] for a in over))
    return [axis for a, axis in enumerate(ins[0].axes) if a not in over]


def _pad(walk: UnitWalk, eqn: core.JaxprEqn, ins: list[Traced]) -> list[Factors]:
    return _where_whole(walk, eqn, ins, [config == (0, 0, 0) for config in eqn.params["padding_config"]])


def _slice(walk: UnitWalk, eqn: core.JaxprEqn, ins: list[Traced]) -> list[Factors]:
    return _where_whole(walk, eqn, ins, _same_size(eqn))


def _pool(walk: UnitWalk, eqn: core.JaxprEqn, ins: list[Traced]) -> list[Factors]:
    pairs = zip(eqn.params["window_dimensions"], _same_size(eqn), strict=True)
    return _where_whole(walk, eqn, ins, [window == 1 and same for window, same in pairs])


def _same_size(eqn: core.JaxprEqn) -> list[bool]:
    """For each axis, whether the result has as many entries as the first operand."""
    return [before == after for before, after in zip(shape(eqn.invars[0]), shape(eqn.outvars[0]), strict=True)]


def _where_whole(walk: UnitWalk, eqn: core.JaxprEqn, ins: list[Traced], whole: list[bool]) -> list[Factors]:
    """An axis to which nothing is done is the same after; any other must stay as it is."""
    axes = list(zip(ins[0].axes, shape(eqn.outvars[0]), whole, strict=True))
    walk.dims.fix(*(axis for axis, _, same in axes if not same))
    return [axis if same else walk.dims.new(after, fixed=True) for axis, after, same in axes]


def _dot_general(walk: UnitWalk, eqn: core.JaxprEqn, ins: list[Traced]) -> list[Factors]:
    left, right = ins
    of_left, of_right = dot_general(eqn)
    for a in of_left.contracted:
        walk.contract(left, left.axes[a], right, right.axes[of_left.partner[a]])
    for a in of_left.batch:
        walk.dims.equate(left.axes[a], right.axes[of_left.partner[a]])
    out = {place: right.axes[a] for a, place in of_right.output.items()}
    out |= {place: left.axes[a] for a, place in of_left.output.items()}
    return [out[place] for place in sorted(out)]


def _convolution(walk: UnitWalk, eqn: core.JaxprEqn, ins: list[Traced]) -> list[Factors] | None:
    conv, (x, w) = convolution(eqn), ins
    groups = walk.dims.new(conv.groups)
    units = walk.dims.split(w.axes[conv.kernel.output], conv.groups)
    if conv.batch_groups != 1 or units is None:
        return None
    # Each group of input channels meets a run of output channels of its own.
    walk.dims.equate(units.outer, groups)
    channels = walk.dims.split(x.axes[conv.image.channels], conv.groups)
    if channels is None:
        return None
    walk.dims.equate(channels.outer, groups)
    walk.contract(x, channels.rest, w, w.axes[conv.kernel.input])
    walk.dims.fix(*(x.axes[a] for a in conv.image.space), *(w.axes[a] for a in conv.kernel.window))
    out = [walk.dims.new(n, fixed=True) for n in shape(eqn.outvars[0])]
    out[conv.output.batch], out[conv.output.channels] = x.axes[conv.image.batch], w.axes[conv.kernel.output]
    return out


def _with_weights(rule: AxesRule) -> Rule[Traced]:
    """The rule of arrays, given that of their axes."""

    def arrays(walk: UnitWalk, eqn: core.JaxprEqn, ins: list[Traced]) -> list[Traced] | None:
        axes = rule(walk, eqn, ins)
        return None if axes is None else [Traced(tuple(axes), _weights(ins))] * len(eqn.outvars)

    return arrays


def _weights(ins: Sequence[Traced]) -> frozenset[int] | None:
    """The weights from which a result of these is computed; None if from data too."""
    weights: set[int] = set()
    for v in ins:
        if v.weights is None:
            return None
        weights |= v.weights
    return frozenset(weights)


_AXES_RULES: dict[str, AxesRule] = {
    # An array that is placed on devices keeps the sizes that suit them.
    **{name: _elementwise for name, kind in ELEMENTWISE.items() if kind is not Elementwise.PLACED},
    "broadcast_in_dim": _broadcast,
    "reshape": _reshape,
    "squeeze": _squeeze,
    "transpose": _transpose,
    "pad": _pad,
    "slice": _slice,
    "dot_general": _dot_general,
    "conv_general_dilated": _convolution,
    **dict.fromkeys(("argmax", "argmin", "reduce_and", "reduce_max", "reduce_min", "reduce_or"), _reduce),
    **dict.fromkeys(("reduce_prod", "reduce_sum"), _reduce),
    **dict.fromkeys(("reduce_window_max", "reduce_window_min", "reduce_window_sum"), _pool),
}


class UnitWalk(Interpreter[Traced]):
    """Follows the axes of every array of a program; there are no values.

    Attributes:
      dims: the axes, and which of them are the same.
      reads: the axes of weights that products sum over.
    """

    rules: ClassVar[Mapping[str, Rule[Any]]] = {name: _with_weights(rule) for name, rule in _AXES_RULES.items()}

    def __init__(self):
        self.dims = Dimensions()
        self.reads: list[Read] = []

    def fixed(self, sizes: Sequence[int], weights: frozenset[int] | None) -> Traced:
        """An array whose axes must stay as they are."""
        return Traced(tuple(self.dims.new(n, fixed=True) for n in sizes), weights)

    def constant(self, aval: Any, value: Any) -> Traced:
        """A constant of the model has the size it has."""
        return self.fixed(getattr(aval, "shape", ()), frozenset())

    def other(self, eqn: core.JaxprEqn, ins: list[Traced]) -> list[Traced]:
        """An operation that is not known needs all axes as they are."""
        self.dims.fix(*(axis for v in ins for axis in v.axes))
        return [self.fixed(shape(v), _weights(ins)) for v in eqn.outvars]

    def contract(self, left: Traced, a: Factors, right: Traced, b: Factors) -> None:
        """Both axes are summed over together: one of them must be of a weight, which reads the units."""
        self.dims.equate(a, b)
        weights, axis = (right.weights, b) if right.weights else (left.weights, a)
        if not weights:
            self.dims.fix(axis)
        self.reads += [Read(i, axis) for i in weights or ()]
