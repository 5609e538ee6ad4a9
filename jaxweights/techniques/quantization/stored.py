"""Stored quantization: integer codes and scales in place of the weight."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxweights.core.axes import Axes, Reading
from jaxweights.core.checks import check_integer, check_weight
from jaxweights.core.layer import Layer, transpose
from jaxweights.core.stored import contraction, nbytes
from jaxweights.numerics.dtypes import accumulation_dtype
from jaxweights.numerics.norms import safe_divide


@functools.partial(jax.tree_util.register_dataclass, data_fields=["codes", "scale"], meta_fields=["dtype", "layer"])
@dataclasses.dataclass(frozen=True)
class QuantizedArray:
    """A weight stored as w ≈ codes·scale. A pytree node, one leaf to every level.

    `jit`, `vmap`, `scan` and checkpoints take it. A stack of layers whose batch axes lead is sliced to one layer.

    Attributes:
      codes: int8 array of the shape of the weight.
      scale: float32 array that broadcasts to `codes`, one per output unit.
      dtype: dtype of the weight.
      layer: the shape of one layer, and how it is read as a matrix.
    """

    codes: jax.Array
    scale: jax.Array
    dtype: jnp.dtype
    layer: Layer
    __array_ufunc__ = None  # an array of NumPy leaves x @ w to __rmatmul__

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return self.codes.shape

    @property
    def axes(self) -> Axes:
        """How the weight is read as a matrix."""
        return self.layer.with_batch(self.shape[: self.codes.ndim - len(self.layer.shape)])[1]

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return nbytes(self)

    def todense(self) -> jax.Array:
        """The dequantized weight: codes·scale."""
        return (self.codes.astype(self.scale.dtype) * self.scale).astype(self.dtype)

    def transpose(self, permutation: Sequence[int]) -> QuantizedArray:
        """The weight with its axes in this order."""
        codes, scale = (a.transpose(permutation) for a in (self.codes, self.scale))
        axes = transpose(self.axes, self.shape, permutation)
        return QuantizedArray(codes, scale, self.dtype, Layer.of(axes, codes.shape))

    def astype(self, dtype: jnp.dtype) -> QuantizedArray:
        """The weight in another floating dtype."""
        return dataclasses.replace(self, dtype=jnp.dtype(dtype))

    def read_as(self, axes: Axes) -> QuantizedArray | None:
        """The same weight, read in another way. None where scales vary along both its rows and its columns."""
        r = Reading.of(axes, self.shape)
        if self._scaled(r.contracted) and self._scaled(r.output):
            return None
        shape = [n if a in r.batch else s for a, (n, s) in enumerate(zip(self.shape, self.scale.shape, strict=True))]
        return QuantizedArray(self.codes, jnp.broadcast_to(self.scale, shape), self.dtype, Layer.of(axes, self.shape))

    def take(self, index: jax.Array) -> jax.Array:
        """w[index] along the first axis, for an array of integers in bounds: only those codes are dequantized."""
        scale = self.scale[index] if self._scaled([0]) else self.scale[jnp.zeros_like(index)]
        return (self.codes[index].astype(scale.dtype) * scale).astype(self.dtype)

    def __rmatmul__(self, x: jax.Array) -> jax.Array:
        """x @ w as (x·codes)·scale, or (x·scale)·codes where the scale is one per input."""
        x = check_weight(x, "x")
        r, dtype = contraction(x, self), accumulation_dtype(x.dtype)
        lead = tuple(range(x.ndim - len(r.contracted), x.ndim))
        by_row = self._scaled(r.contracted)
        scale = jnp.squeeze(self.scale, r.output if by_row else r.contracted).astype(dtype)
        scale = jnp.expand_dims(scale, range(x.ndim - len(lead)))
        rows = x.astype(dtype) * scale if by_row else x.astype(dtype)
        y = jax.lax.dot_general(rows, self.codes.astype(dtype), ((lead, r.contracted), ((), ())), precision="highest")
        return (y if by_row else y * scale).astype(x.dtype)

    def _scaled(self, axes: Sequence[int]) -> bool:
        """Whether the scale varies along any of these axes."""
        return any(self.scale.shape[a] != 1 for a in axes)


def quantize(w: jax.Array, bits: int, *, axes: Axes | None = None) -> QuantizedArray:
    """Stores a weight as signed integers with one scale per output unit.

    codes = round(w/s), s = max|w|/(2^(b−1) − 1) over all that one output unit sums over (absmax, symmetric,
    rounded half to even). The error is |w − codes·s| <= s/2.

    Args:
      w: float array of any shape.
      bits: b, from 2 to 8. Codes are int8 for every b.
      axes: how `w` is read as a matrix; (..., in, out) by default. A stack of layers needs its batch axes, as in
        `Axes(batch=0)`: each layer then has scales of its own.

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
    return QuantizedArray(codes, scale, w.dtype, Layer.of(axes, w.shape))


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
