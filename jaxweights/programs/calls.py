"""Programs within an equation of a traced program: calls, and the parts of a loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, NamedTuple, TypeVar

from jax.extend import core

T = TypeVar("T")

CALLS = {
    *("jit", "pjit", "closed_call", "core_call", "checkpoint", "remat", "remat2"),
    *("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"),
}
"""The primitives that run one program, once, on their operands."""


def called(eqn: core.JaxprEqn) -> core.ClosedJaxpr:
    """The program that a call runs."""
    (program,) = (p for p in eqn.params.values() if isinstance(p, core.Jaxpr | core.ClosedJaxpr))
    # From jax 0.12 on a `Jaxpr` has its constants, too.
    if isinstance(program, core.Jaxpr) and not hasattr(program, "consts"):
        return core.ClosedJaxpr(program, ())
    return program  # type: ignore[return-value]


class ScanOperands(NamedTuple, Generic[T]):
    """What goes into a `scan`, in the order of its body's arguments.

    Attributes:
      consts: the same in every step.
      carry: what each step passes to the next. The first outputs of the body are the new carry, the others are stacked.
      xs: sliced along the first axis, one slice a step.
    """

    consts: list[T]
    carry: list[T]
    xs: list[T]


def scan_operands(eqn: core.JaxprEqn, ins: Sequence[T]) -> ScanOperands[T]:
    """What belongs to each operand of a `scan`, by the operand's role."""
    p = eqn.params
    if "ft_in" in p:  # from jax 0.12 on: a tree of the three
        n_consts, n_carry, _ = map(len, p["ft_in"].unpack())
    else:
        n_consts, n_carry = p["num_consts"], p["num_carry"]
    last = n_consts + n_carry
    return ScanOperands(list(ins[:n_consts]), list(ins[n_consts:last]), list(ins[last:]))
