"""Says so where weights are trained while the state of their transform stays as it is."""

from __future__ import annotations

import functools
import warnings

import jax
import jax.numpy as jnp

from jaxweights.core.tracing import is_hashable
from jaxweights.core.transform import Transform


class StaleStateWarning(UserWarning):
    """A weight is being trained, and the state of its transform, which should move with it, stays as it is."""


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def warn_if_differentiated(message: str, w: jax.Array) -> jax.Array:
    """`w`, with a warning when a derivative in it is taken, in a jitted function, a loop or `jax.checkpoint` too."""
    return w


@warn_if_differentiated.defjvp
def _warn(message, primals, tangents):
    warnings.warn(message, StaleStateWarning, stacklevel=1)
    (w,), (tangent,) = primals, tangents
    return w, tangent


def state_moves(t: Transform, w: jax.Array) -> bool:
    """Whether an update changes an entry of the state that is not learned."""
    moves = _moves if is_hashable(t) else _moves.__wrapped__
    return moves(t, jnp.shape(w), jnp.result_type(w))


@functools.lru_cache(maxsize=1024)
def _moves(t: Transform, shape: tuple[int, ...], dtype: jnp.dtype) -> bool:
    w = jax.ShapeDtypeStruct(shape, dtype)
    state = jax.eval_shape(lambda w: t.init(w, jax.random.key(0)), w)
    program = jax.make_jaxpr(t.update)(w, state, w).jaxpr
    entries = zip(sorted(state), program.invars[1:], program.outvars, strict=False)
    return any(before is not after for name, before, after in entries if name not in t.learned)
