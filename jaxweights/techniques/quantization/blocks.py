"""Codes, scales and zero points of blocks of weights: one definition for training and for storage."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxweights.numerics.norms import safe_divide
from jaxweights.techniques.quantization.formats import Format
from jaxweights.techniques.quantization.grids import Integers


class Parts(NamedTuple):
    """What a block is coded with. Arrays that broadcast to the weights.

    Attributes:
      scale: not negative, float32.
      zero: the zero point, in units of the scale, or None: integers in 8 bits, or floats of the dtype of the scales.
      reach: scale·peak, exactly. Powers of two are chosen by it.
    """

    scale: jax.Array
    zero: jax.Array | None = None
    reach: jax.Array | None = None


def bounded(low: jax.Array, high: jax.Array, format: Format, *, exact_zero: bool = False) -> Parts:
    """The scale, and zero point if there is one, for weights from `low` to `high`.

    Without a zero point, `high` comes to lie at the peak of the grid. With one, `low` and `high` come to lie at its
    ends. The zero point is rounded to an integer unless it is to be exact.
    """
    grid = format.grid
    if not format.zero_point:
        return Parts(stored_scale(high / grid.peak, high, format), None, high)
    assert isinstance(grid, Integers)
    n_steps = grid.high - grid.low
    wanted = (high * 0.5 - low * 0.5) / (n_steps * 0.5)  # halves are exact, so a fused multiply-add changes nothing
    reach = wanted * grid.peak
    scale = stored_scale(wanted, reach, format)
    zero = grid.low - _in_units(low, scale)
    if exact_zero:
        return Parts(scale, zero.astype(_dtype_of_zeros(format)), reach)
    integer = jnp.uint8 if grid.low >= 0 else jnp.int8
    return Parts(scale, jnp.clip(jnp.round(zero), grid.low, grid.high).astype(integer), reach)


def _dtype_of_zeros(format: Format) -> str:
    """The dtype of zero points that are no integers."""
    return format.scale.dtype if format.scale.dtype in ("float16", "bfloat16") else "float32"


def stored_scale(scale: jax.Array, reach: jax.Array, format: Format) -> jax.Array:
    """A scale as it will be read back, if it has no factor. Those with one are rounded once all are known."""
    if format.scale.outer is not None:
        return scale.astype(jnp.float32)
    return format.scale.encode(scale, reach, format.grid.peak).values()


def encode(x: jax.Array, parts: Parts, format: Format, uniform: jax.Array | None = None) -> jax.Array:
    """The codes of weights, rounded to nearest, or stochastically with draws from [0, 1)."""
    value = _in_units(x, parts.scale)
    if parts.zero is not None:
        value = value + parts.zero.astype(x.dtype)
    return format.grid.encode(value, uniform)


def _in_units(x: jax.Array, scale: jax.Array) -> jax.Array:
    """x/scale, as a product with 1/scale.

    XLA makes one of a quotient in some programs, so that codes would depend on the program, and loses those reciprocals
    that are subnormal.
    """
    scale = scale.astype(x.dtype)
    unit = jnp.where(scale > 1, 2.0**-8, 1).astype(x.dtype)
    return x * unit * safe_divide(jnp.ones((), x.dtype), scale * unit)


def decode(codes: jax.Array, parts: Parts, format: Format) -> jax.Array:
    """The weights of codes, float32: value(code)·scale, or (value(code) − zero)·scale."""
    value = format.grid.decode(codes)
    if parts.zero is not None:
        value = value - parts.zero.astype(jnp.float32)
    return value * parts.scale


def in_dtype(w: jax.Array, dtype) -> jax.Array:
    """Decoded weights in the dtype that they are for. A value beyond the range of float16 becomes the largest in it."""
    if dtype == jnp.float16:
        largest = float(jnp.finfo(dtype).max)
        w = jnp.clip(w, -largest, largest)
    return w.astype(dtype)
