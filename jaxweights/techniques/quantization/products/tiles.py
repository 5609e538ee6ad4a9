"""Products with stored weights in a loop over tiles of their rows, each dequantized just before its product.

Right for every format and on every device.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp

from jaxweights.core.packing import rows_of_a_period, unpack_tile
from jaxweights.numerics.tiled_product import rows_of_tile, tiled_product

if TYPE_CHECKING:
    from jaxweights.techniques.quantization.array import QuantizedArray


def tiled_times(x: jax.Array, q: QuantizedArray) -> jax.Array:
    """x @ w for x (M, K) and the stored matrix w (K, N), whose rows are in order and have no scales of their own.

    Differentiable in x and in the scales, forwards and backwards: tiles are dequantized again for the gradient.
    """
    tiles = _Tiles.of(q, x.shape[1], x.shape[0])
    after = tiles.scale_of if tiles.scaled_after else None
    y = tiled_product(x, q.words.shape[1], tiles.size, tiles.values, after)
    if not tiles.by_block:
        y = y * q.scale.values().astype(x.dtype)
    shift = offsets(q)
    return y if shift is None else y - jnp.matmul(block_sums(x, q), shift.astype(x.dtype), precision="highest")


def offsets(q: QuantizedArray) -> jax.Array | None:
    """What is subtracted from value(code)·scale: (blocks, N), or None."""
    shift = None
    if q.zero is not None:
        shift = q.zero.astype(jnp.float32) * q.scale.values()
    if q.minimum is not None:
        shift = q.minimum.values() + (0 if shift is None else shift)
    return None if shift is None else jnp.broadcast_to(shift, (shift.shape[0], q.words.shape[1]))


def block_sums(x: jax.Array, q: QuantizedArray) -> jax.Array:
    """The sums of x (M, K) over the rows of each block that has an offset: (M, blocks)."""
    rows = x.shape[1]
    n_blocks, block = q.format.blocks(rows)
    padded = jnp.pad(x, ((0, 0), (0, n_blocks * block - rows)))
    return jnp.sum(padded.reshape(x.shape[0], n_blocks, block), 2)


class _Tiles(NamedTuple):
    """A stored matrix cut into tiles of `size` rows, the last of which may be shorter."""

    q: QuantizedArray
    rows: int
    size: int

    @classmethod
    def of(cls, q: QuantizedArray, rows: int, m: int) -> _Tiles:
        """Tiles for a product with m rows of x."""
        n_blocks, block = q.format.blocks(rows)
        period = rows_of_a_period(q.format.grid.bits)
        size = rows_of_tile(m, rows, q.words.shape[1], period, block if n_blocks > 1 else 1)
        return cls(dataclasses.replace(q, scale=q.scale.widened()), rows, size)

    @property
    def by_block(self) -> bool:
        """Whether scales vary along the rows, so that they are applied in each tile."""
        return self.q.scale.codes.shape[0] > 1

    @property
    def scaled_after(self) -> bool:
        """Whether all rows of a tile have one scale, by which its product is multiplied, and not the tile."""
        return self.by_block and self.q.format.blocks(self.rows)[1] % self.size == 0

    def scale_of(self, tile: jax.Array | int) -> jax.Array:
        """The scale that all rows of a tile have, (1, N)."""
        return self.q.scale.of_blocks(tile * self.size // self.q.format.blocks(self.rows)[1], 1)

    def values(self, tile: jax.Array | int, n: int) -> jax.Array:
        """n rows of the matrix, float32, without its offsets, and without scales that the rows of a tile share."""
        q, start = self.q, tile * self.size
        grid = q.format.grid
        values = grid.decode(unpack_tile(q.words, grid.bits, tile, self.size, n))
        if not self.by_block or self.scaled_after:
            return values
        block = q.format.blocks(self.rows)[1]
        if self.size % block == 0 and n % block == 0:
            scale = q.scale.of_blocks(start // block, n // block)
            return (values.reshape(n // block, block, -1) * scale[:, None]).reshape(n, -1)
        return values * q.scale.values()[(start + jnp.arange(n)) // block]
