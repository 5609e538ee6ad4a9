"""Where a function multiplies by its weights: every product of a weight and an activation, found in the traced program.

A layer is where a weight meets an activation, in a product of matrices or in a convolution. That is plain to see in the
program that JAX traces, whatever library the model is written in, and it says more than the weight's shape: which axes
are summed over. A loop over a stack of layers has what is found in each along a leading axis; what one weight meets
in several places, or in each step of a loop that shares it, is added.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from jaxweights.core.axes import Axes, axis_tuple
from jaxweights.levels.paths import Where, flatten, select
from jaxweights.programs.calls import CALLS, called
from jaxweights.programs.products import PRODUCTS, Contraction, Weight

Visit = Callable[[Contraction], tuple[Any, jax.Array]]


def visit_contractions(
    f: Callable[..., Any], params: Any, *args: Any, visit: Visit, where: Where | None = None
) -> tuple[Any, dict[str, Any]]:
    """f(params, *args) with a visit to every product of a weight and what depends on `args`.

    Pure: it may be jitted, and differentiated where `visit` may. A weight that is cast, masked, scaled, quantized or
    transposed on the way is still that weight, and so is one whose window is flipped. Out of reach are weights that are
    reshaped or sliced before they are used, and those in a `while_loop`.

    Args:
      f: a function of a tree of weights and of arguments.
      params: the tree.
      *args: pytrees of arrays, the data.
      visit: contraction -> (value, y). The value is a pytree of arrays, whose leading axes are the batch axes of the
        weight, if any; y takes the place of the product in the rest of the computation.
      where: the weights to look for, as for `on_tree`.

    Returns:
      (f's value, {path: value}) in the order of use. Values of one path are added. Weights that meet no data, such as
      embeddings that are looked up, are left out.

    Raises:
      ValueError: `where` selects nothing, or a weight is read in two ways, as in x·W and x·Wᵀ.
    """
    paths, leaves, _ = flatten(params)
    chosen = select(paths, leaves, [(None, True)], where)
    program, shape = jax.make_jaxpr(f, return_shape=True)(params, *args)
    weights = [Weight(p, tuple(range(jnp.ndim(a)))) for p, a in zip(paths, leaves, strict=True)]
    data = jax.tree.leaves(args)
    marks = [*(w if i in chosen else None for i, w in enumerate(weights)), *(_DATA for _ in data)]
    out, _, found = _Walk(visit).program(program, [*leaves, *data], marks, 0)
    values: dict[str, Any] = {}
    axes: dict[str, Axes] = {}
    for use, value in found.items():
        if axes.setdefault(use.path, use.axes) != use.axes:
            raise ValueError(
                f"the weight {use.path!r} is read as {axes[use.path]} in one place and as {use.axes} in another: "
                f"leave it out of `where`"
            )
        order = sorted(range(len(use.lead)), key=use.lead.__getitem__)
        values[use.path] = jax.tree.map(lambda a, o=order: jnp.transpose(a, (*o, *range(len(o), jnp.ndim(a)))), value)
    return jax.tree.unflatten(jax.tree.structure(shape), out), values


def check_found(name: str, params: Any, where: Where | None, found: dict[str, Any]) -> None:
    """Raises if a weight that was asked for is not multiplied by data."""
    paths, leaves, _ = flatten(params)
    selected = [paths[i] for i in select(paths, leaves, [(None, True)], where)]
    missed = [path for path in selected if path not in found]
    if missed and (where is not None or not found):
        raise ValueError(
            f"{name} found no product of data with {', '.join(map(repr, missed))}: leave out of `where` what is not "
            f"used, looked up, or reshaped or sliced before"
        )


_DATA = object()
"""Marks what depends on the data. What depends on neither data nor one weight alone is marked None."""


@dataclasses.dataclass(frozen=True)
class _Use:
    """What a value was found for: `lead` are the axes of the weight that the leading axes of the value stand for."""

    path: str
    axes: Axes
    lead: tuple[int, ...]
    loops: tuple[tuple[int, int], ...]

    def stack(self) -> _Use:
        """Of all steps of the innermost loop."""
        return dataclasses.replace(self, lead=(self.loops[-1][1], *self.lead), loops=self.loops[:-1])


class _Found(dict):
    """{use: value}, a pytree."""


jax.tree_util.register_pytree_node(
    _Found,
    lambda found: (tuple(found.values()), tuple(found)),
    lambda uses, values: _Found(zip(uses, values, strict=True)),
)


class _Walk:
    """Evaluates a program, with a visit wherever a weight meets data.

    Each method takes values with their marks, and the number of loops around them, and returns the values that come
    out, their marks, and what was found.
    """

    def __init__(self, visit: Visit):
        self.visit = visit

    def program(self, program: core.ClosedJaxpr, values: list, marks: list, depth: int):
        jaxpr = program.jaxpr
        env: dict[Any, tuple[Any, Any]] = {v: (c, None) for v, c in zip(jaxpr.constvars, program.consts, strict=True)}
        env |= zip(jaxpr.invars, zip(values, marks, strict=True), strict=True)
        read = lambda a: (a.val, None) if isinstance(a, core.Literal) else env[a]
        found = _Found()
        for eqn in jaxpr.eqns:
            ins = [read(a) for a in eqn.invars]
            outs, out_marks, more = self.equation(jaxpr, eqn, [v for v, _ in ins], [m for _, m in ins], depth)
            env |= zip(eqn.outvars, zip(outs, out_marks, strict=True), strict=True)
            found |= {use: _add(found[use], value) if use in found else value for use, value in more.items()}
        outs = [read(a) for a in jaxpr.outvars]
        return [v for v, _ in outs], [m for _, m in outs], found

    def equation(self, jaxpr: core.Jaxpr, eqn: core.JaxprEqn, ins: list, marks: list, depth: int):
        name = eqn.primitive.name
        weights = {m for m in marks if isinstance(m, Weight)}
        if weights and name in CALLS:
            return self.program(called(eqn), ins, marks, depth)
        if weights and name == "scan":
            return self.scan(eqn, ins, marks, depth)
        if weights and name == "cond":
            return self.cond(eqn, ins, marks, depth)
        outs = _evaluate(jaxpr, eqn, ins)
        weight = weights.pop() if len(weights) == 1 else None
        found = _Found()
        if weight and _DATA in marks and name in PRODUCTS:
            product = PRODUCTS[name](eqn, weight, marks.index(weight), ins, outs[0])
            if product is not None:
                lead = tuple(
                    a for a in axis_tuple("batch", product.axes.batch) if a not in [axis for _, axis in weight.loops]
                )
                value, outs[0] = self.visit(product)
                found[_Use(weight.path, product.axes, lead, weight.loops)] = value
        mark = _DATA if _DATA in marks else _follow(eqn, weight, ins[marks.index(weight)], outs) if weight else None
        return outs, [mark] * len(outs), found

    def scan(self, eqn: core.JaxprEqn, ins: list, marks: list, depth: int):
        """A loop: of weights that it slices each value is kept, those of the others are added."""
        p = eqn.params
        first, last = p["num_consts"], p["num_consts"] + p["num_carry"]
        consts, init, xs = ins[:first], ins[first:last], ins[last:]
        data = _DATA if _DATA in marks else None
        inner = marks[:first]
        inner += [m if isinstance(m, Weight) else data for m in marks[first:last]]
        inner += [m.slice(depth) if isinstance(m, Weight) else m for m in marks[last:]]
        new: list[Any] = []

        def body(carry, x):
            outs, new[:], found = self.program(p["jaxpr"], [*consts, *carry, *x], inner, depth + 1)
            each, total = _Found(), _Found()
            for use, value in found.items():
                (each if _sliced(use, depth) else total)[use] = value
            return outs[: last - first], outs[last - first :], each, total

        one = [jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for x in xs]
        zeros = _zeros(jax.eval_shape(body, init, one)[-1])

        def step(state, x):
            carry, ys, each, total = body(state[0], x)
            return (carry, _add(state[1], total)), (ys, each)

        (carry, total), (ys, each) = jax.lax.scan(
            step, (init, zeros), xs, length=p["length"], reverse=p["reverse"], unroll=p["unroll"]
        )
        found = _Found({use.stack(): value for use, value in each.items()} | total)
        # A weight that comes out of the loop as it went in is that weight still.
        kept = [m if isinstance(m, Weight) and m == n else data for m, n in zip(inner[first:last], new, strict=False)]
        kept += [m.stack() if isinstance(m, Weight) and _sliced(m, depth) else data for m in new[last - first :]]
        return [*carry, *ys], kept, found

    def cond(self, eqn: core.JaxprEqn, ins: list, marks: list, depth: int):
        """A choice: what is found in the branches not taken is zero."""
        branches = eqn.params["branches"]
        new: list[list] = []

        def run(branch, operands):
            outs, out_marks, found = self.program(branch, list(operands), marks[1:], depth)
            new.append(out_marks)
            return outs, found

        shapes = {}
        for branch in branches:
            shapes |= jax.eval_shape(lambda *operands, b=branch: run(b, operands)[1], *ins[1:])
        zeros = _zeros(_Found(shapes))

        def padded(branch, operands):
            outs, found = run(branch, operands)
            return outs, _Found(zeros | found)

        outs, found = jax.lax.switch(ins[0], [lambda *operands, b=b: padded(b, operands) for b in branches], *ins[1:])
        data = _DATA if _DATA in marks else None
        same = [m[0] if isinstance(m[0], Weight) and len(set(m)) == 1 else data for m in zip(*new, strict=True)]
        return outs, same, found


# Of these, an output of the shape of a weight is that weight still.
_ELEMENTWISE = {
    *("convert_element_type", "copy", "copy_p", "mesh_cast", "optimization_barrier", "reduce_precision", "reshard"),
    *("abs", "add", "clamp", "div", "floor", "max", "min", "mul", "neg", "round", "select_n", "sign", "sub"),
    *("sharding_constraint", "stop_gradient"),
}


def _evaluate(jaxpr: core.Jaxpr, eqn: core.JaxprEqn, ins: list) -> list:
    """The outputs of one equation of a program."""
    values = {a: v for a, v in zip(eqn.invars, ins, strict=True) if not isinstance(a, core.Literal)}
    alone = jaxpr.replace(constvars=(), invars=list(values), outvars=eqn.outvars, eqns=[eqn])
    return list(core.jaxpr_as_fun(core.ClosedJaxpr(alone, ()))(*values.values()))


def _follow(eqn: core.JaxprEqn, weight: Weight, w: jax.Array, outs: list) -> Weight | None:
    """The mark of what is computed from a weight and from no data."""
    name = eqn.primitive.name
    if name == "transpose":
        return dataclasses.replace(weight, axes=tuple(weight.axes[a] for a in eqn.params["permutation"]))
    if name == "rev":
        return weight.flip(eqn.params["dimensions"])
    return weight if name in _ELEMENTWISE and w.shape == jnp.shape(outs[0]) else None


def _sliced(mark: Weight | _Use, depth: int) -> bool:
    """Whether it is one step of the loop at this depth."""
    return bool(mark.loops) and mark.loops[-1][0] == depth


def _add(a: Any, b: Any) -> Any:
    return jax.tree.map(jnp.add, a, b)


def _zeros(shapes: Any) -> Any:
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
