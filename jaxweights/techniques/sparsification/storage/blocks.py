"""Block-sparse storage (BSR): the kept blocks of a matrix, dense, and their positions."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from jaxweights.core.axes import Axes
from jaxweights.core.checks import check_dtype, check_integer
from jaxweights.core.layer import Layer
from jaxweights.core.matrices import StoredMatrices
from jaxweights.techniques.sparsification.storage.kept import capacity, kept_matrix, nan_unless


@functools.partial(jax.tree_util.register_dataclass, data_fields=["blocks", "rows", "columns"], meta_fields=["layer"])
@dataclasses.dataclass(frozen=True)
class BlockSparseArray(StoredMatrices):
    """A weight stored as the blocks of its matrix in which anything is kept. A pytree node, one leaf to every level.

    Batch axes lead: `scan` and `vmap` over a stack see one layer at a time.

    Attributes:
      blocks: float array (*batch, [groups,] n_blocks, height, width), ordered by block column, then by block row.
      rows: int32 array (*batch, [groups,] n_blocks), the block row of each: its first row divided by the height.
      columns: int32 array of the same shape, the block column of each; one past the last for unused blocks.
      layer: the shape of one layer, and how it is read as a matrix.
    """

    blocks: jax.Array
    rows: jax.Array
    columns: jax.Array
    layer: Layer
    _array = ("rows", 1)

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of the weight."""
        return self.blocks.dtype

    @jax.jit
    def todense(self) -> jax.Array:
        """Returns the weight: kept blocks bit for bit, the others +0."""
        n_rows, n_columns = self._matrix_shape()
        *lead, _, height, width = self.blocks.shape
        n_down, n_across = self._grid()

        def matrix(blocks: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
            grid = jnp.zeros((n_down, n_across, height, width), self.dtype)
            grid = grid.at[rows, columns].set(blocks, mode="drop")
            return grid.swapaxes(1, 2).reshape(n_down * height, n_across * width)[:n_rows, :n_columns]

        for _ in lead:
            matrix = jax.vmap(matrix)
        return self.axes.weight(matrix(self.blocks, self.rows, self.columns), self.shape)

    def astype(self, dtype: jnp.dtype) -> BlockSparseArray:
        """The weight in another floating dtype."""
        return dataclasses.replace(self, blocks=self.blocks.astype(check_dtype(dtype)))

    @jax.jit
    def _times(self, x: jax.Array) -> jax.Array:
        """x @ w: each block is multiplied by its part of x, and the products are summed by block column."""
        _, height, width = self.blocks.shape
        n_down, n_across = self._grid()
        padded = jnp.pad(x, ((0, 0), (0, n_down * height - x.shape[1])))
        parts = padded.reshape(len(x), n_down, height)[:, self.rows]
        terms = jnp.einsum("xbh,bhw->bxw", parts, self.blocks.astype(x.dtype), precision="highest")
        sums = jax.ops.segment_sum(terms, self.columns, n_across, indices_are_sorted=True)
        return sums.swapaxes(0, 1).reshape(len(x), n_across * width)[:, : self._matrix_shape()[1]]

    def _grid(self) -> tuple[int, int]:
        """The numbers of block rows and block columns."""
        *_, height, width = self.blocks.shape
        n_rows, n_columns = self._matrix_shape()
        return -(-n_rows // height), -(-n_columns // width)

    def _matrix_shape(self) -> tuple[int, int]:
        shaped = jax.ShapeDtypeStruct(self.shape, self.dtype)
        *_, n_rows, n_columns = jax.eval_shape(self.axes.matrix, shaped).shape
        return n_rows, n_columns


def pack_blocks(
    w: jax.Array,
    mask: jax.Array | None = None,
    *,
    block: tuple[int, int] = (32, 32),
    n_blocks: int | None = None,
    axes: Axes | None = None,
) -> BlockSparseArray:
    """Stores a weight as the blocks of its matrix in which anything is kept.

    Args:
      w: float array of any shape.
      mask: boolean array of the shape of `w`, true where a weight is kept; by default where `w` is not 0.
      block: (height, width) of a block. Blocks at the lower and right edges of the matrix are filled up with zeros.
      n_blocks: number of blocks to allocate for each matrix, by default as many as the fullest one keeps. Required
        under jit.
      axes: how `w` is read as a matrix; (..., in, out) by default. A stack of layers needs its batch axes, as in
        `Axes(batch=0)`, to be sliced by `scan` and `vmap`.

    Returns:
      A `BlockSparseArray`. Its `todense()` is `where(mask, w, 0)` bit for bit. Without a mask, -0.0 counts as 0 and NaN
      is kept. Under jit, all blocks of a matrix become NaN if `n_blocks` is too small for it.

    Raises:
      TypeError: `w` is not a float array, `mask` is not a boolean array, or a number is not an integer.
      ValueError: a number is out of range, or `n_blocks` is too small.

    >>> import jax.numpy as jnp
    >>> w = jnp.zeros((4, 6)).at[:2, 4:].set(2.0)
    >>> b = pack_blocks(w, block=(2, 2))
    >>> print(b.blocks.shape, b.rows, b.columns, jnp.ones(4) @ b)
    (1, 2, 2) [0] [2] [0. 0. 0. 0. 4. 4.]

    References: Gray, Radford and Kingma, GPU Kernels for Block-Sparse Weights, 2017.
    """
    matrix, kept, layer = kept_matrix(w, mask, axes)
    height, width = _block(block)
    size = capacity("n_blocks", _kept_blocks(kept, height, width), n_blocks)

    def gather(matrix: jax.Array, kept: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        return _gather(matrix, kept, height, width, size)

    for _ in matrix.shape[:-2]:
        gather = jax.vmap(gather)
    return BlockSparseArray(*gather(matrix, kept), layer)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _kept_blocks(kept: jax.Array, height: int, width: int) -> jax.Array:
    """Whether anything in each block is kept, shape (..., block columns, block rows)."""
    return _cut(kept, height, width).any((-2, -1))


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _gather(matrix, kept, height: int, width: int, size: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(blocks, rows, columns) of the kept blocks."""
    kept_blocks = _kept_blocks(kept, height, width)
    columns, rows = jnp.nonzero(kept_blocks, size=size, fill_value=(len(kept_blocks), 0))
    grid = _cut(jnp.where(kept, matrix, jnp.zeros((), matrix.dtype)), height, width)
    blocks = nan_unless(jnp.sum(kept_blocks) <= size, grid.at[columns, rows].get(mode="fill", fill_value=0))
    return blocks, rows.astype(jnp.int32), columns.astype(jnp.int32)


def _cut(matrix: jax.Array, height: int, width: int) -> jax.Array:
    """The blocks of each matrix, shape (..., block columns, block rows, height, width), padded with 0."""
    *lead, rows, columns = matrix.shape
    matrix = jnp.pad(matrix, [(0, 0) for _ in lead] + [(0, -rows % height), (0, -columns % width)])
    blocks = matrix.reshape(*lead, -(-rows // height), height, -(-columns // width), width)
    return jnp.moveaxis(blocks, -2, -4)


def _block(block) -> tuple[int, int]:
    if not isinstance(block, tuple | list) or len(block) != 2:
        raise TypeError(f"block must be (height, width), got {block!r}: write (32, 32)")
    for side, value in zip(("height", "width"), block, strict=True):
        check_integer(f"the {side} of block", value, 1)
    return block[0], block[1]
