"""A quantized weight: packed codes, scales, and what else it takes to multiply by it."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxweights.core.axes import Axes, Reading
from jaxweights.core.checks import check_dtype, check_weight
from jaxweights.core.layer import Layer, same_matrices
from jaxweights.core.matrices import StoredMatrices
from jaxweights.core.packing import unpack, unpack_rows
from jaxweights.core.stored import product
from jaxweights.techniques.quantization.blocks import Parts, decode, in_dtype
from jaxweights.techniques.quantization.formats import Format
from jaxweights.techniques.quantization.products.product import times
from jaxweights.techniques.quantization.scales import Scales
from jaxweights.techniques.quantization.stacks import stacked

_FIELDS = ("words", "scale", "zero", "minimum", "order", "input_scale")


@functools.partial(jax.tree_util.register_dataclass, data_fields=_FIELDS, meta_fields=["format", "dtype", "layer"])
@dataclasses.dataclass(frozen=True)
class QuantizedArray(StoredMatrices):
    """A weight in few bits: w ≈ (value(code) − zero)·scale. A pytree node, one leaf to every level.

    The weight is stored as a matrix of K rows, its inputs, and N columns, its output units. Batch axes lead: `jit`,
    `vmap`, `scan` and checkpoints take it, and a loop over a stack sees one layer at a time.

    Attributes:
      words: int32 (*batch, [groups,] words, N), the codes as `jaxweights.formats.pack` packs them along the rows.
      scale: `Scales` of (*batch, [groups,] blocks, N), or of sizes 1 where they share one.
      zero: zero points of the shape of the scales, in units of the scale, or None.
      minimum: `Scales` of what is subtracted from value(code)·scale, or None. Only files of llama.cpp have it.
      order: int32 (*batch, [groups,] K), or None: stored row i is row order[i] of the weight.
      input_scale: (*batch, [groups,] K), or None: row k of the weight is that of the codes times input_scale[k].
      format: the `Format`.
      dtype: dtype of the weight.
      layer: the shape of one layer, and how it is read as a matrix.
    """

    words: jax.Array
    scale: Scales
    zero: jax.Array | None
    minimum: Scales | None
    order: jax.Array | None
    input_scale: jax.Array | None
    format: Format
    dtype: jnp.dtype
    layer: Layer
    _array = ("words", 2)

    @property
    def rows(self) -> int:
        """K, the number of inputs of an output unit."""
        r = Reading.of(self.axes, self.shape)
        return math.prod(self.shape[a] for a in r.contracted)

    @property
    def codes(self) -> jax.Array:
        """The codes, int32 (*batch, [groups,] K, N)."""
        return unpack(self.words, self.format.grid.bits, self.rows)

    @jax.jit
    def matrix(self) -> jax.Array:
        """The dequantized weight as a matrix, float32 (*batch, [groups,] K, N), the rows in the order of the weight."""
        rows = self.rows
        n_blocks, block = self.format.blocks(rows)

        def over_rows(values: jax.Array) -> jax.Array:
            if values.shape[-2] == 1:
                return values
            *lead, columns = values.shape
            spread = jnp.broadcast_to(values[..., None, :], (*lead, block, columns))
            return spread.reshape(*lead[:-1], n_blocks * block, columns)[..., :rows, :]

        zero = None if self.zero is None else over_rows(self.zero)
        w = decode(self.codes, Parts(over_rows(self.scale.values()), zero), self.format)
        if self.minimum is not None:
            w = w - over_rows(self.minimum.values())
        if self.order is not None:
            w = jnp.take_along_axis(w, jnp.argsort(self.order, -1)[..., None], -2)
        return w if self.input_scale is None else w * self.input_scale[..., None].astype(w.dtype)

    def todense(self) -> jax.Array:
        """The dequantized weight."""
        return self.axes.weight(in_dtype(self.matrix(), self.dtype), self.shape)

    def astype(self, dtype: jnp.dtype) -> QuantizedArray:
        """The weight in another floating dtype."""
        return dataclasses.replace(self, dtype=check_dtype(dtype))

    def read_as(self, axes: Axes) -> QuantizedArray | None:
        """The same weight if it is stored as these matrices, or as their stack along its first axis; else None."""
        if same_matrices(axes, self.axes, self.shape):
            return self
        stack = stacked(self)
        return stack if stack is not None and same_matrices(axes, stack.axes, self.shape) else None

    def __rmatmul__(self, x: jax.Array) -> jax.Array:
        """Returns x @ w, computed from the codes."""
        x = check_weight(x, "x")
        return product(x, self, lambda rows: times(rows, self.astype(x.dtype)))

    def __repr__(self):
        arrays = [self.words, *jax.tree.leaves(self)]
        if not all(hasattr(a, "size") for a in arrays):  # a tree of anything else, such as shardings
            return f"QuantizedArray(words={self.words!r}, scale={self.scale!r})"
        shape = "×".join(map(str, self.shape))
        return f"QuantizedArray({shape} {self.dtype} as {self.format}; {self.nbytes:,} bytes)"

    def _rows(self, index: jax.Array) -> jax.Array:
        row = index if self.order is None else jnp.argsort(self.order)[index]
        _, block = self.format.blocks(self.rows)

        def of_rows(values: jax.Array) -> jax.Array:
            return values if values.shape[0] == 1 else values[row // block]

        zero = None if self.zero is None else of_rows(self.zero)
        codes = unpack_rows(self.words, self.format.grid.bits, row)
        w = decode(codes, Parts(of_rows(self.scale.values()), zero), self.format)
        if self.minimum is not None:
            w = w - of_rows(self.minimum.values())
        if self.input_scale is not None:
            w = w * self.input_scale[index][:, None].astype(w.dtype)
        return in_dtype(w, self.dtype)

    def _columns(self, index: jax.Array) -> QuantizedArray:
        def of(values: Any) -> Any:
            return jax.tree.map(lambda a: a[..., index] if a.shape[-1] > 1 else a, values)

        scale, zero, minimum = map(of, (self.scale, self.zero, self.minimum))
        return dataclasses.replace(self, words=self.words[..., index], scale=scale, zero=zero, minimum=minimum)
