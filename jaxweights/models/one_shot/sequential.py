"""Layer after layer: each is fitted to what the layers before it, once they are fitted, feed it."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

from jaxweights.core.axes import Axes
from jaxweights.core.calibration import InputStats, input_stats
from jaxweights.core.method import Method
from jaxweights.levels.paths import flatten
from jaxweights.models.one_shot.fit import fit
from jaxweights.models.progress import shown
from jaxweights.models.stored import densify
from jaxweights.numerics.sharding import auto_sharded
from jaxweights.programs.contractions.contraction import Contraction
from jaxweights.programs.contractions.visit import visit_contractions
from jaxweights.programs.interpreter import struct
from jaxweights.programs.stages import Stage, cut
from jaxweights.programs.trace import is_array, trace
from jaxweights.programs.unroll import Piece, unroll


def fit_in_sequence(
    f: Callable[..., Any],
    params: Any,
    batches: Iterable[tuple[Any, ...]],
    methods: Mapping[str, Sequence[Method]],
    *,
    second_moment: bool,
    asked: bool,
    progress: bool,
) -> dict[str, Any]:
    """The new weights by path, each fitted to inputs that the new weights before it make.

    The program is cut into stages at the products of these weights. At each stage all batches give the statistics, the
    weights of the stage are fitted, and the batches move on through the new weights. So data runs through the model
    once; what is alive between two stages is kept for all batches.

    Args:
      f: a function (params, *batch).
      params: the tree of weights.
      batches: tuples of the arguments after `params`.
      methods: {path: methods} of the weights to fit.
      second_moment: whether a method needs it.
      asked: whether these weights were asked for, so that it is an error if one is not multiplied by data.
      progress: whether to show a bar.
    """
    tree = flatten(params)
    parts = [_arrays(leaf) for leaf in tree.leaves]
    arrays = [a for part in parts for a in part]
    starts = itertools.accumulate(map(len, parts), initial=0)
    place_of = {path: place for path, place in zip(tree.paths, starts, strict=False) if path in methods}
    path_at = {place: path for path, place in place_of.items()}

    plans: dict[Any, _Plan] = {}
    runs: list[tuple[_Plan, dict[core.Var, Any]]] = []
    for batch in batches:
        leaves, treedef = jax.tree.flatten(batch)
        kind = treedef, tuple((a.shape, a.dtype) if is_array(a) else a for a in leaves)
        if kind not in plans:
            plans[kind] = _plan(trace(f, (params, *batch), {}), len(arrays), path_at)
        runs.append((plans[kind], dict(zip(plans[kind].data, _arrays(batch), strict=True))))
    steps, *others = (plan.steps for plan in plans.values())
    if any([set(s.weights) for s in other] != [set(s.weights) for s in steps] for other in others):
        raise ValueError(
            "sequential=True needs one order of the weights, but f uses them in an order that depends on "
            "the shape of the batch: give batches of one shape"
        )

    collect = jax.jit(functools.partial(_statistics, second_moment=second_moment), static_argnums=0)
    move_on = jax.jit(_move_on, static_argnums=0)
    left_out = _left_out(steps, collect, path_at, asked)
    fitted: dict[Piece, Any] = {}
    totals: dict[Piece, InputStats] = {}

    def value(piece: Piece) -> Any:
        if piece in fitted:
            return densify(fitted[piece])
        return arrays[piece.place][piece.layer] if piece.layer else arrays[piece.place]

    def inputs(k: int) -> dict[int, list[Any]]:
        """The fixed inputs of stage k in each plan."""
        return {id(p): [value(v) if isinstance(v, Piece) else v for v in p.steps[k].fixed] for p in plans.values()}

    for k in shown(range(len(steps)), "compress", progress):
        fixed = inputs(k)
        for plan, alive in runs:
            step = plan.steps[k]
            found = collect(step.stage, fixed[id(plan)], [alive[v] for v in step.stage.live])
            for i, stats in found.items():
                piece = step.fixed[int(i)]
                if path_at[piece.place] in left_out:
                    continue
                totals[piece] = totals[piece] + stats if piece in totals else stats
        for piece in steps[k].last:
            path = path_at[piece.place]
            if path not in left_out:
                fitted[piece] = fit(methods[path], path, value(piece), totals.pop(piece))
        fixed = inputs(k)
        for plan, alive in runs:
            step = plan.steps[k]
            made = move_on(step.stage, fixed[id(plan)], [alive[v] for v in step.stage.live])
            kept = {v: a for v, a in alive.items() if v in step.keep} | dict(zip(step.stage.out, made, strict=True))
            alive.clear()
            alive |= kept

    def whole(piece: Piece) -> Any:
        """The new weight, stacked again if its layers were fitted one by one."""
        if piece in fitted:
            return fitted[piece]
        n_layers = arrays[piece.place].shape[len(piece.layer)]
        layers = [whole(Piece(piece.place, (*piece.layer, i))) for i in range(n_layers)]
        return jax.tree.map(lambda *parts: jnp.stack(parts), *layers)

    return {path: whole(Piece(place)) for path, place in place_of.items() if path not in left_out}


@dataclasses.dataclass(frozen=True)
class _Step:
    """A stage, and what goes into it and out of it.

    Attributes:
      stage: the stage.
      fixed: its fixed inputs: parameters, or layers of them, and constants of the program.
      weights: the weights among them that meet data in it.
      last: those that meet data in no later stage.
      keep: what is alive before it and needed after it.
    """

    stage: Stage
    fixed: tuple[Piece | Any, ...]
    weights: tuple[Piece, ...]
    last: tuple[Piece, ...]
    keep: frozenset[core.Var]


class _Plan(NamedTuple):
    """The stages for batches of one kind, and the variables of the arrays of a batch."""

    steps: list[_Step]
    data: list[core.Var]


def _plan(program: core.ClosedJaxpr, n_params: int, path_at: Collection[int]) -> _Plan:
    program, arguments = unroll(program, path_at, n_params)
    inputs: dict[core.Var, Any] = dict(zip(program.jaxpr.constvars, program.consts, strict=True))
    inputs |= zip(program.jaxpr.invars, arguments, strict=True)
    data = [v for v, p in zip(program.jaxpr.invars, arguments, strict=True) if p.place >= n_params]
    weights = [v for v, p in inputs.items() if isinstance(p, Piece) and p.place in path_at]
    steps: list[_Step] = []
    later, seen = frozenset[core.Var](), set[Piece]()
    for stage in reversed(cut(program.jaxpr, weights, data)):
        fixed = tuple(inputs[v] for v in stage.fixed)
        used = tuple(fixed[i] for i in stage.uses)
        steps.insert(0, _Step(stage, fixed, used, tuple(p for p in used if p not in seen), later))
        seen |= set(used)
        later = later - set(stage.out) | set(stage.live)
    return _Plan(steps, data)


def _left_out(
    steps: Sequence[_Step], collect: Callable[..., dict[str, Any]], path_at: Mapping[int, str], asked: bool
) -> set[str]:
    """The paths of weights without statistics; an error if they were asked for, else a warning."""
    readings: dict[Piece, set[Axes | None]] = {}
    for step in steps:
        shapes = [list(map(struct, which)) for which in (step.stage.fixed, step.stage.live)]
        for i, stats in jax.eval_shape(functools.partial(collect, step.stage), *shapes).items():
            readings.setdefault(step.fixed[int(i)], set()).add(stats.axes)
    why = dict.fromkeys(path_at.values(), "not multiplied by data")
    why |= {path_at[p.place]: "read in two ways" for p, axes in readings.items() if len(axes) > 1}
    pieces = [p for step in steps for p in step.last]
    sound = {path_at[p.place] for p in pieces} - {path_at[p.place] for p in pieces if len(readings.get(p, ())) != 1}
    missed = {path: reason for path, reason in why.items() if path not in sound}
    if missed:
        listing = ", ".join(f"{path!r} ({reason})" for path, reason in missed.items())
        if asked:
            raise ValueError(f"compress has no statistics of {listing}: leave them out of `where`")
        warnings.warn(f"compress leaves out {listing}", stacklevel=4)
    return set(missed)


def _statistics(stage: Stage, fixed: list[Any], live: list[Any], *, second_moment: bool) -> dict[str, InputStats]:
    """The statistics of what the weights of a stage meet, by their place among the fixed inputs."""

    def visit(product: Contraction) -> tuple[InputStats, jax.Array]:
        def stats(x: jax.Array) -> InputStats:
            return input_stats(product.inputs(x), product.axes, second_moment=second_moment)

        return auto_sharded(stats, product.x), product.y

    def run(fixed: dict[str, Any], live: list[Any]) -> list[Any]:
        return stage([fixed[str(i)] for i in range(len(fixed))], live)

    weights = [str(i) for i in stage.uses if fixed[i].ndim >= 2]
    if not weights:
        return {}
    params = {str(i): a for i, a in enumerate(fixed)}
    return dict(visit_contractions(run, params, live, visit=visit, where=weights)[1])


def _move_on(stage: Stage, fixed: list[Any], live: list[Any]) -> list[Any]:
    return stage(fixed, live)


def _arrays(tree: Any) -> list[Any]:
    return [leaf for leaf in jax.tree.leaves(tree) if is_array(leaf)]
