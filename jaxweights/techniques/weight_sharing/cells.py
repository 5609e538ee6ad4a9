"""The values of a weight as few sorted cells: what k-means in one dimension needs to know of it."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxweights.numerics.dtypes import accumulation_dtype
from jaxweights.techniques.weight_sharing.groups import group_means
from jaxweights.techniques.weight_sharing.importance import QUARTER, Importance

N_CELLS = 2**14
"""The most cells. A weight of up to as many entries has one for each of them."""


class Cells(NamedTuple):
    """Sorted values, and how many entries each stands for, or how much these matter (0 for a cell that is empty)."""

    value: jax.Array
    size: jax.Array


def quarter(w: jax.Array) -> jax.Array:
    """A quarter of `w`, in the dtype to accumulate in: the difference of two does not overflow."""
    return w.astype(accumulation_dtype(w.dtype)) * QUARTER


def cells_of(w: jax.Array, importance: Importance | None, *, keep_zeros: bool) -> Cells:
    """Quarters of the sorted entries of a small array, or their histogram. Without zeros, if these are kept.

    A cell of the histogram has a width of (max − min)/`N_CELLS`, and the mean of its entries for a value. With
    `importance`, the size of a cell is that of its entries.
    """
    counted = w != 0 if keep_zeros else jnp.ones(w.shape, bool)
    is_small = w.size <= N_CELLS
    if is_small and importance is not None:
        counted &= importance.relative(importance.values) > 0
    largest = jnp.finfo(w.dtype).max
    low, high = (quarter(f(w, where=counted, initial=end)) for f, end in ((jnp.min, largest), (jnp.max, -largest)))
    low, high = (jnp.where(jnp.any(counted), end, 0) for end in (low, high))
    if is_small:
        x = quarter(w)
        rank = jnp.where(counted, x, jnp.finfo(x.dtype).max).ravel()  # what does not count comes last
        size = counted.astype(x.dtype)
        if importance is not None:
            size *= importance.relative(importance.values).astype(x.dtype)
        value, size = jax.lax.sort([rank, size.ravel()], num_keys=1)
        return Cells(jnp.where(size > 0, value, high), size)
    width = (high - low) / N_CELLS

    def cell(w):
        place = jnp.where(width > 0, jnp.floor((quarter(w) - low) / width), 0).astype(jnp.int32)
        place = jnp.clip(place, 0, N_CELLS - 1)
        return jnp.where(w == 0, -1, place) if keep_zeros else place

    mean, size = group_means(w, cell, N_CELLS, importance)
    empty = low + (jnp.arange(N_CELLS, dtype=mean.dtype) + mean.dtype.type(0.5)) * width
    return Cells(jnp.where(size > 0, mean * QUARTER, empty), size.astype(mean.dtype))
