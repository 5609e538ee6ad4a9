"""What the formats share: which entries are kept, how many, and what happens to those that do not fit."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxweights.core.axes import Axes, axes_or_default
from jaxweights.core.checks import check_integer, check_weight


def kept_matrix(w, mask, axes: Axes | None) -> tuple[jax.Array, jax.Array]:
    """(w, mask) as matrices, or an error; without a mask what is not 0 is kept."""
    w = check_weight(w)
    if mask is None:
        mask = w != 0
    if not isinstance(mask, jax.Array | np.ndarray) or mask.dtype != jnp.bool_:
        kind = getattr(mask, "dtype", type(mask).__name__)
        raise TypeError(f"mask must be a boolean array or None, got {kind}: compare it with a number")
    if mask.shape != w.shape:
        raise ValueError(f"mask must have the shape {w.shape} of w, got {mask.shape}: one entry per weight")
    axes = axes_or_default(axes, w.ndim)
    return axes.matrix(w), axes.matrix(mask)


def capacity(name: str, kept: jax.Array, given: int | None) -> int:
    """The number of True entries, which sizes the arrays, or `given`, which must not be less."""
    if given is not None:
        check_integer(name, given, 0)
    if isinstance(kept, Tracer):
        if given is None:
            raise ValueError(f"{name} must be given under jit: how much is kept is not known there")
        return given
    found = int(np.count_nonzero(kept))
    if given is not None and found > given:
        raise ValueError(f"{name} must be at least {found}, what the mask keeps, got {given}")
    return found if given is None else given


def loud(values: jax.Array, fits: jax.Array) -> jax.Array:
    """`values` where they fit, else NaN: under jit, where no error can be raised, nothing is lost silently."""
    return jnp.where(fits, values, jnp.full((), jnp.nan, values.dtype))
