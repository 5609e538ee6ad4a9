"""Stored quantization: integer codes and scales in place of the weight."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from jaxweights.core.axes import Axes, Reading
from jaxweights.core.checks import check_integer, check_weight
from jaxweights.core.stored import contraction, nbytes
from jaxweights.numerics.dtypes import accumulation_dtype
from jaxweights.numerics.norms import safe_divide


@functools.partial(jax.tree_util.register_dataclass, data_fields=["codes", "scale"], meta_fields=["dtype", "axes"])
@dataclasses.dataclass(frozen=True)
class QuantizedArray:
    """A weight stored as w ≈ codes·scale. A pytree node, which works with jit, vmap and checkpoints.

    Attributes:
      codes: int8 array of the shape of the weight.
      scale: float32 array that broadcasts to `codes`, one per output unit.
      dtype: dtype of the weight.
      axes: how the weight is read as a matrix.
    """

    codes: jax.Array
    scale: jax.Array
    dtype: jnp.dtype
    axes: Axes | None = None
    __array_ufunc__ = None  # an array of NumPy leaves x @ w to __rmatmul__

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return self.codes.shape

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return nbytes(self)

    def todense(self) -> jax.Array:
        """The dequantized weight: codes·scale."""
        return (self.codes.astype(self.scale.dtype) * self.scale).astype(self.dtype)

    def __rmatmul__(self, x: jax.Array) -> jax.Array:
        """x @ w as (x · codes)·scale, with the scale applied after the product."""
        x = check_weight(x, "x")
        r, dtype = contraction(x, self), accumulation_dtype(x.dtype)
        lead = tuple(range(x.ndim - len(r.contracted), x.ndim))
        y = jax.lax.dot_general(
            x.astype(dtype), self.codes.astype(dtype), ((lead, r.contracted), ((), ())), precision="highest"
        )
        return (y * jnp.squeeze(self.scale, r.contracted).astype(dtype)).astype(x.dtype)


def quantize(w: jax.Array, bits: int, *, axes: Axes | None = None) -> QuantizedArray:
    """Stores a weight as signed integers with one scale per output unit.

    codes = round(w/s), s = max|w|/(2^(b−1) − 1) over all that one output unit sums over (absmax, symmetric,
    rounded half to even). The error is |w − codes·s| <= s/2.

    Args:
      w: float array of any shape.
      bits: b, from 2 to 8. Codes are int8 for every b.
      axes: how `w` is read as a matrix; (..., in, out) by default.

    Returns:
      A `QuantizedArray`. A unit of zeros has scale 0. Weights must be finite.

    Raises:
      TypeError: `w` is not a float array, or `bits` is not an integer.
      ValueError: `bits` is out of range, or `axes` does not fit `w`.

    >>> import jax.numpy as jnp
    >>> q = quantize(jnp.array([[1.27, -0.5], [0.64, 0.25]]), 8)
    >>> print(q.codes, q.nbytes)
    [[ 127 -127]
     [  64   64]] 12

    References: Jacob et al., arXiv:1712.05877, 2017; Nagel et al., A White Paper on Neural Network Quantization,
    arXiv:2106.08295, 2021.
    """
    w = check_weight(w)
    check_integer("bits", bits, 2, 8)
    x = w.astype(accumulation_dtype(w.dtype))
    largest = 2 ** (bits - 1) - 1
    peak = jnp.max(jnp.abs(x), Reading.of(axes, w.shape).contracted, keepdims=True, initial=0)
    scale = (peak / largest).astype(jnp.float32)
    codes = jnp.clip(jnp.round(safe_divide(x, scale.astype(x.dtype))), -largest, largest).astype(jnp.int8)
    return QuantizedArray(codes, scale, w.dtype, axes)


def dequantize(q: QuantizedArray) -> jax.Array:
    """The weight that a `QuantizedArray` represents: codes·scale, in its original dtype.

    >>> import jax.numpy as jnp
    >>> print(dequantize(quantize(jnp.array([2.0, -1.0, 0.0]), 2)))
    [2. 0. 0.]
    """
    if not isinstance(q, QuantizedArray):
        tree = "map over a tree with jax.tree.map and is_leaf=lambda a: isinstance(a, QuantizedArray)"
        raise TypeError(f"q must be a QuantizedArray, got {type(q).__name__}: make one with quantize(w, bits), {tree}")
    return q.todense()
