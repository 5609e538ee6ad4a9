"""What the storage formats share: which entries are kept, how many, and what happens if they do not fit."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxweights.core.axes import Axes, axes_or_default
from jaxweights.core.checks import check_integer, check_weight


def kept_matrix(w, mask, axes: Axes | None) -> tuple[jax.Array, jax.Array]:
    """(w, mask) as matrices, or an error. Without a mask, the entries that are not 0 are kept."""
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
    """The number of entries to allocate: the number of true entries of `kept`, or `given` if it is large enough."""
    if given is not None:
        check_integer(name, given, 0)
    if isinstance(kept, Tracer):
        if given is None:
            raise ValueError(f"{name} must be given under jit, where the mask has no value yet")
        return given
    found = int(np.count_nonzero(kept))
    if given is not None and found > given:
        raise ValueError(f"{name} must be at least {found}, the number that the mask keeps, got {given}")
    return found if given is None else given


def nan_unless(fits: jax.Array, values: jax.Array) -> jax.Array:
    """`values` where they fit, else NaN: under jit no error can be raised, but entries must not be lost silently."""
    return jnp.where(fits, values, jnp.full((), jnp.nan, values.dtype))
