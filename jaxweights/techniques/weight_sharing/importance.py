"""How much each entry of a weight counts in its clustering."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxweights.numerics.dtypes import accumulation_dtype

_LEAST = 1e-12
QUARTER = 0.25


class Importance(NamedTuple):
    """The importance of each entry, and what it is divided by: 0 if all entries count alike."""

    values: jax.Array
    largest: jax.Array

    def relative(self, values: jax.Array) -> jax.Array:
        """Importance from 0 to 1. What is less than 1e-12 of the largest is 0."""
        h = values.astype(self.largest.dtype) * QUARTER
        is_given = self.largest > 0
        h = jnp.where(is_given, h, 1) / jnp.where(is_given, self.largest, 1)
        return jnp.where(h < _LEAST, 0, jnp.minimum(h, 1))


def importance_of(values: jax.Array, counted: jax.Array | None) -> tuple[Importance, jax.Array]:
    """(the importance of the entries, whether all are finite and none is negative).

    All entries count alike if none that is `counted` has any, or some value is not valid.
    """
    h = values.astype(accumulation_dtype(values.dtype))
    is_valid = jnp.all(jnp.isfinite(h) & (h >= 0))
    # A quarter: XLA multiplies by the reciprocal, which must not underflow.
    largest = jnp.max(h, where=counted, initial=0) * QUARTER
    is_given = is_valid & (largest >= jnp.finfo(h.dtype).tiny)
    return Importance(values, jnp.where(is_given, largest, 0)), is_valid
