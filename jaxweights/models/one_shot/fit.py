"""One weight, fitted by one-shot methods."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxweights.core.calibration import InputStats
from jaxweights.core.checks import naming
from jaxweights.core.method import Method
from jaxweights.core.stored import is_stored
from jaxweights.core.tracing import is_hashable


def fit(methods: Sequence[Method], path: str, w: Any, stats: InputStats) -> Any:
    """Applies methods to a weight, one after the other, and waits for the result. Errors name the path."""
    new: Any = jnp.asarray(w)
    for method in methods:
        with naming(type(method).__name__, path):
            if is_stored(new):
                raise ValueError(f"it is given a {type(new).__name__}: put the method that stores a weight last")
            run = _jitted if method.traceable and is_hashable(method) else _fit
            new = run(method, new, stats)
            if new.shape != w.shape:
                raise ValueError(f"fit returned a weight of shape {new.shape}: it must keep the shape {w.shape}")
    return jax.block_until_ready(new)


def _fit(method: Method, w: jax.Array, stats: InputStats) -> Any:
    return method.fit(w, stats)


_jitted = functools.partial(jax.jit, static_argnums=0)(_fit)
"""Compiled once for all weights of one shape and reading."""
