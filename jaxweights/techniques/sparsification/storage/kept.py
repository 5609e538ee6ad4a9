"""What the storage formats share: which entries are kept, how many, and what happens if they do not fit."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxweights.core.axes import Axes
from jaxweights.core.checks import check_integer, check_weight
from jaxweights.core.layer import Layer, stored_matrix


def kept_matrix(w, mask, axes: Axes | None) -> tuple[jax.Array, jax.Array, Layer]:
    """(w as matrices, the mask as matrices, the layer of w), or an error. Without a mask, what is not 0 is kept.

    The batch axes lead, in the order that they have in `w`.
    """
    w = check_weight(w)
    if mask is None:
        mask = w != 0
    if not isinstance(mask, jax.Array | np.ndarray) or mask.dtype != jnp.bool_:
        kind = getattr(mask, "dtype", type(mask).__name__)
        raise TypeError(f"mask must be a boolean array or None, got {kind}: compare it with a number")
    if mask.shape != w.shape:
        raise ValueError(f"mask must have the shape {w.shape} of w, got {mask.shape}: one entry per weight")
    matrix, layer = stored_matrix(w, axes)
    return matrix, stored_matrix(jnp.asarray(mask), axes)[0], layer


def capacity(name: str, kept: jax.Array, given: int | None) -> int:
    """How many entries to allocate for a matrix: `given` if they are enough, by default as many as `kept` has."""
    if given is not None:
        check_integer(name, given, 0)
    if isinstance(kept, Tracer):
        if given is None:
            raise ValueError(f"{name} must be given under jit, where the mask has no value yet")
        return given
    found = int(np.count_nonzero(kept, (-2, -1)).max(initial=0))
    if given is not None and found > given:
        raise ValueError(f"{name} must be at least {found}, the number that the mask keeps, got {given}")
    return found if given is None else given


def nan_unless(fits: jax.Array, values: jax.Array) -> jax.Array:
    """`values` where they fit, else NaN: under jit no error can be raised, but entries must not be lost silently."""
    return jnp.where(fits, values, jnp.full((), jnp.nan, values.dtype))
