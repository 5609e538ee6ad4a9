"""SparseGPT: pruning input by input; after each, the remaining weights are updated to make up for it."""

from __future__ import annotations

import dataclasses
import itertools
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxweights.core.axes import Axes, axes_or_default
from jaxweights.core.checks import check_integer, check_scalar, check_weight
from jaxweights.core.method import Method
from jaxweights.core.second_moment import with_second_moment
from jaxweights.core.transform import Number
from jaxweights.numerics.counts import round_half_up
from jaxweights.numerics.error_feedback import Block, error_feedback
from jaxweights.numerics.selection import Entries, smallest_mask
from jaxweights.techniques.sparsification.one_shot.reconstruction import reconstruct
from jaxweights.techniques.sparsification.pattern import Sparsity, check_sparsity


def sparsegpt(
    w: jax.Array,
    second_moment: jax.Array,
    sparsity: Sparsity,
    *,
    axes: Axes | None = None,
    damping: Number = 0.01,
    block: int = 128,
) -> tuple[jax.Array, jax.Array]:
    """Prunes a weight so that the layer's outputs on the calibration data change little (SparseGPT).

    Let H = E[xxᵀ] + λI and UᵀU = H⁻¹ with U upper triangular. The inputs i are visited in order. Of the weights of a
    block of inputs, those of smallest (w/U_ii)² are pruned, and the inputs after i are updated to make up for it:
    w_j ← w_j − U_ij·w_i/U_ii for j > i, in the output units in which w_i is pruned.

    Args:
      w: float array of any shape.
      second_moment: E[xxᵀ] of the inputs, or a multiple of it, float array (*batch, [groups,] rows, rows), as in
        the `InputStats` that `capture` returns.
      sparsity: fraction of zeros in [0, 1], a number or a scalar array; or (n, m), to keep n of every m consecutive
        inputs of each output unit.
      axes: how `w` is read as a matrix, (..., in, out) by default. `InputStats` has it.
      damping: λ as a fraction of the mean of the diagonal. Where it is too small for inputs that are linearly
        dependent (fewer samples than inputs, duplicates, `damping=0`), the diagonal is raised further, by about as
        much as its rounding errors. The result is then finite and close to the limit of no damping, which fits the
        calibration data alone.
      block: number of inputs for which the mask is chosen at once, and whose updates of later inputs are summed up.

    Returns:
      (w', mask): the new weight in the shape and dtype of `w`, and a boolean array, true where a weight is kept. Of the
      n weights of a matrix exactly round(sparsity·n) are pruned, and after each block the same fraction of the weights
      so far. The weights of an input that never occurs become 0. NaN or infinity in `w` or `second_moment` makes NaN.

    Raises:
      TypeError: `w` or `second_moment` is not a float array, or a number is of the wrong type.
      ValueError: a shape or `axes` does not fit, or a number is out of range.

    >>> import jax.numpy as jnp
    >>> second_moment = jnp.array([[1.0, 0.5], [0.5, 1.0]])  # two inputs that are often alike
    >>> w, mask = sparsegpt(jnp.array([[1.0], [4.0]]), second_moment, 0.5)
    >>> print(w.ravel().round(1), mask.ravel())
    [0.  4.5] [False  True]

    References: Frantar and Alistarh, SparseGPT: Massive Language Models Can be Accurately Pruned in One-Shot,
    arXiv:2301.00774, 2023.
    """
    w = check_weight(w)
    check_integer("block", block, 1)
    check_scalar("damping", damping, 0)
    *_, rows, columns = jax.eval_shape(axes_or_default(axes, w.ndim).matrix, w).shape
    check_sparsity(sparsity, rows)
    if w.size == 0:
        return w, jnp.ones(w.shape, bool)
    pattern = None
    if isinstance(sparsity, tuple):
        pattern, sparsity = sparsity, 0.0
        _, m = pattern
        block = max(1, block // m) * m
    block = min(block, rows)
    zeros = [round_half_up(sparsity, min(i, rows) * columns) for i in range(0, rows + block, block)]
    n_pruned = jnp.array([b - a for a, b in itertools.pairwise(zeros)], jnp.int32)
    prune = partial(_prune, n_pruned=n_pruned, damping=damping, pattern=pattern, block=block)
    new, mask = with_second_moment(prune, w, second_moment, axes=axes)
    return new.astype(w.dtype), mask


@partial(jax.jit, static_argnames=("pattern", "block"))
def _prune(w, h, n_pruned, damping, *, pattern: tuple[int, int] | None, block: int):
    """(w', mask) of one matrix. `n_pruned` has the count of each block; with a pattern it is not used."""

    def begin(of_block: Block, number: jax.Array) -> jax.Array:
        """The mask of a block; with a pattern, that of its first rows is made anew when they are reached."""
        padding = jnp.broadcast_to(~of_block.there[:, None], of_block.w.shape)  # pruned last
        scores = Entries(jnp.abs(of_block.w) / of_block.scale[:, None], last=padding)
        return ~smallest_mask(scores, n_pruned[number])

    def choose_group(mask: jax.Array, of_block: Block, i: jax.Array, *, n: int, m: int) -> jax.Array:
        """The mask with that of inputs i to i + m − 1 chosen."""
        group_w, scale = (jax.lax.dynamic_slice_in_dim(a, i, m) for a in (of_block.w, of_block.scale))
        chosen = ~smallest_mask(jnp.abs(group_w) / scale[:, None], m - n, axis=(0,))
        return jax.lax.dynamic_update_slice_in_dim(mask, chosen, i, 0)

    def visit(i: jax.Array, of_block: Block, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        if pattern is not None:
            n, m = pattern
            choose = partial(choose_group, n=n, m=m)
            mask = jax.lax.cond(i % m == 0, choose, lambda mask, of_block, i: mask, mask, of_block, i)
        return jnp.where(mask[i], of_block.w[i], 0), mask

    w = jnp.where((jnp.diagonal(h) > 0)[:, None], w, 0)  # of an input that never occurs
    new, masks = error_feedback(w, h, damping, begin, visit, block=block)
    return new, masks.reshape(-1, w.shape[1])[: len(w)]


@dataclasses.dataclass(frozen=True)
class SparseGPT(Method):
    """Prunes by `sparsegpt`: input by input, and after each, the remaining weights make up for it.

    Args:
      sparsity: fraction of zeros in [0, 1]; or (n, m), to keep n of every m consecutive inputs.
      reconstruct: whether to replace the kept weights at the end by those of `reconstruct`, the best for this mask.
      damping: λ as a fraction of the mean of the diagonal of the second moment, as in `sparsegpt`.

    >>> import jax.numpy as jnp
    >>> import jaxweights as jw
    >>> params, x = {"kernel": jnp.array([[1.0], [4.0]])}, jnp.array([[2.0, 1.0], [0.0, 1.0]])
    >>> stats = jw.capture(lambda params, x: x @ params["kernel"], params, [x])
    >>> print(SparseGPT(0.5, reconstruct=True).fit(params["kernel"], stats["kernel"]).ravel().round(4))
    [0. 5.]

    References: Frantar and Alistarh, SparseGPT: Massive Language Models Can be Accurately Pruned in One-Shot,
    arXiv:2301.00774, 2023.
    """

    sparsity: Sparsity
    _: dataclasses.KW_ONLY
    reconstruct: bool = False
    damping: Number = 0.01
    needs: ClassVar[frozenset[str]] = frozenset({"second_moment"})

    def __post_init__(self):
        check_sparsity(self.sparsity, 0)
        check_scalar("damping", self.damping, 0)

    def fit(self, w, stats):
        """Returns the pruned weight."""
        new, mask = sparsegpt(w, stats.second_moment, self.sparsity, axes=stats.axes, damping=self.damping)
        return reconstruct(w, mask, stats.second_moment, axes=stats.axes) if self.reconstruct else new
