"""Programs within an equation of a traced program that are evaluated in its place, once."""

from __future__ import annotations

from jax.extend import core

CALLS = {
    *("jit", "pjit", "closed_call", "core_call", "checkpoint", "remat", "remat2"),
    *("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"),
}
"""The names of their primitives."""


def called(eqn: core.JaxprEqn) -> core.ClosedJaxpr:
    """The program that a call runs."""
    (program,) = (p for p in eqn.params.values() if isinstance(p, core.Jaxpr | core.ClosedJaxpr))
    return core.ClosedJaxpr(program, ()) if isinstance(program, core.Jaxpr) else program
