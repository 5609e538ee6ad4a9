"""Interleaved timing of two programs, so that background load affects both."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

Program = Callable[[int], Any]
"""Runs n times and waits for the results."""

SAMPLE_SECONDS = 0.01  # fast programs are repeated to last this long


@dataclasses.dataclass(frozen=True)
class Spread:
    """Quartiles: lower, median, upper."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values) -> Spread:
        return cls(*(float(q) for q in np.quantile(values, (0.25, 0.5, 0.75))))


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Seconds per run of two programs, and their per-round ratio."""

    ours: Spread
    theirs: Spread
    ratio: Spread
    rounds: int

    @classmethod
    def of(cls, samples: list[tuple[float, float]]) -> Comparison:
        ours, theirs = np.array(samples).T
        return cls(Spread.of(ours), Spread.of(theirs), Spread.of(ours / theirs), len(samples))


@dataclasses.dataclass(frozen=True)
class Effort:
    """Limits: at most `rounds` rounds; after the first, none starts later than `seconds`."""

    rounds: int
    seconds: float


def compare(ours: Program, theirs: Program, effort: Effort) -> Comparison:
    """Times both programs in rounds of alternating order. A warm-up longer than the limit is itself the result."""
    warm_up = seconds(ours, 1), seconds(theirs, 1)
    repeats = math.ceil(SAMPLE_SECONDS / min(warm_up))
    if sum(warm_up) > effort.seconds:
        return Comparison.of([warm_up])
    samples: list[tuple[float, float]] = []
    start = time.perf_counter()
    while not samples or (len(samples) < effort.rounds and time.perf_counter() - start < effort.seconds):
        if len(samples) % 2:
            theirs_seconds = seconds(theirs, repeats)
            samples.append((seconds(ours, repeats), theirs_seconds))
        else:
            samples.append((seconds(ours, repeats), seconds(theirs, repeats)))
    return Comparison.of(samples)


def seconds(program: Program, repeats: int) -> float:
    """Mean seconds per run."""
    start = time.perf_counter()
    program(repeats)
    return (time.perf_counter() - start) / repeats


def function(f: Callable, *args: Any) -> Program:
    """Calls a jitted function with the same arguments every time."""
    compiled = jax.jit(f).lower(*args).compile()

    def run(n: int) -> None:
        for _ in range(n):
            out = compiled(*args)
        jax.block_until_ready(out)

    return run


def step(f: Callable, carry: Any, *args: Any) -> Program:
    """Iterates a jitted step carry -> carry with donated buffers, starting from a copy of `carry`."""
    compiled = jax.jit(f, donate_argnums=0).lower(carry, *args).compile()
    carry = jax.tree.map(lambda a: a.copy(), carry)

    def run(n: int) -> None:
        nonlocal carry
        for _ in range(n):
            carry = compiled(carry, *args)
        jax.block_until_ready(carry)

    return run


def compilation(f: Callable, *args: Any) -> Program:
    """Traces and compiles a function from scratch."""

    def run(n: int) -> None:
        for _ in range(n):
            jax.jit(lambda *a: f(*a)).lower(*args).compile()

    return run


def temporary_bytes(f: Callable, *args: Any) -> int:
    """Bytes the compiled function allocates besides its arguments and results."""
    return jax.jit(f).lower(*args).compile().memory_analysis().temp_size_in_bytes
