"""A program cut into stages, so that the weights of a stage can change when their inputs are known."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Hashable, Sequence
from typing import Any

import numpy as np
from jax.extend import core

from jaxweights.programs.interpreter import program_of


@dataclasses.dataclass(frozen=True)
class Stage:
    """A part of a program: the products of some weights with data, and what leads up to them.

    Two stages of the same equations are equal, as those of the layers of a model are, so a jitted function of a static
    stage compiles them once.

    Attributes:
      signature: all that the equations are.
      uses: which of the fixed inputs are weights that meet data here.
      program: fixed and live inputs -> live outputs.
      fixed: the inputs that depend on no data: arguments of the whole program.
      live: the inputs that depend on data.
      out: what later stages need of it.
    """

    signature: Hashable
    uses: tuple[int, ...]
    program: core.ClosedJaxpr = dataclasses.field(compare=False)
    fixed: tuple[core.Var, ...] = dataclasses.field(compare=False)
    live: tuple[core.Var, ...] = dataclasses.field(compare=False)
    out: tuple[core.Var, ...] = dataclasses.field(compare=False)

    def __call__(self, fixed: Sequence[Any], live: Sequence[Any]) -> list[Any]:
        """The values of `out`."""
        return core.jaxpr_as_fun(self.program)(*fixed, *live)


def cut(jaxpr: core.Jaxpr, weights: Collection[core.Var], data: Collection[core.Var]) -> list[Stage]:
    """Cuts a program before the equations in which a weight meets data.

    Stage k holds what depends on data by way of k such equations, and the next ones. What follows the last of them is
    left out. What depends on weights alone is computed anew in each stage that needs it.

    Args:
      jaxpr: a program without calls.
      weights: those of its inputs that are weights to find.
      data: those of its inputs that are data.
    """
    level = dict.fromkeys(data, 0)
    of: dict[core.Var, frozenset[core.Var]] = {w: frozenset({w}) for w in weights}  # which weights a value is made of
    alone: list[core.JaxprEqn] = []  # what depends on no data
    stages: dict[int, list[tuple[core.JaxprEqn, frozenset[core.Var]]]] = {}
    for eqn in jaxpr.eqns:
        ins = _variables(eqn)
        used = frozenset[core.Var]().union(*(of.get(v, ()) for v in ins))
        levels = [level[v] for v in ins if v in level]
        if levels:
            k = max(levels)
            stages.setdefault(k, []).append((eqn, used))
            level |= dict.fromkeys(eqn.outvars, k + bool(used))
        else:
            alone.append(eqn)
            of |= dict.fromkeys(eqn.outvars, used)
    cuts: list[Stage] = []
    later: set[core.Var] = set()  # what the stages after this one need
    for k in sorted(stages, reverse=True):
        eqns, needed, met = [], set(later), set[core.Var]()
        for eqn, used in reversed(stages[k]):
            if used or not needed.isdisjoint(eqn.outvars):
                eqns.insert(0, eqn)
                needed |= set(_variables(eqn))
                met |= used
        if not eqns:  # after the last product
            continue
        own = dict.fromkeys(v for eqn in eqns for v in eqn.outvars)
        ins = dict.fromkeys(v for eqn in eqns for v in _variables(eqn) if v not in own)
        live = [v for v in ins if v in level]
        before, fixed = _made_of(alone, [v for v in ins if v not in level])
        out = [v for v in own if v in later]
        program = program_of([*before, *eqns], [*fixed, *live], out)
        uses = tuple(i for i, v in enumerate(fixed) if v in met)
        cuts.insert(0, Stage(_signature(program.jaxpr), uses, program, tuple(fixed), tuple(live), tuple(out)))
        later = (later - set(own)) | set(live)
    return cuts


def _variables(eqn: core.JaxprEqn) -> list[core.Var]:
    return [v for v in eqn.invars if isinstance(v, core.Var)]


def _made_of(eqns: Sequence[core.JaxprEqn], values: Sequence[core.Var]) -> tuple[list[core.JaxprEqn], list[core.Var]]:
    """(those of the equations that make these values, what goes into them)."""
    needed, chosen = dict.fromkeys(values), []
    for eqn in reversed(eqns):
        if any(v in needed for v in eqn.outvars):
            chosen.insert(0, eqn)
            for v in eqn.outvars:
                needed.pop(v, None)
            needed |= dict.fromkeys(_variables(eqn))
    return chosen, list(needed)


def _signature(jaxpr: core.Jaxpr) -> Hashable:
    """All that a program is, apart from the names of its variables."""
    number = {v: i for i, v in enumerate(jaxpr.invars)}

    def read(v: core.Var | core.Literal) -> Hashable:
        if isinstance(v, core.Literal):
            return str(v.aval), np.asarray(v.val).tobytes()
        return number[v]

    lines: list[Hashable] = [tuple(str(v.aval) for v in jaxpr.invars)]
    for eqn in jaxpr.eqns:
        ins = tuple(map(read, eqn.invars))
        number |= {v: len(number) + i for i, v in enumerate(eqn.outvars)}
        params = tuple((name, _hashable(value)) for name, value in sorted(eqn.params.items()))
        lines.append((eqn.primitive.name, ins, params, tuple(str(v.aval) for v in eqn.outvars)))
    return tuple(lines), tuple(map(read, jaxpr.outvars))


def _hashable(value: Any) -> Hashable:
    """The value, or which object it is."""
    try:
        hash(value)
    except TypeError:
        return id(value)
    return value
