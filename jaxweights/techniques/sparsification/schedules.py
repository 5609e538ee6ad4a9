"""Schedules of sparsity for `Prune`: functions step -> fraction of zeros. Any optax schedule works too."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxweights.core.checks import check_integer, check_scalar
from jaxweights.core.transform import Number


@dataclasses.dataclass(frozen=True)
class PolynomialSparsity:
    """Gradual pruning: sparsity moves from `initial` at step `begin` to `final` at step `end`.

    s_t = s_f + (s_i − s_f)·(1 − (t − t₀)/(t₁ − t₀))^power, where t advances by `every` steps at a time. Before `begin`
    sparsity is 0. With `end` = `begin` it jumps to `final`.

    >>> schedule = PolynomialSparsity(0.8, 100, 200)
    >>> [round(float(schedule(step)), 3) for step in (0, 100, 150, 200, 300)]
    [0.0, 0.0, 0.7, 0.8, 0.8]

    References: Zhu and Gupta, arXiv:1710.01878, 2017, who use power 3.
    """

    final: float
    begin: int
    end: int
    _: dataclasses.KW_ONLY
    initial: float = 0.0
    power: float = 3.0
    every: int = 1

    def __post_init__(self):
        check_scalar("final", self.final, 0, 1)
        check_scalar("initial", self.initial, 0, 1)
        check_scalar("power", self.power, 0)
        check_integer("begin", self.begin, 0)
        check_integer("end", self.end, self.begin)
        check_integer("every", self.every, 1)

    def __call__(self, step: Number) -> jax.Array:
        """Returns the sparsity at `step`."""
        step = jnp.asarray(step, jnp.int32)
        passed = (step - self.begin) // self.every * self.every / max(self.end - self.begin, 1)
        gradual = self.final + (self.initial - self.final) * jnp.clip(1 - passed, 0, 1) ** self.power
        return jnp.where(step >= self.end, self.final, jnp.where(step < self.begin, 0.0, gradual))


@dataclasses.dataclass(frozen=True)
class AlternatingSparsity:
    """AC/DC: from step `begin`, phases of `sparse` steps at the given sparsity alternate with `dense` steps at 0.

    From step `end` on, sparsity stays. Each sparse phase chooses its mask from all weights.

    >>> schedule = AlternatingSparsity(0.9, sparse=2, dense=1, begin=1, end=6)
    >>> [round(float(schedule(step)), 1) for step in range(8)]
    [0.0, 0.9, 0.9, 0.0, 0.9, 0.9, 0.9, 0.9]

    References: Peste, Iofinova, Vladu and Alistarh, AC/DC: Alternating Compressed/DeCompressed Training of Deep Neural
    Networks, arXiv:2106.12379, 2021.
    """

    sparsity: float
    _: dataclasses.KW_ONLY
    sparse: int
    dense: int
    begin: int
    end: int

    def __post_init__(self):
        check_scalar("sparsity", self.sparsity, 0, 1)
        check_integer("sparse", self.sparse, 1)
        check_integer("dense", self.dense, 1)
        check_integer("begin", self.begin, 0)
        check_integer("end", self.end, self.begin)

    def __call__(self, step: Number) -> jax.Array:
        """Returns the sparsity at `step`."""
        step = jnp.asarray(step, jnp.int32)
        sparse = (step >= self.begin) & ((step - self.begin) % (self.sparse + self.dense) < self.sparse)
        return jnp.where(sparse | (step >= self.end), self.sparsity, 0.0)
