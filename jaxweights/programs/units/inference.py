"""The units of a model, found in the program that JAX traces: whatever has the same entries is cut alike."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend import core

from jaxweights.levels.paths import flatten
from jaxweights.programs.calls import CALLS, called
from jaxweights.programs.units.dimensions import Dimensions, Factors
from jaxweights.programs.units.groups import UnitGroup, UnitSlot


def unit_groups(f: Callable[..., Any], params: Any, *args: Any) -> tuple[UnitGroup, ...]:
    """The groups of units that can be removed from a model, each with every array that has them.

    The program of f(params, *args) is followed axis by axis: through elementwise operations, reshapes, pooling,
    products and convolutions, grouped and depthwise ones too. Axes that must agree are one group, as those of layers
    that are added in a residual stream. A group is returned if its units do nothing but pass through such operations
    until weights read them. Where anything else happens to them the axis stays as it is: the model's inputs and
    outputs, features that a layer norm averages, and operations that are not known here, such as loops and
    concatenations.

    Constants of the model that follow from a width, such as 1/√width, are not seen, nor is a kernel used otherwise than
    scaled, as by exp(w). Compare the smaller model with the masked one, as `remove_units` says.

    Args:
      f: a function (params, *args) -> outputs, as in evaluation.
      params: any pytree of arrays or of their shapes: parameters, and running statistics if there are.
      *args: pytrees of inputs, or of their shapes.

    Returns:
      The groups in the order of the tree, to be passed to `unit_norms`, `mask_units` and `remove_units`.

    Raises:
      TypeError: `f` is not callable.

    >>> import jax, jax.numpy as jnp
    >>> params = {"a": jnp.ones((4, 3)), "b": jnp.ones(3), "c": jnp.ones((3, 2))}
    >>> model = lambda p, x: jax.nn.relu(x @ p["a"] + p["b"]) @ p["c"]
    >>> for group in unit_groups(model, params, jnp.ones((8, 4))):
    ...     print(group.size, [(slot.path, slot.axis, slot.reads) for slot in group.slots])
    3 [('a', 1, False), ('b', 0, False), ('c', 0, True)]

    References: Fang, Ma, Song, Bi Mi and Wang, DepGraph: Towards Any Structural Pruning, arXiv:2301.12900, 2023.
    """
    if not callable(f):
        raise TypeError(f"f must be a function (params, *args), got {type(f).__name__}: wrap the model in one")
    paths, leaves, _ = flatten(params)
    program = jax.make_jaxpr(f)(params, *args)
    walk = _Walk()
    inputs = list(map(_shape, program.jaxpr.invars))
    weights = [
        _Value(tuple(map(walk.dims.new, shape)), frozenset({i})) for i, shape in enumerate(inputs[: len(leaves)])
    ]
    data = [walk.fixed(shape, None) for shape in inputs[len(leaves) :]]
    for out in walk.program(program, [*weights, *data]):
        walk.dims.fix(*out.axes)

    dims, read = walk.dims, {(i, k) for i, axis in walk.read for k in walk.dims.resolve(axis)}
    slots: dict[int, list[UnitSlot]] = {}
    for i, (path, weight) in enumerate(zip(paths, weights, strict=True)):
        for a, axis in enumerate(weight.axes):
            factors = dims.resolve(axis)
            for j, k in enumerate(factors):
                inner = math.prod(map(dims.size, factors[j + 1 :]))
                slots.setdefault(k, []).append(UnitSlot(path, a, inner, (i, k) in read))
    kept = {k: s for k, s in slots.items() if not dims.is_fixed(k) and any(slot.reads for slot in s)}
    return tuple(UnitGroup(dims.size(k), tuple(s)) for k, s in kept.items())


@dataclasses.dataclass(frozen=True)
class _Value:
    """The axes of an array, and the weights it is computed from; None if from data too."""

    axes: tuple[Factors, ...]
    weights: frozenset[int] | None


class _Walk:
    """Follows the axes of every array of a program."""

    def __init__(self):
        self.dims = Dimensions()
        self.read: list[tuple[int, Factors]] = []

    def fixed(self, shape: Sequence[int], weights: frozenset[int] | None) -> _Value:
        """An array whose axes must stay as they are."""
        return _Value(tuple(self.dims.new(n, fixed=True) for n in shape), weights)

    def program(self, program: core.ClosedJaxpr, values: Sequence[_Value]) -> list[_Value]:
        jaxpr = program.jaxpr
        env = {v: self.fixed(_shape(v), frozenset()) for v in jaxpr.constvars}
        env |= zip(jaxpr.invars, values, strict=True)
        value = lambda a: self.fixed(_shape(a), frozenset()) if isinstance(a, core.Literal) else env[a]
        for eqn in jaxpr.eqns:
            env |= zip(eqn.outvars, self.equation(eqn, [value(a) for a in eqn.invars]), strict=True)
        return [value(a) for a in jaxpr.outvars]

    def equation(self, eqn: core.JaxprEqn, ins: list[_Value]) -> list[_Value]:
        name = eqn.primitive.name
        if name in CALLS:
            return self.program(called(eqn), ins)
        sources = [v.weights for v in ins]
        weights = None if None in sources else frozenset().union(*sources)  # type: ignore[arg-type]
        rule = _RULES.get(name, _elementwise if name in _ELEMENTWISE else None)
        axes = rule(self, eqn, ins) if rule else None
        if axes is None:
            self.dims.fix(*(axis for v in ins for axis in v.axes))
            return [self.fixed(_shape(v), weights) for v in eqn.outvars]
        return [_Value(tuple(axes), weights)] * len(eqn.outvars)

    def contract(self, left: _Value, a: Factors, right: _Value, b: Factors) -> None:
        """Both axes are summed over together: one of them must be of a weight, which reads the units."""
        self.dims.equate(a, b)
        weights, axis = (right.weights, b) if right.weights else (left.weights, a)
        if not weights:
            self.dims.fix(axis)
        self.read += [(i, axis) for i in weights or ()]


def _shape(variable: Any) -> tuple[int, ...]:
    return getattr(variable.aval, "shape", ())  # a token has none


def _elementwise(walk: _Walk, eqn: core.JaxprEqn, ins: list[_Value]) -> tuple[Factors, ...]:
    arrays = [v.axes for v in ins if v.axes]
    for axes in arrays[1:]:
        for a, b in zip(arrays[0], axes, strict=True):
            walk.dims.equate(a, b)
    return arrays[0] if arrays else ()


def _broadcast(walk: _Walk, eqn: core.JaxprEqn, ins: list[_Value]) -> list[Factors]:
    to = {out: axis for out, axis in zip(eqn.params["broadcast_dimensions"], ins[0].axes, strict=True) if axis}
    return [to.get(a) or walk.dims.new(n) for a, n in enumerate(eqn.params["shape"])]


def _reshape(walk: _Walk, eqn: core.JaxprEqn, ins: list[_Value]) -> list[Factors] | None:
    rest: Factors = tuple(k for axis in ins[0].axes for k in axis)
    out: list[Factors] = []
    for n in _shape(eqn.outvars[0]):
        parts = walk.dims.split(rest, n)
        if parts is None or eqn.params.get("dimensions"):
            return None
        out.append(parts[0])
        rest = parts[1]
    return out if not rest else None


def _squeeze(walk: _Walk, eqn: core.JaxprEqn, ins: list[_Value]) -> list[Factors]:
    return [axis for a, axis in enumerate(ins[0].axes) if a not in eqn.params["dimensions"]]


def _transpose(walk: _Walk, eqn: core.JaxprEqn, ins: list[_Value]) -> list[Factors]:
    return [ins[0].axes[a] for a in eqn.params["permutation"]]


def _reduce(walk: _Walk, eqn: core.JaxprEqn, ins: list[_Value]) -> list[Factors]:
    over = eqn.params["axes"]
    walk.dims.fix(*(ins[0].axes[a] for a in over))
    return [axis for a, axis in enumerate(ins[0].axes) if a not in over]


def _windows(walk: _Walk, eqn: core.JaxprEqn, ins: list[_Value]) -> list[Factors]:
    """Pooling, padding and slicing: an axis is the same where nothing is done to it."""
    p, before, after = eqn.params, _shape(eqn.invars[0]), _shape(eqn.outvars[0])
    whole = {
        "pad": lambda a: p["padding_config"][a] == (0, 0, 0),
        "slice": lambda a: before[a] == after[a],
    }.get(eqn.primitive.name, lambda a: p["window_dimensions"][a] == 1 and before[a] == after[a])
    walk.dims.fix(*(axis for a, axis in enumerate(ins[0].axes) if not whole(a)))
    return [axis if whole(a) else walk.dims.new(after[a], fixed=True) for a, axis in enumerate(ins[0].axes)]


def _dot_general(walk: _Walk, eqn: core.JaxprEqn, ins: list[_Value]) -> list[Factors]:
    contracted, batch = eqn.params["dimension_numbers"]
    left, right = ins
    for a, b in zip(*contracted, strict=True):
        walk.contract(left, left.axes[a], right, right.axes[b])
    for a, b in zip(*batch, strict=True):
        walk.dims.equate(left.axes[a], right.axes[b])
    free = [
        axis
        for side, v in enumerate(ins)
        for a, axis in enumerate(v.axes)
        if a not in (*contracted[side], *batch[side])
    ]
    return [*(left.axes[a] for a in batch[0]), *free]


def _convolution(walk: _Walk, eqn: core.JaxprEqn, ins: list[_Value]) -> list[Factors] | None:
    p, (x, w) = eqn.params, ins
    of_x, of_w, of_y = p["dimension_numbers"]
    shape = _shape(eqn.outvars[0])
    groups = walk.dims.new(p["feature_group_count"])
    units = walk.dims.split(w.axes[of_w[0]], p["feature_group_count"])
    if p["batch_group_count"] != 1 or units is None:
        return None
    # Each group of input channels meets a run of output channels of its own.
    walk.dims.equate(units[0], groups)
    split = walk.dims.split(x.axes[of_x[1]], p["feature_group_count"])
    if split is None:
        return None
    walk.dims.equate(split[0], groups)
    walk.contract(x, split[1], w, w.axes[of_w[1]])
    for value, where in ((x, of_x), (w, of_w)):
        walk.dims.fix(*(value.axes[a] for a in where[2:]))
    out = [walk.dims.new(n, fixed=True) for n in shape]
    out[of_y[0]], out[of_y[1]] = x.axes[of_x[0]], w.axes[of_w[0]]
    return out


_RULES: dict[str, Callable[[_Walk, core.JaxprEqn, list[_Value]], Sequence[Factors] | None]] = {
    "broadcast_in_dim": _broadcast,
    "reshape": _reshape,
    "squeeze": _squeeze,
    "transpose": _transpose,
    "dot_general": _dot_general,
    "conv_general_dilated": _convolution,
    **{name: _reduce for name in ("argmax", "argmin", "reduce_and", "reduce_max", "reduce_min", "reduce_or")},
    **{name: _reduce for name in ("reduce_prod", "reduce_sum")},
    **{name: _windows for name in ("pad", "reduce_window_max", "reduce_window_min", "reduce_window_sum", "slice")},
}
_ELEMENTWISE = {
    *("abs", "add", "and", "atan2", "cbrt", "ceil", "clamp", "convert_element_type", "copy", "copy_p", "cos", "div"),
    *("eq", "erf", "erf_inv", "erfc", "exp", "exp2", "expm1", "floor", "ge", "gt", "integer_pow", "is_finite", "le"),
    *("log", "log1p", "logistic", "lt", "max", "min", "mul", "ne", "neg", "nextafter", "not", "or", "pow"),
    *("reduce_precision", "rem", "round", "rsqrt", "select_n", "sign", "sin", "sqrt", "square", "stop_gradient", "sub"),
    *("tan", "tanh", "xor"),
}
