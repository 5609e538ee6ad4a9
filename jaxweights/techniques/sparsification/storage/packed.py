"""Packed N:M storage: the kept values and a few bits for the position of each."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jaxweights.core.axes import Axes
from jaxweights.core.checks import check_dtype, check_integer
from jaxweights.core.layer import Layer
from jaxweights.core.matrices import StoredMatrices
from jaxweights.techniques.sparsification.storage.kept import kept_matrix, nan_unless

_TILE = 32  # bytes of codes per column; the product of one row is slower on a CPU with 8 and with 128


@functools.partial(jax.tree_util.register_dataclass, data_fields=["values", "codes"], meta_fields=["n", "m", "layer"])
@dataclasses.dataclass(frozen=True)
class PackedArray(StoredMatrices):
    """A weight in N:M storage: `n` of every `m` entries along the input. A pytree node, one leaf to every level.

    The weight, read as a matrix of K rows, is cut into groups of `m` consecutive rows. For each group and column, `n`
    values are stored in order, each with its position in the group: 1 bit for m = 2, 2 bits for m <= 4, 4 bits for
    m <= 16. Batch axes lead: `scan` and `vmap` over a stack see one layer at a time.

    Attributes:
      values: float array (*batch, [groups,] K·n/m, columns).
      codes: uint8 array (*batch, [groups,] bytes, columns), the positions of consecutive values, the first in the
        lowest bits.
      n: number of values stored per group.
      m: length of a group.
      layer: the shape of one layer, and how it is read as a matrix.
    """

    values: jax.Array
    codes: jax.Array
    n: int
    m: int
    layer: Layer
    _array = ("values", 2)

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of the weight."""
        return self.values.dtype

    @jax.jit
    def todense(self) -> jax.Array:
        """Returns the weight: kept entries bit for bit, the others +0."""
        values, codes = self._groups(self.values, self.codes)
        positions = _down(jnp.arange(self.m, dtype=jnp.uint8), codes.ndim)
        groups = jnp.zeros((), self.dtype)
        for i in range(self.n):
            groups = jnp.where(codes[..., i, None, :] == positions, values[..., i, None, :], groups)
        *batch, kept, columns = self.values.shape
        matrix = groups.reshape(*batch, kept // self.n * self.m, columns)
        return self.axes.weight(matrix, self.shape)

    def astype(self, dtype: jnp.dtype) -> PackedArray:
        """The weight in another floating dtype."""
        return dataclasses.replace(self, values=self.values.astype(check_dtype(dtype)))

    @jax.jit
    def _times(self, x: jax.Array) -> jax.Array:
        """x @ w: a single row is multiplied by the packed weight, several rows by the unpacked one."""
        if len(x) == 1:
            return self._times_row(x[0])[None]
        return jnp.matmul(x, self.axes.matrix(self.todense()).astype(x.dtype), precision="highest")

    def _times_row(self, x: jax.Array) -> jax.Array:
        """y = Σ values·x[position], tile by tile."""
        divides = _TILE * self._per_byte % self.n == 0 and len(x) % self._tile_rows == 0
        n_tiles = max(len(x) // self._tile_rows, 1) if divides else 1

        def tiles_of(a):
            return a.reshape(n_tiles, len(a) // n_tiles, *a.shape[1:])

        @jax.checkpoint
        def add_tile(total, tile):
            x, values, codes = tile
            values, codes = self._groups(values, codes)
            groups = x.reshape(len(x) // self.m, 1, self.m)
            factors = _choose(codes, [groups[..., i, None] for i in range(self.m)])
            return total + jnp.sum(factors * values.astype(x.dtype), (0, 1)), None

        zero = jnp.zeros(self.values.shape[-1], x.dtype)
        y, _ = jax.lax.scan(add_tile, zero, (tiles_of(x), tiles_of(self.values), tiles_of(self.codes)))
        return y

    def _rows(self, index: jax.Array) -> jax.Array:
        rows = jnp.zeros((), self.dtype)
        for slot in range(self.n):
            stored = index // self.m * self.n + slot
            shift = _bits(self.m) * (stored % self._per_byte)
            codes = self.codes[stored // self._per_byte] >> shift.astype(jnp.uint8)[:, None]
            here = codes & jnp.uint8(2 ** _bits(self.m) - 1) == (index % self.m).astype(jnp.uint8)[:, None]
            rows = jnp.where(here, self.values[stored], rows)
        return rows

    def _columns(self, index: jax.Array) -> PackedArray:
        return dataclasses.replace(self, values=self.values[:, index], codes=self.codes[:, index])

    @property
    def _per_byte(self) -> int:
        return 8 // _bits(self.m)

    @property
    def _tile_rows(self) -> int:
        return _TILE * self._per_byte // self.n * self.m

    def _groups(self, values: jax.Array, codes: jax.Array) -> tuple[jax.Array, jax.Array]:
        """`values` and the unpacked `codes`, both of shape (..., groups, n, columns)."""
        codes, bits = codes[..., None, :], _bits(self.m)
        shift = _down(bits * jnp.arange(self._per_byte, dtype=jnp.uint8), codes.ndim)
        codes = codes >> shift & jnp.uint8(2**bits - 1)
        *batch, kept, columns = values.shape
        codes = codes.reshape(*batch, math.prod(codes.shape[-3:-1]), columns)[..., :kept, :]
        shape = (*batch, kept // self.n, self.n, columns)
        return values.reshape(shape), codes.reshape(shape)


def pack(
    w: jax.Array, mask: jax.Array | None = None, sparsity: tuple[int, int] = (2, 4), *, axes: Axes | None = None
) -> PackedArray:
    """Stores an N:M sparse weight: at most n of every m consecutive inputs of an output unit are kept.

    2:4 is the pattern of sparse tensor cores. It takes 9/16 of the bytes in float16 and 17/32 in float32. Any
    n < m <= 16 can be packed.

    Args:
      w: float array of any shape. Read as a matrix, its number of rows must be a multiple of m.
      mask: boolean array of the shape of `w`, true where a weight is kept; by default where `w` is not 0.
      sparsity: (n, m), the number of values stored per group and the length of a group.
      axes: how `w` is read as a matrix; (..., in, out) by default. Groups run along its rows: (window, in) for a
        convolution kernel, (heads, head_dim) for the out-projection of attention. A stack of layers needs its batch
        axes, as in `Axes(batch=0)`, to be sliced by `scan` and `vmap`.

    Returns:
      A `PackedArray`. Its `todense()` is `where(mask, w, 0)` bit for bit. Without a mask, -0.0 counts as 0 and NaN is
      kept. Under jit, a group that keeps more than n becomes NaN.

    Raises:
      TypeError: `w` is not a float array, `mask` is not a boolean array, or `sparsity` is not a pair of integers.
      ValueError: a group keeps more than n, n or m is out of range, or the number of rows is not a multiple of m.

    >>> import jax.numpy as jnp
    >>> w = jnp.array([[0.0], [2.0], [0.0], [-1.0], [0.0], [0.0], [0.0], [3.0]])
    >>> p = pack(w)
    >>> print(p.values.ravel(), p.codes, p.nbytes)
    [ 2. -1.  0.  3.] [[205]] 17
    >>> print(jnp.ones(8) @ p, bool((p.todense() == w).all()))
    [4.] True

    References: Mishra et al., Accelerating Sparse Deep Neural Networks, arXiv:2104.08378, 2021.
    """
    check_packing(sparsity)
    n, m = sparsity
    matrix, kept, layer = kept_matrix(w, mask, axes)
    rows = matrix.shape[-2]
    if rows % m:
        raise ValueError(f"the {rows} inputs of w {jnp.shape(w)} are not a multiple of m={m}: pad w, or choose axes")
    values, codes, most = _pack(matrix, kept, n, m)
    if not isinstance(most, Tracer) and most > n:
        raise ValueError(f"w does not fit {n}:{m}: a group of {m} inputs keeps {most}. Prune it to {n}:{m} first")
    return PackedArray(values, codes, n, m, layer)


def check_packing(sparsity) -> None:
    """Raises unless `sparsity` is an (n, m) that can be packed."""
    if not isinstance(sparsity, tuple) or len(sparsity) != 2:
        raise TypeError(f"sparsity must be (n, m), got {sparsity!r}: write (2, 4) for 2:4")
    n, m = sparsity
    check_integer("the m of sparsity=(n, m)", m, 2, 16)
    check_integer("the n of sparsity=(n, m)", n, 1, m - 1)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _pack(matrix: jax.Array, kept: jax.Array, n: int, m: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(values, codes, the largest number that a group keeps)."""
    *batch, rows, columns = matrix.shape
    matrix, kept = (a.reshape(*batch, rows // m, m, columns) for a in (matrix, kept))
    count = jnp.sum(kept, -2, keepdims=True)
    # A group that keeps fewer than n stores its first other entries too, as zeros.
    stored = kept | (~kept & (_n_before(~kept) < n - count))
    slot, slots = _n_before(stored), _down(jnp.arange(n), matrix.ndim)
    values, codes = jnp.zeros((), matrix.dtype), jnp.uint8(0)
    for i in range(m):
        here = stored[..., i, None, :] & (slot[..., i, None, :] == slots)
        values = jnp.where(here & kept[..., i, None, :], matrix[..., i, None, :], values)
        codes = jnp.where(here, jnp.uint8(i), codes)
    shape = (*batch, rows // m * n, columns)
    values, codes = nan_unless(count <= n, values).reshape(shape), codes.reshape(shape)
    return values, _to_bytes(codes, _bits(m)), jnp.max(count, initial=0)


def _bits(m: int) -> int:
    """Bits of a code: the smallest divisor of 8 that holds a position in a group of length m <= 16."""
    return 1 if m == 2 else 2 if m <= 4 else 4


def _n_before(mask: jax.Array) -> jax.Array:
    """For each entry of a group, how many entries before it are true."""
    mask = mask.astype(jnp.int32)
    return jnp.cumsum(mask, -2) - mask


def _to_bytes(codes: jax.Array, bits: int) -> jax.Array:
    """Packs consecutive codes into bytes, the first in the lowest bits; the last byte is padded with zeros."""
    *batch, n, columns = codes.shape
    per_byte = 8 // bits
    codes = jnp.pad(codes, [(0, 0)] * len(batch) + [(0, -n % per_byte), (0, 0)])
    codes = codes.reshape(*batch, -(-n // per_byte), per_byte, columns)
    return jnp.sum(codes << _down(bits * jnp.arange(per_byte, dtype=jnp.uint8), codes.ndim), -2, dtype=jnp.uint8)


def _down(values: jax.Array, ndim: int) -> jax.Array:
    """A vector, reshaped to run along the last axis but one of `ndim` axes."""
    return values.reshape(*[1] * (ndim - 2), -1, 1)


def _choose(code: jax.Array, options: list[jax.Array]) -> jax.Array:
    """options[code], with one comparison per bit of the code."""
    if len(options) == 1:
        return options[0]
    half = 2 ** ((len(options) - 1).bit_length() - 1)
    return jnp.where((code & half) != 0, _choose(code, options[half:]), _choose(code, options[:half]))
