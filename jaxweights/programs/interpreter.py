"""One interpreter of traced programs. A client carries a state of its own for each value, and has rules for primitives.

The state may be an array with a mark, or no array at all but what is known of its axes. The interpreter knows nothing
of it: it keeps the states of all variables, reads literals and constants, and enters calls.
"""

from __future__ import annotations

import abc
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Generic, TypeVar

import jax
from jax.extend import core

from jaxweights.programs.calls import CALLS, called

State = TypeVar("State")
Rule = Callable[[Any, core.JaxprEqn, list[State]], Sequence[State] | None]
"""(interpreter, equation, states of its inputs) -> states of its outputs, or None where the rule does not apply."""


class Interpreter(abc.ABC, Generic[State]):
    """Runs a program on the states of its arguments.

    Attributes:
      rules: {name of a primitive: rule}. Loops and branches are primitives like any other. A rule for a call takes the
        place of entering it.
    """

    rules: ClassVar[Mapping[str, Rule[Any]]] = {}

    @abc.abstractmethod
    def constant(self, aval: Any, value: Any) -> State:
        """The state of a literal, or of a constant of the program."""

    @abc.abstractmethod
    def other(self, eqn: core.JaxprEqn, ins: list[State]) -> Sequence[State]:
        """The states of the outputs of an equation to which no rule applies."""

    def run(self, program: core.ClosedJaxpr, ins: Sequence[State]) -> list[State]:
        """The states of the outputs of a program, for those of its arguments."""
        jaxpr = program.jaxpr
        states = {v: self.constant(v.aval, c) for v, c in zip(jaxpr.constvars, program.consts, strict=True)}
        states |= zip(jaxpr.invars, ins, strict=True)

        def read(atom: core.Var | core.Literal) -> State:
            return self.constant(atom.aval, atom.val) if isinstance(atom, core.Literal) else states[atom]

        for eqn in jaxpr.eqns:
            states |= zip(eqn.outvars, self.equation(eqn, list(map(read, eqn.invars))), strict=True)
        return list(map(read, jaxpr.outvars))

    def equation(self, eqn: core.JaxprEqn, ins: list[State]) -> Sequence[State]:
        """The states of the outputs of one equation."""
        name = eqn.primitive.name
        rule = self.rules.get(name, _enter if name in CALLS else None)
        outs = rule(self, eqn, ins) if rule else None
        return self.other(eqn, ins) if outs is None else outs


def _enter(interpreter: Interpreter[State], eqn: core.JaxprEqn, ins: list[State]) -> list[State]:
    return interpreter.run(called(eqn), ins)


def shape(atom: core.Var | core.Literal) -> tuple[int, ...]:
    """The shape of a variable or a literal; () for a token, which has none."""
    return getattr(atom.aval, "shape", ())


def struct(v: core.Var) -> jax.ShapeDtypeStruct:
    """The shape and dtype of an array."""
    return jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype)  # type: ignore[attr-defined]


def evaluate(eqn: core.JaxprEqn, ins: Sequence[Any]) -> list[Any]:
    """The values of the outputs of one equation, whatever programs are in it. Literals have their own values."""
    values = {a: v for a, v in zip(eqn.invars, ins, strict=True) if not isinstance(a, core.Literal)}
    return list(core.jaxpr_as_fun(program_of([eqn], list(values), eqn.outvars))(*values.values()))


def program_of(eqns: Sequence[core.JaxprEqn], ins: Sequence[core.Var], outs: Sequence[core.Var]) -> core.ClosedJaxpr:
    """The program of some equations of another one."""
    return core.ClosedJaxpr(_empty().replace(invars=list(ins), outvars=list(outs), eqns=list(eqns)), ())


@functools.cache
def _empty() -> core.Jaxpr:
    """A program without equations."""
    return jax.make_jaxpr(lambda: ())().jaxpr
