"""How a weight is cut into blocks that share a scale."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from jaxweights.core.axes import Axes, Reading
from jaxweights.core.layer import Layer, stored_matrix
from jaxweights.numerics.dtypes import accumulation_dtype
from jaxweights.techniques.quantization.blocks import Parts, decode, encode, in_dtype, stored_scale
from jaxweights.techniques.quantization.formats import Format
from jaxweights.techniques.quantization.ranges import Range
from jaxweights.techniques.quantization.scales import Scales


@dataclasses.dataclass(frozen=True)
class Blocking:
    """The blocks of a format in a weight of one shape.

    Where a block is all inputs of an output unit, the weight keeps its axes: to merge them would gather a sharded
    weight. Otherwise it is cut as matrices (*batch, [groups,] blocks, rows of a block, N).

    Attributes:
      format: the format.
      axes: how the weight is read as a matrix.
      shape: its shape.
    """

    format: Format
    axes: Axes | None
    shape: tuple[int, ...]

    @property
    def rows(self) -> int:
        """The number of inputs of an output unit."""
        return math.prod(self.shape[a] for a in Reading.of(self.axes, self.shape).contracted)

    @property
    def over(self) -> tuple[int, ...]:
        """The axes of a block in the weight as `split` leaves it."""
        r = Reading.of(self.axes, self.shape)
        if not self._in_place:
            return (len(r.batch) + (r.groups > 1) + 1,)
        _, r = r.ungroup(self.shape)
        return (*r.contracted, *r.output) if self.format.per_tensor else r.contracted

    @property
    def block_size(self) -> int:
        """The number of weights that share a scale."""
        r = Reading.of(self.axes, self.shape)
        columns = math.prod(self.shape[a] for a in r.output) // r.groups if self.format.per_tensor else 1
        return columns * self.format.blocks(self.rows)[1]

    @property
    def units(self) -> tuple[int, ...]:
        """The shape of the scales, without the axes of a block."""
        sizes = jax.eval_shape(self.split, jax.ShapeDtypeStruct(self.shape, jnp.float32)).shape
        return tuple(size for a, size in enumerate(sizes) if a not in self.over)

    @property
    def there(self) -> jax.Array | None:
        """Which entries of the weight that `split` leaves are no padding, or None if there is none."""
        n_blocks, block = self.format.blocks(self.rows)
        if n_blocks * block == self.rows:
            return None
        return (jnp.arange(n_blocks * block) < self.rows).reshape(n_blocks, block, 1)

    def split(self, w: jax.Array) -> jax.Array:
        """The weight in float32 or wider, cut into blocks; the last one of a column is padded with 0."""
        wide = w.astype(accumulation_dtype(w.dtype))
        if w.dtype == jnp.bfloat16:  # else XLA skips the rounding of a weight that the same program computes
            wide = jax.lax.reduce_precision(wide, exponent_bits=8, mantissa_bits=7)
        if self._in_place:
            return Reading.of(self.axes, w.shape).split_groups(wide)[0]
        return in_blocks(stored_matrix(wide, self.axes)[0], self.format)

    def join(self, x: jax.Array) -> jax.Array:
        """The weight of these blocks: the inverse of `split`."""
        if self._in_place:
            return x.reshape(self.shape)
        r = Reading.of(self.axes, self.shape)
        batch = [self.shape[a] for a in sorted(r.batch)]
        shape, axes = Layer.of(self.axes, self.shape).with_batch(batch)
        columns = math.prod(self.shape[a] for a in r.output) // r.groups
        groups = [r.groups] if r.groups > 1 else []
        return axes.weight(from_blocks(x, (*batch, *groups, self.rows, columns)), shape)

    def fit(self, w: jax.Array, range: Range) -> Parts:
        """The scales and zero points that a range chooses."""
        return range.fit(self.split(w), self.over, self.format, self.there)

    def stored(self, parts: Parts) -> Parts:
        """The same as they are read back."""
        assert parts.reach is not None
        if self.format.scale.outer is None:
            return parts._replace(scale=stored_scale(parts.scale, parts.reach, self.format))
        return parts._replace(scale=self.scales(parts).values()[..., None, :])

    def scales(self, parts: Parts) -> Scales:
        """The scales as they are stored."""
        assert parts.reach is not None
        scale, reach = (self.of_matrices(a) for a in (parts.scale, parts.reach))
        return self.format.scale.encode(scale, reach, self.format.grid.peak)

    def of_matrices(self, values: jax.Array) -> jax.Array:
        """One value for each block, in the shape (*batch, [groups,] blocks, N) that a `QuantizedArray` keeps."""
        if not self._in_place:
            return jnp.squeeze(values, -2)
        original = Reading.of(self.axes, self.shape)
        _, r = original.ungroup(self.shape)
        batch = (*sorted(r.batch[: len(original.batch)]), *r.batch[len(original.batch) :])
        moved = values.transpose(*batch, *r.contracted, *r.output)
        return moved.reshape(*moved.shape[: len(batch)], 1, -1)

    def rounded(self, w: jax.Array, parts: Parts) -> jax.Array:
        """The weight, stored with these scales and zero points and read back, in its dtype."""
        parts = self.stored(parts)
        codes = encode(self.split(w), parts, self.format)
        return in_dtype(self.join(decode(codes, parts, self.format)), w.dtype)

    @property
    def _in_place(self) -> bool:
        return self.format.scale.outer is None and self.format.blocks(self.rows)[0] <= 1


def tells_apart(format: Format, one: Reading, other: Reading) -> bool:
    """Whether a weight comes out otherwise in a format where it is read in another way."""
    apart = (one.batch, one.groups) != (other.batch, other.groups)
    if format.per_tensor:
        return apart
    return one.contracted != other.contracted or (format.scale.outer == 0 and apart)


def in_blocks(matrix: jax.Array, format: Format) -> jax.Array:
    """Matrices (..., K, N) as (..., blocks, rows of a block, N), in float32 or wider, padded with 0."""
    *lead, rows, columns = matrix.shape
    n_blocks, block = format.blocks(rows)
    padded = jnp.pad(matrix, [(0, 0) for _ in lead] + [(0, n_blocks * block - rows), (0, 0)])
    return padded.reshape(*lead, n_blocks, block, columns).astype(accumulation_dtype(matrix.dtype))


def from_blocks(blocks: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The matrices of this shape that are cut into blocks."""
    *lead, n_blocks, block, columns = blocks.shape
    return blocks.reshape(*lead, n_blocks * block, columns)[..., : shape[-2], :]
