"""Products with a matrix that is made tile by tile, and never as a whole."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

_FEW_ROWS = 32  # of x: then most of the time goes into making tiles, and those that stay in the cache are faster
_ENTRIES_FOR_FEW, _ENTRIES = 2**19, 2**20  # of a tile
_LEAST = 32  # rows of a tile


def tiled_product(
    x: jax.Array,
    columns: int,
    size: int,
    tile: Callable[[jax.Array | int, int], jax.Array],
    scale: Callable[[jax.Array | int], jax.Array] | None = None,
    *,
    at_once: int = 2,
) -> jax.Array:
    """x @ w for x (M, K) and a matrix w (K, N) that is made of tiles of `size` rows, in the dtype of x.

    Differentiable in x and in what tiles are made of, forwards and backwards: tiles are made again for the gradient.

    Args:
      x: float array (M, K).
      columns: N.
      size: number of rows of a tile.
      tile: (i, n) -> the first n rows of tile i, an array (n, N); n = size for all but the last.
      scale: i -> what the product with tile i is multiplied by, (1, N) or (1, 1): cheaper than in `tile`.
      at_once: number of tiles in a step of the loop if x has few rows: a core of a CPU makes one while another
        multiplies.
    """

    def add(y: jax.Array, part: jax.Array, i: jax.Array | int) -> jax.Array:
        product = jnp.matmul(part, tile(i, part.shape[1]).astype(x.dtype), precision="highest")
        return y + (product if scale is None else product * scale(i).astype(x.dtype))

    y, (whole, rest) = jnp.zeros((x.shape[0], columns), x.dtype), divmod(x.shape[1], size)
    if whole:
        y = add(y, x[:, :size], 0)  # apart from the others: it gives the loop a carry of the right type
    if whole > 1:
        step = jax.checkpoint(add, prevent_cse=False)

        # x is carried, behind a barrier: JAX 0.7 does not transpose a loop over a tangent, or with a constant one.
        def visit(carry: tuple[jax.Array, jax.Array], i: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
            y, x = carry
            part = lax.dynamic_slice_in_dim(x, i * size, size, 1)
            return (step(y, part, i), lax.optimization_barrier(x)), None

        unroll = at_once if x.shape[0] <= _FEW_ROWS else 1
        (y, _), _ = lax.scan(visit, (y, x), jnp.arange(1, whole), unroll=unroll)
    return add(y, x[:, whole * size :], whole) if rest else y


def rows_of_tile(m: int, rows: int, columns: int, period: int, block: int = 1) -> int:
    """Rows of a tile for m rows of x: whole periods and whole blocks, or whole parts of a block, if possible.

    >>> rows_of_tile(1, 4096, 4096, 8), rows_of_tile(16, 4096, 4096, 8, 96)
    (128, 96)
    """
    most = max((_ENTRIES_FOR_FEW if m <= _FEW_ROWS else _ENTRIES) // max(columns, 1), _LEAST)
    both = math.lcm(period, block)
    if both <= most:
        size = most // both * both
    else:
        parts = [n for n in range(period, most + 1, period) if block % n == 0]
        size = parts[-1] if parts and parts[-1] >= most // 4 else most // period * period
    return min(size, max(rows, 1))
