"""What each primitive does to kernels, to numbers for each feature, and to data on its way to a batch norm."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
from jax.extend import core

from jaxweights.core.axes import Axes
from jaxweights.programs import products
from jaxweights.programs.calls import scan_operands
from jaxweights.programs.follow import follow
from jaxweights.programs.interpreter import Rule, shape
from jaxweights.programs.norms.values import (
    FUNCTIONS,
    SAME,
    Data,
    Kernel,
    Labels,
    Value,
    Vector,
    computed,
    moved,
)
from jaxweights.programs.view import Roles, reading, split_groups

if TYPE_CHECKING:
    from jaxweights.programs.norms.walk import NormWalk


def _dot_general(walk: NormWalk, eqn: core.JaxprEqn, ins: list[Value]) -> list[Value] | None:
    position = 0 if isinstance(ins[0], Kernel) else 1
    kernel, data = ins[position], ins[1 - position]
    if not (isinstance(kernel, Kernel) and isinstance(data, Data)):
        return None
    operand = products.dot_general(eqn)[position]
    axes = reading(kernel.view, Roles(operand.contracted, operand.free, operand.batch))
    of_data, of_product = {}, {}
    if isinstance(axes, Axes):
        batch = tuple(axes.batch) if not isinstance(axes.batch, int) else (axes.batch,)
        for a in operand.batch:
            label = batch.index(kernel.view.axes[a][0].axis) - len(batch) - 1 if kernel.view.axes[a] else None
            of_data[operand.partner[a]] = of_product[operand.output[a]] = label
    if len(operand.contracted) == 1:
        of_data[operand.partner[operand.contracted[0]]] = -1
    if len(operand.free) == 1:
        of_product[operand.output[operand.free[0]]] = -1
    placed = _placed(of_data, shape(eqn.invars[1 - position])) if len(operand.contracted) == 1 else None
    return [walk.multiply(kernel, data, axes, placed, _placed(of_product, shape(eqn.outvars[0])), False)]


def _convolution(walk: NormWalk, eqn: core.JaxprEqn, ins: list[Value]) -> list[Value] | None:
    data, kernel = ins
    conv = products.convolution(eqn)
    if not (isinstance(kernel, Kernel) and isinstance(data, Data)) or conv.batch_groups != 1:
        return None
    of = conv.kernel
    view, groups = split_groups(kernel.view, of.output, conv.groups)
    axes = reading(view, Roles((of.input,), (of.output,), window=of.window), groups)
    # A stack of kernels is one convolution with a group for each: its channels are layers and features in one.
    label = -1 if groups == conv.groups else None
    of_data = _placed({conv.image.channels: -1}, shape(eqn.invars[0])) if label else None
    of_product = _placed({conv.output.channels: label}, shape(eqn.outvars[0]))
    padded = any(n > 0 for pair in conv.padding for n in pair) or any(d > 1 for d in conv.image_dilation)
    return [walk.multiply(kernel, data, axes, of_data, of_product, padded)]


def _placed(of: dict[int, int | None], shape: tuple[int, ...]) -> Labels:
    """The labels of an array, given those that it has."""
    return tuple(of.get(a) if n > 1 else None for a, n in enumerate(shape))


def _move(walk: NormWalk, eqn: core.JaxprEqn, ins: list[Value]) -> list[Value] | None:
    value = ins[0]
    if isinstance(value, Kernel):
        view = follow(eqn, 0, value.view, 0)
        whole = math.prod(shape(eqn.outvars[0])) == math.prod(shape(eqn.invars[0]))
        return [value._replace(view=view)] if view is not None and whole else None
    axes = moved(eqn, value.axes)
    return None if axes is None else [value._replace(axes=axes)]


def _same(walk: NormWalk, eqn: core.JaxprEqn, ins: list[Value]) -> list[Value] | None:
    floating = all(jnp.issubdtype(v.aval.dtype, jnp.floating) for v in eqn.outvars)  # type: ignore[attr-defined]
    return ins if floating or all(isinstance(v, Vector) for v in ins) else None


_MINUS = Vector(np.array(-1.0), frozenset(), ())


def _elementwise(walk: NormWalk, eqn: core.JaxprEqn, ins: list[Value]) -> list[Value] | None:
    """Numbers of numbers; or data that is shifted and scaled."""
    vectors = [v for v in ins if isinstance(v, Vector)]
    if len(vectors) == len(ins):
        result = computed(eqn, vectors)
        return None if result is None else [result]
    name = eqn.primitive.name
    data = next((v for v in ins if isinstance(v, Data)), None)
    if data is None or len(vectors) != len(ins) - 1:
        return None
    if name == "neg":
        return [data.times(_MINUS)]
    if name not in ("add", "add_any", "sub", "mul", "div") or (name == "div" and ins[0] is not data):
        return None
    (v,) = vectors
    data = walk.along(data, v)
    with np.errstate(all="ignore"):
        if name == "sub" and ins[0] is v:
            data = data.times(_MINUS)
        elif name == "sub":
            v = v._replace(numbers=-v.numbers)
        elif name == "div":
            v = v._replace(numbers=1 / v.numbers)
        return [walk.completed(data.times(v) if name in ("mul", "div") else data.plus(v))]


def _scan(walk: NormWalk, eqn: core.JaxprEqn, ins: list[Value]) -> list[Value]:
    program = eqn.params["jaxpr"]
    consts, carry, xs = scan_operands(eqn, ins)
    walk.leave(*carry, *(v for v in xs if isinstance(v, Data)))
    inside = list(map(walk.unknown, program.jaxpr.invars[len(consts) :]))
    steps = [_step(v, id(eqn)) or new for v, new in zip(xs, inside[len(carry) :], strict=True)]
    walk.give(*walk.run(program, [*consts, *inside[: len(carry)], *steps]))
    return list(map(walk.unknown, eqn.outvars))


def _step(value: Value, loop: int) -> Value | None:
    """One slice of a stack, unless it is data."""
    if isinstance(value, Kernel):
        return Kernel(value.leaf.slice(loop), value.view.take([0]))
    if isinstance(value, Vector):
        return Vector(value.numbers, frozenset(leaf.slice(loop) for leaf in value.leaves), value.axes[1:])
    return None


def _while(walk: NormWalk, eqn: core.JaxprEqn, ins: list[Value]) -> list[Value]:
    n = eqn.params["cond_nconsts"]
    first = n + eqn.params["body_nconsts"]
    walk.leave(*ins[first:])
    for program, consts in ((eqn.params["cond_jaxpr"], ins[:n]), (eqn.params["body_jaxpr"], ins[n:first])):
        walk.give(*walk.run(program, [*consts, *map(walk.unknown, eqn.outvars)]))
    return list(map(walk.unknown, eqn.outvars))


def _cond(walk: NormWalk, eqn: core.JaxprEqn, ins: list[Value]) -> list[Value]:
    walk.leave(ins[0])
    for branch in eqn.params["branches"]:
        walk.give(*walk.run(branch, ins[1:]))
    return list(map(walk.unknown, eqn.outvars))


RULES: dict[str, Rule[Any]] = {
    "dot_general": _dot_general,
    "conv_general_dilated": _convolution,
    **dict.fromkeys(("transpose", "broadcast_in_dim", "reshape", "squeeze", "expand_dims", "rev"), _move),
    **dict.fromkeys(SAME, _same),
    **dict.fromkeys((*FUNCTIONS, "integer_pow"), _elementwise),
    "scan": _scan,
    "while": _while,
    "cond": _cond,
}
"""{name of a primitive: rule}. Calls are entered; anything else ends what was followed."""
