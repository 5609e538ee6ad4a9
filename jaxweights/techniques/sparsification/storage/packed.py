"""N:M sparsity in packed storage: the values that are kept, and two bits for the place of each."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jaxweights.core.axes import Axes, axes_or_default
from jaxweights.core.checks import check_integer
from jaxweights.core.stored import nbytes, product
from jaxweights.techniques.sparsification.storage.kept import kept_matrix, loud

_TILE = 32  # bytes of codes for each column; with tiles of 8 and of 128 the product of one row took longer on a CPU


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["values", "codes"], meta_fields=["n", "m", "shape", "axes"]
)
@dataclasses.dataclass(frozen=True)
class PackedArray:
    """A weight of which `n` of every `m` entries along the input are stored. A pytree node.

    Read as a matrix of K rows, it is cut in groups of `m` consecutive rows. Of each group and column `n` values are
    stored, in order, and for each its place in the group, in 1 bit for m = 2, 2 bits up to 4 and 4 bits up to 16.

    Attributes:
      values: float array (..., K·n/m, columns).
      codes: uint8 array (..., bytes, columns): the places of consecutive values, the first in the lowest bits.
      n: values stored of each group.
      m: length of a group.
      shape: shape of the weight.
      axes: how it is read as a matrix.
    """

    values: jax.Array
    codes: jax.Array
    n: int
    m: int
    shape: tuple[int, ...]
    axes: Axes | None = None

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of the weight."""
        return self.values.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of values and codes."""
        return nbytes(self)

    @jax.jit
    def todense(self) -> jax.Array:
        """The weight, bit for bit what was packed; what was not kept is +0."""
        values, codes = self._groups(self.values, self.codes)
        place = jnp.arange(self.m, dtype=jnp.uint8)[:, None]
        groups = jnp.zeros((), self.dtype)
        for i in range(self.n):
            groups = jnp.where(codes[..., i, None, :] == place, values[..., i, None, :], groups)
        *batch, kept, columns = self.values.shape
        matrix = groups.reshape(*batch, kept // self.n * self.m, columns)
        return axes_or_default(self.axes, len(self.shape)).weight(matrix, self.shape)

    def __rmatmul__(self, x: jax.Array) -> jax.Array:
        """x @ w. One row is multiplied by what is stored, several by the weight unpacked once for all of them."""
        return product(x, self, self._times)

    @jax.jit
    def _times(self, x: jax.Array) -> jax.Array:
        if len(x) == 1:
            return self._times_row(x[0])[None]
        axes = axes_or_default(self.axes, len(self.shape))
        return jnp.matmul(x, axes.matrix(self.todense()).astype(x.dtype), precision="highest")

    def _times_row(self, x: jax.Array) -> jax.Array:
        """y = Σ values·x[place], tile by tile."""
        whole = _TILE * self._per_byte % self.n == 0 and len(x) % self._tile_rows == 0
        n_tiles = max(len(x) // self._tile_rows, 1) if whole else 1
        split = lambda a: a.reshape(n_tiles, len(a) // n_tiles, *a.shape[1:])

        @jax.checkpoint
        def tile(total, part):
            x, values, codes = part
            values, codes = self._groups(values, codes)
            groups = x.reshape(len(x) // self.m, 1, self.m)
            chosen = _choose(codes, [groups[..., i, None] for i in range(self.m)])
            return total + jnp.sum(chosen * values.astype(x.dtype), (0, 1)), None

        start = jnp.zeros(self.values.shape[-1], x.dtype)
        return jax.lax.scan(tile, start, (split(x), split(self.values), split(self.codes)))[0]

    @property
    def _per_byte(self) -> int:
        return 8 // _bits(self.m)

    @property
    def _tile_rows(self) -> int:
        return _TILE * self._per_byte // self.n * self.m

    def _groups(self, values: jax.Array, codes: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Both as (..., groups, n, columns)."""
        shift = _bits(self.m) * jnp.arange(self._per_byte, dtype=jnp.uint8)[:, None]
        codes = codes[..., None, :] >> shift & jnp.uint8(2 ** _bits(self.m) - 1)
        *batch, kept, columns = values.shape
        codes = codes.reshape(*batch, math.prod(codes.shape[-3:-1]), columns)[..., :kept, :]
        split = lambda a: a.reshape(*batch, kept // self.n, self.n, columns)
        return split(values), split(codes)


def pack(
    w: jax.Array, mask: jax.Array | None = None, sparsity: tuple[int, int] = (2, 4), *, axes: Axes | None = None
) -> PackedArray:
    """Stores a weight of which at most n of every m consecutive inputs of an output unit are kept.

    2:4 is what sparse tensor cores read: 9/16 of the bytes in float16, 17/32 in float32. Any n < m <= 16 packs alike.

    Args:
      w: float array of any shape whose rows, read as a matrix, are a multiple of m.
      mask: boolean array of the shape of `w`, true where a weight is kept; by default where `w` is not 0.
      sparsity: (n, m): how many of each group are stored, and how long it is.
      axes: how `w` is read as a matrix; (..., in, out) by default. Groups run along its rows: for a convolution
        kernel (window, in), for attention's out-projection (heads, head_dim).

    Returns:
      A `PackedArray`. It gives `where(mask, w, 0)` back bit for bit; without a mask -0.0 counts as 0 and NaN is kept.
      Under jit a group that does not fit becomes NaN.

    Raises:
      TypeError: `w` is not a float array, `mask` not a boolean one, or `sparsity` not two integers.
      ValueError: the pattern does not fit, n or m is out of range, or the rows are no multiple of m.

    >>> import jax.numpy as jnp
    >>> w = jnp.array([[0.0], [2.0], [0.0], [-1.0], [0.0], [0.0], [0.0], [3.0]])
    >>> p = pack(w)
    >>> print(p.values.ravel(), p.codes, p.nbytes)
    [ 2. -1.  0.  3.] [[205]] 17
    >>> print(jnp.ones(8) @ p, bool((p.todense() == w).all()))
    [4.] True

    References: Mishra et al., Accelerating Sparse Deep Neural Networks, arXiv:2104.08378, 2021.
    """
    if not isinstance(sparsity, tuple) or len(sparsity) != 2:
        raise TypeError(f"sparsity must be (n, m), got {sparsity!r}: write (2, 4) for 2:4")
    n, m = sparsity
    check_integer("the m of sparsity=(n, m)", m, 2, 16)
    check_integer("the n of sparsity=(n, m)", n, 1, m - 1)
    matrix, kept = kept_matrix(w, mask, axes)
    rows = matrix.shape[-2]
    if rows % m:
        raise ValueError(f"the {rows} inputs of w {jnp.shape(w)} are no multiple of m={m}: pad w, or choose axes")
    values, codes, most = _pack(matrix, kept, n, m)
    if not isinstance(most, Tracer) and most > n:
        raise ValueError(f"w does not fit {n}:{m}: a group of {m} inputs keeps {most}. Prune it to {n}:{m} first")
    return PackedArray(values, codes, n, m, jnp.shape(w), axes)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _pack(matrix: jax.Array, kept: jax.Array, n: int, m: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Values, codes, and the most that any group keeps."""
    *batch, rows, columns = matrix.shape
    matrix, kept = (a.reshape(*batch, rows // m, m, columns) for a in (matrix, kept))
    count = jnp.sum(kept, -2, keepdims=True)
    # Kept entries, and the first of the others up to n in all; then `slot` numbers them.
    chosen, slots = kept | (~kept & (_before(~kept) < n - count)), jnp.arange(n)[:, None]
    slot = _before(chosen)
    values, codes = jnp.zeros((), matrix.dtype), jnp.uint8(0)
    for i in range(m):
        here = chosen[..., i, None, :] & (slot[..., i, None, :] == slots)
        values = jnp.where(here & kept[..., i, None, :], matrix[..., i, None, :], values)
        codes = jnp.where(here, jnp.uint8(i), codes)
    values, codes = (a.reshape(*batch, rows // m * n, columns) for a in (loud(values, count <= n), codes))
    return values, _bytes(codes, _bits(m)), jnp.max(count, initial=0)


def _bits(m: int) -> int:
    return 1 if m == 2 else 2 if m <= 4 else 4


def _before(mask: jax.Array) -> jax.Array:
    """How many entries of the group before each one are True."""
    mask = mask.astype(jnp.int32)
    return jnp.cumsum(mask, -2) - mask


def _bytes(codes: jax.Array, bits: int) -> jax.Array:
    """Consecutive codes side by side in bytes, the last of which is filled up with 0."""
    *batch, n, columns = codes.shape
    per_byte = 8 // bits
    codes = jnp.pad(codes, [(0, 0)] * len(batch) + [(0, -n % per_byte), (0, 0)])
    codes = codes.reshape(*batch, -(-n // per_byte), per_byte, columns)
    return jnp.sum(codes << (bits * jnp.arange(per_byte, dtype=jnp.uint8)[:, None]), -2, dtype=jnp.uint8)


def _choose(code: jax.Array, among: list[jax.Array]) -> jax.Array:
    """among[code], by one comparison a bit of the code."""
    if len(among) == 1:
        return among[0]
    half = 2 ** ((len(among) - 1).bit_length() - 1)
    return jnp.where((code & half) != 0, _choose(code, among[half:]), _choose(code, among[:half]))
