"""The product with a clustered matrix: its values are looked up tile by tile, and no dense weight is made."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from jaxweights.core.device_product import device_product
from jaxweights.core.packing import n_words, rows_of_a_period, unpack, unpack_tile
from jaxweights.numerics.sharding import auto_sharded
from jaxweights.numerics.tiled_product import rows_of_tile, tiled_product

_SELECTED = 16  # values up to which selecting them one by one is faster than reading them from a table
_TPU_ENTRIES, _TPU_ROWS = 2**22, 256  # of a tile, and of what its number of rows is a multiple

Coded = tuple[jax.Array, jax.Array]
"""(words, table): the packed codes of a matrix (K, N), and the values of all 2^bits codes, (2^bits, N or 1)."""


def times(x: jax.Array, w: Coded) -> jax.Array:
    """x @ w for x (M, K), float32 or float64: (M, N) in the dtype of x. Differentiable in x and in the table."""
    words, _ = w
    if x.size == 0 or words.size == 0:
        return jnp.zeros((x.shape[0], words.shape[-1]), x.dtype)
    return _times(x, w)


@jax.custom_jvp
def look_up(table: jax.Array, codes: jax.Array) -> jax.Array:
    """table[code] for tables (*lead, 2^bits, N or 1) and matrices of codes (*lead, K, N)."""
    if table.shape[-2] <= _SELECTED:
        f = _select
    elif table.shape[-1] > 1:
        f = _of_columns
    else:
        f = _gather
    return auto_sharded(f, codes, table, like=codes)


@look_up.defjvp
def _derivative(primals, tangents):
    """What positions share is summed in each column first: faster than by the selection, and exact to more digits."""
    (table, codes), (change, _) = primals, tangents

    def of_columns(codes: jax.Array, change: jax.Array) -> jax.Array:
        return _of_columns(codes, jnp.broadcast_to(change, (*change.shape[:-1], codes.shape[-1])))

    return look_up(table, codes), auto_sharded(of_columns, codes, change, like=codes)


def _of_columns(codes: jax.Array, table: jax.Array) -> jax.Array:
    return jnp.take_along_axis(table, codes, -2, mode="promise_in_bounds")


def _gather(codes: jax.Array, table: jax.Array) -> jax.Array:
    def gather(codes: jax.Array, table: jax.Array) -> jax.Array:
        return table[:, 0].at[codes].get(mode="promise_in_bounds")

    for _ in table.shape[:-2]:
        gather = jax.vmap(gather)
    return gather(codes, table)


def _select(codes: jax.Array, table: jax.Array) -> jax.Array:
    """table[code], with one comparison for each bit of a code."""
    n = table.shape[-2]
    if n == 1:
        return table
    low, high = _select(codes, table[..., : n // 2, :]), _select(codes, table[..., n // 2 :, :])
    return jnp.where((codes & n // 2) != 0, high, low)


def _tiled_times(x: jax.Array, w: Coded) -> jax.Array:
    words, table = w
    bits, columns = (len(table) - 1).bit_length(), words.shape[1]
    size = rows_of_tile(x.shape[0], x.shape[1], columns, rows_of_a_period(bits))

    def tile(i: jax.Array | int, n: int) -> jax.Array:
        return look_up(table, unpack_tile(words, bits, i, size, n))

    return tiled_product(x, columns, size, tile)


def _cpu_times(x: jax.Array, w: Coded) -> jax.Array:
    # In a loop with the same weight, XLA would move the look-up out of it if the words did not depend on x.
    words, table = w
    x, words = lax.optimization_barrier((x, words))
    return _tiled_times(x, (words, table))


def _tpu_times(x: jax.Array, w: Coded) -> jax.Array:
    """In larger tiles, whose values are selected: what is gathered, XLA writes to memory."""
    words, table = w
    bits, columns = (len(table) - 1).bit_length(), words.shape[1]
    size = min(max(_TPU_ENTRIES // columns // _TPU_ROWS, 1) * _TPU_ROWS, x.shape[1])

    def tile(i: jax.Array | int, n: int) -> jax.Array:
        of_tile = lax.dynamic_slice_in_dim(words, i * n_words(size, bits), n_words(n, bits))
        return _select_in_parts(unpack(of_tile, bits, n), table)

    return tiled_product(x, columns, size, tile, at_once=1)


def _select_in_parts(codes: jax.Array, table: jax.Array) -> jax.Array:
    """table[code], by a loop over parts of the table: a program with 255 selections takes minutes to compile."""
    if len(table) <= _SELECTED:
        return _select(codes, table)

    def select(i: jax.Array, found: jax.Array) -> jax.Array:
        part = lax.dynamic_slice_in_dim(table, i * _SELECTED, _SELECTED)
        return jnp.where(codes // _SELECTED == i, _select(codes % _SELECTED, part), found)

    return lax.fori_loop(0, len(table) // _SELECTED, select, jnp.zeros(codes.shape, table.dtype))


_times = device_product(
    "clustered_times", _tiled_times, cpu=_cpu_times, tpu=_tpu_times, gpu=_tiled_times, gpu_export=_tiled_times
)
