"""Fake quantization: weights rounded to a grid and kept in their dtype, for training."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxweights.core.axes import Axes, Reading, axes_or_default
from jaxweights.core.checks import check_integer, check_weight
from jaxweights.core.transform import Transform
from jaxweights.numerics.dtypes import accumulation_dtype
from jaxweights.numerics.norms import safe_divide
from jaxweights.numerics.straight_through import straight_through

_MAX_BITS = 16  # with more, float32 does not distinguish the levels


def fake_quantize(w: jax.Array, bits: int, *, axes: Axes | None = None) -> jax.Array:
    """Rounds a weight to 2^bits evenly spaced values between its minimum and maximum.

    w_q = round((w − w_min)/(w_max − w_min)·(2^b − 1))·(w_max − w_min)/(2^b − 1) + w_min, rounded half to even.
    The gradient is passed straight through: ∂w_q/∂w = 1.

    Args:
      w: float array of any shape.
      bits: b, from 1 to 16.
      axes: if given, each output unit has its own range; by default there is one for the whole tensor.

    Returns:
      Array of the shape and dtype of `w`, computed in float32 or wider. Equal weights stay unchanged. A NaN or infinite
      weight makes everything that shares its range NaN.

    Raises:
      TypeError: `w` is not a float array, or `bits` is not an integer.
      ValueError: `bits` is out of range, or `axes` does not fit `w`.

    >>> import jax.numpy as jnp
    >>> print(fake_quantize(jnp.array([0.0, 0.2, 0.6, 1.0]), 1))
    [0. 0. 1. 1.]

    References: Jacob et al., Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
    Inference, arXiv:1712.05877, 2017; Bengio, Léonard and Courville, Estimating or Propagating Gradients Through
    Stochastic Neurons for Conditional Computation, arXiv:1308.3432, 2013.
    """
    w = check_weight(w)
    check_integer("bits", bits, 1, _MAX_BITS)
    over = tuple(range(w.ndim)) if axes is None else Reading.of(axes, w.shape).contracted
    if w.size == 0:
        return w
    x = jax.lax.stop_gradient(w.astype(accumulation_dtype(w.dtype)))
    levels = 2**bits - 1
    low, high = jnp.min(x, over, keepdims=True), jnp.max(x, over, keepdims=True)
    unit = jnp.where(jnp.maximum(-low, high) > 1, 1 / 16, 1).astype(x.dtype)  # else the range or 1/range may overflow
    span = high * unit - low * unit
    code = jnp.round(safe_divide(x * unit - low * unit, span) * levels)
    rounded = jnp.where(code == levels, high, (low * unit + code / levels * span) / unit)  # the maximum exactly
    return straight_through(w, jnp.where(high == low, x, rounded).astype(w.dtype))


@dataclasses.dataclass(frozen=True)
class FakeQuantize(Transform):
    """Quantization-aware training: weights on a grid of 2^bits values, gradients straight through.

    State: none. The range is that of the current weights: of the whole tensor, or of each output unit if `per_unit`.

    >>> import jax.numpy as jnp
    >>> print(FakeQuantize(1).apply(jnp.array([0.0, 0.2, 0.6, 1.0]), {}))
    [0. 0. 1. 1.]
    """

    bits: int
    per_unit: bool = False
    axes: Axes | None = None
    takes_axes: ClassVar[bool] = True
    unitwise: ClassVar[bool] = True

    def __post_init__(self):
        check_integer("bits", self.bits, 1, _MAX_BITS)
        if self.axes is not None and not self.per_unit:
            raise ValueError(f"axes={self.axes} applies to ranges per output unit only: give per_unit=True too")

    def with_axes(self, axes):
        """Sets `axes` only if ranges are per output unit."""
        return super().with_axes(axes) if self.per_unit else self

    def apply(self, w, state):
        """`fake_quantize(w, bits)`, per output unit if `per_unit`."""
        axes = axes_or_default(self.axes, jnp.ndim(w)) if self.per_unit else None
        return fake_quantize(w, self.bits, axes=axes)
