"""Runs a program, traced on arrays, on the stored weights themselves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax
from jax.extend import core

from jaxweights.core.stored import FollowedStored, is_stored
from jaxweights.programs.calls import called, scan_operands
from jaxweights.programs.interpreter import Interpreter, Rule, evaluate
from jaxweights.programs.stored.moves import MOVES, as_stack
from jaxweights.programs.stored.products import stored_convolution, stored_dot_general

FOLLOWED = {**MOVES, "dot_general": stored_dot_general, "conv_general_dilated": stored_convolution}
"""{name of a primitive: (equation, its inputs) -> its outputs, or None if the weight has to be an array}"""


def dense(value: Any) -> Any:
    """The value as an array."""
    return value.todense() if is_stored(value) else value


def run_stored(program: core.ClosedJaxpr, ins: Sequence[Any]) -> list[Any]:
    """The outputs of a program for arguments of which some are stored weights."""
    return list(map(dense, StoredWalk().run(program, ins)))


def _follow(walk: StoredWalk, eqn: core.JaxprEqn, ins: list[Any]) -> Sequence[Any] | None:
    """What is computed from the stored form."""
    return FOLLOWED[eqn.primitive.name](eqn, ins)


def _whole(walk: StoredWalk, eqn: core.JaxprEqn, ins: list[Any]) -> None:
    """A function with a derivative of its own is evaluated as a whole, or it would lose it."""
    return None


def _checkpoint(walk: StoredWalk, eqn: core.JaxprEqn, ins: list[Any]) -> list[Any]:
    def run(ins: list[Any]) -> list[Any]:
        return walk.run(called(eqn), ins)

    return jax.checkpoint(run, prevent_cse=eqn.params["prevent_cse"], policy=eqn.params["policy"])(ins)


def _scan(walk: StoredWalk, eqn: core.JaxprEqn, ins: list[Any]) -> list[Any]:
    """A loop over layers sees one layer of a stored stack at a time."""
    p = eqn.params
    consts, carry, xs = scan_operands(eqn, ins)
    stacks = [as_stack(x) if is_stored(x) else x for x in xs]
    xs = [dense(x) if stack is None else stack for x, stack in zip(xs, stacks, strict=True)]

    def body(carry: list[Any], x: list[Any]) -> tuple[list[Any], list[Any]]:
        outs = walk.run(p["jaxpr"], [*consts, *carry, *x])
        return outs[: len(carry)], outs[len(carry) :]

    one = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), xs)
    carry = _steady(lambda carry, x: body(carry, x)[0], carry, one)

    def step(carry: list[Any], x: list[Any]) -> tuple[list[Any], list[Any]]:
        new, ys = body(carry, x)
        return _like(carry, new), [y if isinstance(y, FollowedStored) else dense(y) for y in ys]

    carry, ys = jax.lax.scan(step, carry, xs, length=p["length"], reverse=p["reverse"], unroll=p["unroll"])
    return [*carry, *ys]


def _while(walk: StoredWalk, eqn: core.JaxprEqn, ins: list[Any]) -> list[Any]:
    p = eqn.params
    n_cond, n_body = p["cond_nconsts"], p["body_nconsts"]
    of_cond, of_body, carry = ins[:n_cond], ins[n_cond : n_cond + n_body], ins[n_cond + n_body :]

    def body(carry: list[Any]) -> list[Any]:
        return walk.run(p["body_jaxpr"], [*of_body, *carry])

    def goes_on(carry: list[Any]) -> Any:
        return walk.run(p["cond_jaxpr"], [*of_cond, *carry])[0]

    carry = _steady(body, carry)
    return jax.lax.while_loop(goes_on, lambda carry: _like(carry, body(carry)), carry)


def _cond(walk: StoredWalk, eqn: core.JaxprEqn, ins: list[Any]) -> list[Any]:
    index, *operands = ins

    def branch(program: core.ClosedJaxpr) -> Callable[[list[Any]], list[Any]]:
        return lambda operands: list(map(dense, walk.run(program, operands)))

    return jax.lax.switch(index, list(map(branch, eqn.params["branches"])), operands)


def _steady(body: Callable[..., list[Any]], carry: list[Any], *args: Any) -> list[Any]:
    """The carry of a loop, with those weights as arrays that a step does not return as they are stored."""
    while any(map(is_stored, carry)):
        new = jax.eval_shape(body, carry, *args)
        kept = [old if _alike(old, value) else dense(old) for old, value in zip(carry, new, strict=True)]
        if list(map(is_stored, kept)) == list(map(is_stored, carry)):
            break
        carry = kept
    return carry


def _alike(one: Any, other: Any) -> bool:
    """Whether two values are stored in the same way; arrays are."""
    if not is_stored(one):
        return True
    if jax.tree.structure(one) != jax.tree.structure(other):
        return False
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all((a.shape, a.dtype) == (b.shape, b.dtype) for a, b in pairs)


def _like(carry: list[Any], new: list[Any]) -> list[Any]:
    return [value if is_stored(old) else dense(value) for old, value in zip(carry, new, strict=True)]


class StoredWalk(Interpreter[Any]):
    """Evaluates a program. Weights stay stored on their way to a product; anything else takes them as arrays."""

    rules: ClassVar[Mapping[str, Rule[Any]]] = {
        **dict.fromkeys(FOLLOWED, _follow),
        **dict.fromkeys(("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"), _whole),
        **dict.fromkeys(("checkpoint", "remat", "remat2"), _checkpoint),
        "scan": _scan,
        "while": _while,
        "cond": _cond,
    }

    def constant(self, aval: Any, value: Any) -> Any:
        """A value of the program itself."""
        return value

    def equation(self, eqn: core.JaxprEqn, ins: list[Any]) -> Sequence[Any]:
        """As it is, without a stored weight."""
        return super().equation(eqn, ins) if any(map(is_stored, ins)) else evaluate(eqn, ins)

    def other(self, eqn: core.JaxprEqn, ins: list[Any]) -> list[Any]:
        """Evaluates the equation on arrays."""
        return evaluate(eqn, list(map(dense, ins)))
