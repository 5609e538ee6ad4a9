"""Quantized weights whose first row or column axis becomes a batch axis, so that JAX slices their arrays along it."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from jaxweights.core.axes import Axes, Reading
from jaxweights.core.layer import Layer
from jaxweights.techniques.quantization.packing import rows_of_a_period

if TYPE_CHECKING:
    from jaxweights.techniques.quantization.array import QuantizedArray
    from jaxweights.techniques.quantization.scales import Scales


def stacked(q: QuantizedArray) -> QuantizedArray | None:
    """The weight with its first axis as a batch axis; None where a slice has not whole words and blocks of its own."""
    r = Reading.of(q.axes, q.shape)
    if r.groups > 1 or not q.shape or not q.shape[0]:
        return None
    if r.output[:1] == (0,):
        split = _split_columns(q, q.shape[0])
    elif r.contracted[:1] == (0,) and q.order is None and _divides(q, q.rows // q.shape[0]):
        split = _split_rows(q, q.shape[0])
    else:
        return None
    left = (tuple(a for a in axes if a != 0) for axes in (r.input, r.output, r.window))
    input, output, window = left
    axes = Axes(input, output, (0, *sorted(r.batch)), window)
    return dataclasses.replace(split, layer=Layer.of(axes, q.shape))


def _divides(q: QuantizedArray, rows: int) -> bool:
    """Whether this many rows are whole words, and whole blocks unless there is just one."""
    n_blocks, block = q.format.blocks(q.rows)

    def whole_factors(scale: Scales | None) -> bool:
        if scale is None or scale.outer is None or scale.outer.shape[-2] == 1:
            return True
        return rows % (block * (scale.format.outer or 1)) == 0

    whole = rows % rows_of_a_period(q.format.grid.bits) == 0 and (n_blocks == 1 or rows % block == 0)
    return whole and whole_factors(q.scale) and whole_factors(q.minimum)


def _split_rows(q: QuantizedArray, n: int) -> QuantizedArray:
    """The rows in n equal runs. Arrays (*batch, ..., N) become (n, *batch, ..., N)."""

    def split(a: jax.Array, axis: int = -2) -> jax.Array:
        axis += a.ndim
        if a.shape[axis] == 1:
            return jnp.broadcast_to(a, (n, *a.shape))
        return jnp.moveaxis(a.reshape(*a.shape[:axis], n, a.shape[axis] // n, *a.shape[axis + 1 :]), axis, 0)

    moved: Any = jax.tree.map(split, dataclasses.replace(q, input_scale=None))
    return dataclasses.replace(moved, input_scale=None if q.input_scale is None else split(q.input_scale, -1))


def _split_columns(q: QuantizedArray, n: int) -> QuantizedArray:
    """The columns in n equal runs. Arrays (*batch, rows, N) become (n, *batch, rows, N/n)."""

    def split(a: jax.Array) -> jax.Array:
        if a.shape[-1] == 1:
            return jnp.broadcast_to(a, (n, *a.shape))
        return jnp.moveaxis(a.reshape(*a.shape[:-1], n, a.shape[-1] // n), -2, 0)

    moved: Any = jax.tree.map(split, dataclasses.replace(q, order=None, input_scale=None))
    order, input_scale = (None if a is None else jnp.broadcast_to(a, (n, *a.shape)) for a in (q.order, q.input_scale))
    return dataclasses.replace(moved, order=order, input_scale=input_scale)
