"""The interpreter against the function itself, with clients that track values or only dependencies."""

import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxweights.programs.calls import called, scan_operands
from jaxweights.programs.elementwise import _KINDS, ELEMENTWISE
from jaxweights.programs.interpreter import Interpreter, evaluate, shape

TABLE = np.arange(12.0, dtype=np.float32).reshape(3, 4)


class Values(Interpreter):
    """Computes the function."""

    def constant(self, aval, value):
        assert jnp.shape(value) == aval.shape
        return value

    def other(self, eqn, ins):
        return evaluate(eqn, ins)


def _unrolled(walk, eqn, ins):
    consts, carry, xs = scan_operands(eqn, ins)
    steps = []
    for i in range(eqn.params["length"])[:: -1 if eqn.params["reverse"] else 1]:
        outs = walk.run(eqn.params["jaxpr"], [*consts, *carry, *(x[i] for x in xs)])
        carry = outs[: len(carry)]
        steps.append(outs[len(carry) :])
    stacked = [jnp.stack(ys[:: -1 if eqn.params["reverse"] else 1]) for ys in zip(*steps, strict=True)]
    return [*carry, *stacked]


def _taken(walk, eqn, ins):
    return walk.run(eqn.params["branches"][int(ins[0])], ins[1:])


class Unrolled(Values):
    """Computes the function step by step, with custom rules for loops and branches."""

    rules: ClassVar = {"scan": _unrolled, "cond": _taken}


@jax.custom_jvp
def softplus(x):
    return jnp.log1p(jnp.exp(x))


softplus.defjvp(lambda primals, tangents: (softplus(*primals), jax.nn.sigmoid(*primals) * tangents[0]))


@jax.custom_vjp
def clipped(x):
    return jnp.clip(x, -1, 1)


clipped.defvjp(lambda x: (clipped(x), None), lambda _, g: (g,))


def everything(x, which):
    """All kinds of calls, loops in both directions, a branch, constants, literals, pass-through outputs."""
    x = jax.jit(lambda a: softplus(a @ TABLE))(x)
    x = jax.checkpoint(lambda a: clipped(jnp.sin(a)) * 2)(x)

    def pair(carry, row):
        a, b = carry
        return (a + 0.5 * row, b * 0.9 + a[0]), jnp.sum(a * b)

    (a, b), sums = jax.lax.scan(pair, (x, x[0]), x)
    _, backwards = jax.lax.scan(lambda c, row: (c + row, c), x[0], x, reverse=True)
    chosen = jax.lax.switch(which, [lambda a: a, lambda a: a * TABLE[0], lambda a: jnp.cos(a)], b)
    total = jax.lax.while_loop(lambda s: s[1] < 3, lambda s: (s[0] * 2, s[1] + 1), (jax.lax.stop_gradient(a), 0))[0]
    return {"chosen": chosen, "sums": sums, "backwards": backwards, "total": total, "which": which, "one": 1.0}


@functools.cache
def program():
    return jax.make_jaxpr(everything, return_shape=True)(jnp.ones((2, 3)), 1)


@pytest.mark.parametrize("walk", [Values(), Unrolled()], ids=["whole", "unrolled"])
def test_a_walk_that_changes_nothing_returns_what_the_function_returns(walk):
    traced, shapes = program()
    x = np.random.default_rng(0).normal(size=(2, 3)).astype(np.float32)
    outs = jax.tree.unflatten(jax.tree.structure(shapes), walk.run(traced, [x, 1]))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), outs, everything(x, 1))


def test_it_may_be_traced_and_differentiated():
    traced, _ = program()
    x = np.random.default_rng(1).normal(size=(2, 3)).astype(np.float32)
    energy = lambda x: sum(jnp.sum(y**2) for y in Values().run(traced, [x, 2]))
    direct = lambda x: sum(jnp.sum(y**2) for y in jax.tree.leaves(everything(x, 2)))
    value, grad = jax.jit(jax.value_and_grad(energy))(x)
    expected, expected_grad = jax.jit(jax.value_and_grad(direct))(x)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(grad, expected_grad, rtol=1e-4, atol=1e-4)


class Sources(Interpreter):
    """Tracks the names a value depends on, without values."""

    def constant(self, aval, value):
        return frozenset()

    def other(self, eqn, ins):
        return [frozenset().union(*ins)] * len(eqn.outvars)


def test_the_state_may_be_abstract():
    def f(a, b, c):
        d = jax.jit(lambda a, b: (a * b, b + 1))(a, b)
        return *d, jax.checkpoint(jnp.sin)(c) * TABLE[0, 1], 2.0

    outs = Sources().run(jax.make_jaxpr(f)(1.0, 1.0, 1.0), [frozenset(name) for name in "abc"])
    assert list(map("".join, map(sorted, outs))) == ["ab", "b", "c", ""]


def test_a_rule_that_does_not_apply_leaves_the_equation_to_the_rest():
    seen = []

    def decline(walk, eqn, ins):
        seen.append(eqn.primitive.name)

    class Declining(Values):
        rules: ClassVar = {"mul": decline, "jit": decline, "custom_jvp_call": lambda walk, eqn, ins: [-ins[0]]}

    f = lambda x: softplus(jax.jit(jnp.sin)(x * 3))
    (y,) = Declining().run(jax.make_jaxpr(f)(1.0), [2.0])
    assert seen == ["mul", "jit"]
    np.testing.assert_allclose(y, -np.sin(6), rtol=1e-6)


def test_calls_and_shapes():
    (eqn,) = jax.make_jaxpr(jax.checkpoint(lambda x: jnp.sin(x) * TABLE[0]))(jnp.ones(4)).eqns
    assert [e.primitive.name for e in called(eqn).eqns] == ["sin", "mul"]
    assert shape(eqn.outvars[0]) == (4,)


def test_a_primitive_has_one_kind():
    assert len(ELEMENTWISE) == sum(map(len, _KINDS.values()))
