"""Quantized weights whose first row or column axis becomes a batch axis, so that JAX slices their arrays along it."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from jaxweights.core.layer import Layer
from jaxweights.core.packing import rows_of_a_period
from jaxweights.core.stacks import first_axis, split

if TYPE_CHECKING:
    from jaxweights.techniques.quantization.array import QuantizedArray
    from jaxweights.techniques.quantization.scales import Scales


def stacked(q: QuantizedArray) -> QuantizedArray | None:
    """The weight with its first axis as a batch axis; None where a slice has not whole words and blocks of its own."""
    found = first_axis(q.axes, q.shape)
    if found is None:
        return None
    (axes, of_rows), n = found, q.shape[0]
    if of_rows and (q.order is not None or not _divides(q, q.rows // n)):
        return None
    return dataclasses.replace(_split_rows(q, n) if of_rows else _split_columns(q, n), layer=Layer.of(axes, q.shape))


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
    moved: Any = jax.tree.map(lambda a: split(a, n, -2), dataclasses.replace(q, input_scale=None))
    return dataclasses.replace(moved, input_scale=None if q.input_scale is None else split(q.input_scale, n, -1))


def _split_columns(q: QuantizedArray, n: int) -> QuantizedArray:
    """The columns in n equal runs. Arrays (*batch, rows, N) become (n, *batch, rows, N/n)."""
    moved: Any = jax.tree.map(lambda a: split(a, n, -1), dataclasses.replace(q, order=None, input_scale=None))
    order, input_scale = (None if a is None else jnp.broadcast_to(a, (n, *a.shape)) for a in (q.order, q.input_scale))
    return dataclasses.replace(moved, order=order, input_scale=input_scale)
