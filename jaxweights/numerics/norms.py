"""Norms and quotients without overflow, and with finite gradients at zero."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxweights.numerics.batching import apply_if
from jaxweights.numerics.dtypes import accumulation_dtype


def safe_norm(x: jax.Array, axis: Sequence[int], *, keepdims: bool = False) -> jax.Array:
    """Euclidean norm that neither overflows nor underflows, in float32 or wider.

    √Σx², or m·√Σ(x/m)² with m = max|x| where Σx² is out of range. At x = 0 (and below the smallest normal number) the
    value and the gradient are 0. A NaN or infinite entry gives NaN.
    """
    x = x.astype(accumulation_dtype(x.dtype))
    axis = tuple(a % x.ndim for a in axis)
    if math.prod(x.shape[a] for a in axis) == 0:
        return jnp.sum(x, axis, keepdims=keepdims)
    norm = _norm(axis, x)
    return norm if keepdims else jnp.squeeze(norm, axis)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _norm(axis: tuple[int, ...], x: jax.Array) -> jax.Array:
    def in_one_pass(x):
        square = jnp.sum(jnp.square(x), axis, keepdims=True)
        # Squares below the smallest normal number are lost. Above this bound, they do not show.
        info, n = jnp.finfo(x.dtype), math.prod(x.shape[a] for a in axis)
        out_of_range = (square < n * float(info.tiny) / float(info.eps)) | (square == jnp.inf)
        return apply_if(
            jnp.any(out_of_range), lambda norm: jnp.where(out_of_range, in_two_passes(x), norm), jnp.sqrt(square)
        )

    def in_two_passes(x):
        m = jnp.max(jnp.abs(x), axis, keepdims=True)
        zero = m < jnp.finfo(x.dtype).tiny
        m = jnp.where(zero, 1, m)
        square = jnp.sum(jnp.square(jnp.where(zero, 0, x) / m), axis, keepdims=True)
        return jnp.where(zero, 0, m * jnp.sqrt(square))

    # A branch on the values saves CPUs a pass over x. Elsewhere it costs more than the pass.
    return jax.lax.platform_dependent(x, cpu=in_one_pass, default=in_two_passes)


@_norm.defjvp
def _(axis, primals, tangents):
    """⟨x/‖x‖, ẋ⟩."""
    (x,), (dx,) = primals, tangents
    norm = _norm(axis, x)
    direction = jnp.where(norm == 0, 0, safe_divide(x, norm))
    return norm, jnp.sum(direction * dx, axis, keepdims=True)


@jax.custom_jvp
def safe_divide(x: jax.Array, y: jax.Array) -> jax.Array:
    """x / y, or x where y is 0, with finite gradients for both.

    The derivative is computed as (ẋ − (x/y)·ẏ)/y. JAX's own squares y, which overflows or underflows float32 beyond
    1e±19.
    """
    return x / jnp.where(y == 0, 1, y)


@safe_divide.defjvp
def _(primals, tangents):
    (x, y), (dx, dy) = primals, tangents
    ratio = safe_divide(x, y)
    return ratio, safe_divide(dx - jnp.where(y == 0, 0, ratio) * dy, y)
