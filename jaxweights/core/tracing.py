"""Traces that weights of one kind share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.core import Tracer


def traced_once(f: Callable[..., Any]) -> Callable[..., Any]:
    """f(spec, *arrays), traced once for all arrays of one shape and dtype, and called wherever it is used.

    The layers of a model are alike, and tracing is what a large tree costs. Outside of a trace `f` runs as it is.
    """
    jitted = jax.jit(f, static_argnums=0)

    @functools.wraps(f)
    def call(spec, *arrays):
        traced = any(isinstance(a, Tracer) for a in jax.tree.leaves(arrays))
        return (jitted if traced and is_hashable(spec) else f)(spec, *arrays)

    return call


def is_hashable(spec: Any) -> bool:
    """Whether a spec can be hashed: not if a field is an array, as under `optax.inject_hyperparams`."""
    try:
        hash(spec)
    except TypeError:
        return False
    return True
