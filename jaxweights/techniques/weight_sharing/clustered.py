"""A clustered weight as it is stored: a codebook, and a code of a few bits for each entry."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxweights.core.axes import Axes, Reading
from jaxweights.core.checks import check_dtype, check_weight
from jaxweights.core.layer import Layer, same_matrices, stored_matrix
from jaxweights.core.matrices import StoredMatrices
from jaxweights.core.packing import pack, rows_of_a_period, unpack, unpack_rows
from jaxweights.core.stacks import first_axis, split
from jaxweights.techniques.weight_sharing.products import look_up, times

MOST_VALUES = 256
"""The most values that a clustered weight is stored with: codes have up to 8 bits."""


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["words", "codebook"], meta_fields=["has_zeros", "layer"]
)
@dataclasses.dataclass(frozen=True)
class ClusteredArray(StoredMatrices):
    """A weight of a few distinct values: w = codebook[code]. A pytree node, one leaf to every level.

    The weight is stored as a matrix of K rows, its inputs, and N columns, its output units. Batch axes lead: `jit`,
    `vmap`, `scan` and checkpoints take it, and a loop over a stack sees one layer at a time.

    A code has ⌈log2 n⌉ bits, at least 1, for n values: the k of the codebook, and 0 if the weight `has_zeros`. This is
    code k, and stays 0 whatever becomes of the codebook. A code beyond stands for NaN.

    Attributes:
      words: int32 (*batch, [groups,] words, N), the codes as `jaxweights.formats.pack` packs them along the rows.
      codebook: float array (*batch, [groups,] k, N), or (*batch, [groups,] k, 1) if all output units share one.
      has_zeros: whether code k stands for 0.
      layer: the shape of one layer, and how it is read as a matrix.
    """

    words: jax.Array
    codebook: jax.Array
    has_zeros: bool
    layer: Layer
    _array = ("words", 2)

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of the weight."""
        return self.codebook.dtype

    @property
    def n_values(self) -> int:
        """The number of values that have a code."""
        return self.codebook.shape[-2] + self.has_zeros

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return max(1, (self.n_values - 1).bit_length())

    @property
    def rows(self) -> int:
        """K, the number of inputs of an output unit."""
        r = Reading.of(self.axes, self.shape)
        return math.prod(self.shape[a] for a in r.contracted)

    @property
    def codes(self) -> jax.Array:
        """The codes, int32 (*batch, [groups,] K, N)."""
        return unpack(self.words, self.bits, self.rows)

    @jax.jit
    def todense(self) -> jax.Array:
        """The weight as an array."""
        return self.axes.weight(look_up(self._table(), self.codes), self.shape)

    def astype(self, dtype: jnp.dtype) -> ClusteredArray:
        """The weight in another floating dtype."""
        return dataclasses.replace(self, codebook=self.codebook.astype(check_dtype(dtype)))

    def read_as(self, axes: Axes) -> ClusteredArray | None:
        """The same weight if it is stored as these matrices, or as their stack along its first axis; else None."""
        if same_matrices(axes, self.axes, self.shape):
            return self
        stack = self._stacked()
        return stack if stack is not None and same_matrices(axes, stack.axes, self.shape) else None

    def _stacked(self) -> ClusteredArray | None:
        """The weight with its first axis as a batch axis; None where a slice has not whole words of its own."""
        found = first_axis(self.axes, self.shape)
        if found is None:
            return None
        (axes, of_rows), n = found, self.shape[0]
        if of_rows and self.rows // n % rows_of_a_period(self.bits):
            return None
        words = split(self.words, n, -2 if of_rows else -1)
        codebook = (
            jnp.broadcast_to(self.codebook, (n, *self.codebook.shape)) if of_rows else split(self.codebook, n, -1)
        )
        return ClusteredArray(words, codebook, self.has_zeros, Layer.of(axes, self.shape))

    def _times(self, x: jax.Array) -> jax.Array:
        return times(x, (self.words, self._table().astype(x.dtype)))

    def _rows(self, index: jax.Array) -> jax.Array:
        return look_up(self._table(), unpack_rows(self.words, self.bits, index))

    def _columns(self, index: jax.Array) -> ClusteredArray:
        codebook = self.codebook if self.codebook.shape[-1] == 1 else self.codebook[..., index]
        return dataclasses.replace(self, words=self.words[..., index], codebook=codebook)

    def __repr__(self):
        if not all(hasattr(a, "size") for a in (self.words, self.codebook)):  # a tree of anything else
            return f"ClusteredArray(words={self.words!r}, codebook={self.codebook!r})"
        shape = "×".join(map(str, self.shape))
        return f"ClusteredArray({shape} {self.dtype} of {self.n_values} values; {self.nbytes:,} bytes)"

    def _table(self) -> jax.Array:
        """The values of all 2^bits codes, (*batch, [groups,] 2^bits, N or 1)."""
        *lead, _, columns = self.codebook.shape
        zeros = jnp.zeros((*lead, int(self.has_zeros), columns), self.dtype)
        unused = jnp.full((*lead, 2**self.bits - self.n_values, columns), jnp.nan, self.dtype)
        return jnp.concatenate([self.codebook, zeros, unused], -2)


def store_clusters(
    codebook: jax.Array, index: jax.Array, *, axes: Axes | None = None, has_zeros: bool | None = None
) -> ClusteredArray:
    """Stores a clustered weight in ⌈log2 n⌉ bits an entry and a codebook, for its n values.

    The weight is `share(codebook, index)`: codebook[index], and 0 where the index is −1.

    Args:
      codebook: float array of up to 256 values: of shape (k,); or (units, k) with one codebook for each output unit,
        or (*batch, k) with one for each weight of a stack.
      index: integer array of the shape of the weight, with entries from −1 to k − 1, as `cluster` returns it.
      axes: how the weight is read as a matrix; (..., in, out) by default. A stack of layers needs its batch axes, as in
        `Axes(batch=0)`, to be sliced by `scan` and `vmap`.
      has_zeros: whether −1 occurs, which then takes a code of its own. By default it is looked up. Required under jit.

    Returns:
      A `ClusteredArray`. Its `todense()` is the weight bit for bit. Under jit, the codebook becomes NaN if an entry of
      `index` is out of range.

    Raises:
      TypeError: `codebook` is not a float array, or `index` not an integer array.
      ValueError: there are no values or more than 256, the shapes do not fit, or an entry of `index` is out of range.

    >>> import jax.numpy as jnp
    >>> import jaxweights as jw
    >>> w = jnp.array([[0.0, 1.0], [1.25, 0.25]])
    >>> stored = store_clusters(*jw.cluster(w, 2))
    >>> print(stored, jnp.array([2.0, 1.0]) @ stored)
    ClusteredArray(2×2 float32 of 2 values; 16 bytes) [1.375 2.375]

    References: Han, Mao and Dally, Deep Compression: Compressing Deep Neural Networks with Pruning, Trained
    Quantization and Huffman Coding, arXiv:1510.00149, 2015.
    """
    codebook = check_weight(codebook, "codebook")
    kind = index.dtype if isinstance(index, jax.Array | np.ndarray) else type(index).__name__
    if not isinstance(index, jax.Array | np.ndarray) or not jnp.issubdtype(kind, jnp.integer):
        raise TypeError(f"index must be an integer array, got {kind}: pass what cluster returned")
    if codebook.ndim == 0 or codebook.size == 0:
        raise ValueError(f"codebook must have shape (k,) or (units, k), got {codebook.shape}: give at least one value")
    k = codebook.shape[-1]
    if not isinstance(index, Tracer):
        low, high = (int(index.min()), int(index.max())) if index.size else (0, 0)
        least = 0 if has_zeros is False else -1
        if low < least or high >= k:
            raise ValueError(f"index must be from {least} to {k - 1} for {k} values, got {low} to {high}")
        has_zeros = low == -1 if has_zeros is None else has_zeros
    if has_zeros is None:
        raise ValueError("has_zeros must be given under jit, where it is not known yet whether the index has a -1")
    if k + has_zeros > MOST_VALUES:
        got = f"{k} and 0" if has_zeros else str(k)
        raise ValueError(f"a weight of up to {MOST_VALUES} values can be stored, got {got}: cluster it into fewer")
    return _store(codebook, index, axes, has_zeros)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _store(codebook: jax.Array, index: jax.Array, axes: Axes | None, has_zeros: bool) -> ClusteredArray:
    k = codebook.shape[-1]
    index = jnp.asarray(index, jnp.int32)
    in_range = jnp.all((index >= (-1 if has_zeros else 0)) & (index < k))
    codes, layer = stored_matrix(jnp.where(index == -1, k, index), axes)
    books = _of_matrices(codebook, codes.shape, codes.ndim - 2 - (layer.axes.groups > 1))
    books = jnp.where(in_range, books, jnp.full((), jnp.nan, books.dtype))
    stored = ClusteredArray(codes, books, has_zeros, layer)
    return dataclasses.replace(stored, words=pack(codes, stored.bits))


def _of_matrices(codebook: jax.Array, matrices: tuple[int, ...], n_batch: int) -> jax.Array:
    """The codebook of each matrix (*lead, K, N), as an array (*lead, k, N or 1)."""
    *lead, _, columns = matrices
    *given, k = codebook.shape
    batch, groups = lead[:n_batch], lead[n_batch:]
    if tuple(given) in ((), tuple(batch)):
        books = codebook.reshape(*(given or [1] * n_batch), *[1] * len(groups), k, 1)
        return jnp.broadcast_to(books, (*lead, k, 1))
    if math.prod(given) == math.prod(lead) * columns:
        return codebook.reshape(*lead, columns, k).swapaxes(-1, -2)
    raise ValueError(
        f"codebook must have shape (k,), or (units, k) for {math.prod(lead) * columns} output units"
        f"{f', or {(*batch, k)} for a stack' if batch else ''}, got {codebook.shape}: pass what cluster returned"
    )
