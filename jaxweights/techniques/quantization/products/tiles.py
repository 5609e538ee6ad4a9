"""Products with stored weights in a loop over tiles of their rows, each dequantized just before its product.

Right for every format and on every device.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxweights.techniques.quantization.packing import n_words, planes, rows_of_a_period, unpack

if TYPE_CHECKING:
    from jaxweights.techniques.quantization.array import QuantizedArray

_FEW_ROWS = 8  # of x: then the time goes into dequantizing, and smaller tiles, which stay in the cache, are faster
_ENTRIES_FOR_FEW, _ENTRIES = 2**18, 2**20  # of a tile
_LEAST = 32  # rows of a tile


def tiled_times(x: jax.Array, q: QuantizedArray) -> jax.Array:
    """x @ w for x (M, K) and the stored matrix w (K, N), whose rows are in order and have no scales of their own.

    Differentiable in x and in the scales, forwards and backwards: tiles are dequantized again for the gradient.
    """
    m, rows, columns = x.shape[0], x.shape[1], q.words.shape[1]
    tiles = _Tiles.of(q, rows, m)

    def add(y: jax.Array, part: jax.Array, tile: jax.Array | int) -> jax.Array:
        values = tiles.values(tile, part.shape[1]).astype(x.dtype)
        return y + jnp.matmul(part, values, precision="highest")

    y, in_whole = jnp.zeros((m, columns), x.dtype), tiles.whole * tiles.size
    if tiles.whole:
        y = add(y, x[:, : tiles.size], 0)  # apart from the others: it gives the loop a carry of the right type
    if tiles.whole > 1:
        step = jax.checkpoint(add, prevent_cse=False)

        # x is carried, behind a barrier: JAX 0.7 does not transpose a loop over a tangent, or with a constant one.
        def visit(carry: tuple[jax.Array, jax.Array], tile: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
            y, x = carry
            part = lax.dynamic_slice_in_dim(x, tile * tiles.size, tiles.size, 1)
            return (step(y, part, tile), lax.optimization_barrier(x)), None

        (y, _), _ = lax.scan(visit, (y, x), jnp.arange(1, tiles.whole))
    if tiles.rest:
        y = add(y, x[:, in_whole:], tiles.whole)
    if not tiles.by_block:
        y = y * tiles.scale.astype(x.dtype)
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
    """A stored matrix cut into tiles: `whole` of `size` rows, and one of the `rest` of its rows."""

    q: QuantizedArray
    scale: jax.Array
    rows: int
    size: int

    @classmethod
    def of(cls, q: QuantizedArray, rows: int, m: int) -> _Tiles:
        """Tiles for a product with m rows of x."""
        entries = _ENTRIES_FOR_FEW if m < _FEW_ROWS else _ENTRIES
        most = max(entries // max(q.words.shape[1], 1), _LEAST)
        n_blocks, block = q.format.blocks(rows)
        size = _aligned(most, rows_of_a_period(q.format.grid.bits), block if n_blocks > 1 else 1)
        return cls(q, q.scale.values(), rows, min(size, max(rows, 1)))

    @property
    def by_block(self) -> bool:
        """Whether scales vary along the rows, so that they are applied in each tile."""
        return self.scale.shape[0] > 1

    @property
    def whole(self) -> int:
        """The number of tiles of `size` rows."""
        return self.rows // self.size

    @property
    def rest(self) -> int:
        """The number of rows in the last tile, that is shorter."""
        return self.rows % self.size

    def values(self, tile: jax.Array | int, n: int) -> jax.Array:
        """n rows of the matrix, float32, without its offsets, and without scales that all rows share."""
        q, start = self.q, tile * self.size
        grid = q.format.grid
        values = grid.decode(unpack(self._words(tile, n), grid.bits, n))
        if not self.by_block:
            return values
        block = q.format.blocks(self.rows)[1]
        if self.size % block == 0 and n % block == 0:
            scale = lax.dynamic_slice_in_dim(self.scale, start // block, n // block)
            return (values.reshape(n // block, block, -1) * scale[:, None]).reshape(n, -1)
        if block % self.size == 0:
            return values * lax.dynamic_slice_in_dim(self.scale, start // block, 1)
        return values * self.scale[(start + jnp.arange(n)) // block]

    def _words(self, tile: jax.Array | int, n: int) -> jax.Array:
        words, bits = self.q.words, self.q.format.grid.bits
        count = n_words(n, bits)
        start = tile * n_words(self.size, bits)
        if len(planes(bits)) == 1 or isinstance(tile, int):
            return lax.dynamic_slice_in_dim(words, start, count)
        # Gathered, words of several planes are not fused with what unpacks them, which would be ten times slower.
        periods = words.reshape(-1, bits, words.shape[1])
        return periods[start // bits + jnp.arange(count // bits)].reshape(count, -1)


def _aligned(most: int, period: int, block: int) -> int:
    """A number of rows near `most`: whole periods of words and whole blocks, or whole parts of a block, if possible."""
    both = math.lcm(period, block)
    if both <= most:
        return most // both * both
    parts = [n for n in range(period, most + 1, period) if block % n == 0]
    return parts[-1] if parts and parts[-1] >= most // 4 else most // period * period
