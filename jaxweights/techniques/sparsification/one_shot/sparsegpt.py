"""SparseGPT: pruning row by row, each time with the rest of the weights adjusted to make up for it."""

from __future__ import annotations

import itertools
from functools import partial

import jax
import jax.numpy as jnp

from jaxweights.core.axes import Axes, axes_or_default
from jaxweights.core.checks import check_integer, check_scalar, check_weight
from jaxweights.core.transform import Number
from jaxweights.numerics.counts import round_half_up
from jaxweights.numerics.selection import smallest_mask
from jaxweights.techniques.sparsification.one_shot.second_moment import inverse_factor, with_second_moment
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
    """Prunes a weight with little change to its outputs on the inputs it was calibrated with.

    With H = E[xxᵀ] + λI and UᵀU = H⁻¹, U upper triangular, the inputs i are gone through in order. Of the weights
    of a block of inputs those of least (w/U_ii)² are pruned, and what that costs is made up for by the inputs still to
    come: w_j ← w_j − U_ij·w_i/U_ii for j > i, in the output units in which w_i is pruned.

    Args:
      w: float array of any shape.
      second_moment: E[xxᵀ] of the inputs, or a multiple of it, float array (*batch, [groups,] rows, rows), as in
        the `InputStats` that `capture` returns.
      sparsity: fraction of zeros in [0, 1], a number or a scalar array; or (n, m), to keep n of every m consecutive
        inputs of each output unit.
      axes: how `w` is read as a matrix, (..., in, out) by default. `InputStats` has it.
      damping: λ as a fraction of the mean of the diagonal.
      block: number of inputs among which the pruned are chosen at once, and whose effect on the others is summed up.

    Returns:
      (w', mask): the new weights, in the shape and dtype of `w`, and where they are kept, boolean. The count of zeros
      is round(sparsity·n), n the size of a matrix, exactly, and so it is at the end of each block. An input that never
      occurs has its weights set to 0. NaN or infinity in `w` or `second_moment` makes NaN.

    Raises:
      TypeError: `w` or `second_moment` is not a float array, or a number is of the wrong kind.
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
    group = None
    if isinstance(sparsity, tuple):
        group, sparsity = sparsity, 0.0
        block = max(1, block // group[1]) * group[1]
    block = min(block, rows)
    ends = [round_half_up(sparsity, min(i, rows) * columns) for i in range(0, rows + block, block)]
    counts = [b - a for a, b in itertools.pairwise(ends)]
    prune = partial(_prune, counts=jnp.array(counts, jnp.int32), damping=damping, group=group, block=block)
    new, mask = with_second_moment(prune, w, second_moment, axes=axes)
    return new.astype(w.dtype), mask


@partial(jax.jit, static_argnames=("group", "block"))
def _prune(w, h, counts, damping, *, group: tuple[int, int] | None, block: int):
    """(w', mask) of one matrix."""
    rows, columns = w.shape
    n_blocks = len(counts)
    rest = n_blocks * block - rows
    # What is added to fill the last block has no effect on the rest, and is chosen last.
    u = jnp.pad(inverse_factor(h, damping), ((0, rest), (0, rest))).astype(w.dtype)
    scale = jnp.diagonal(u) + (jnp.arange(len(u)) >= rows)
    w = jnp.pad(jnp.where((jnp.diagonal(h) > 0)[:, None], w, 0), ((0, rest), (0, 0)))

    def one_block(w, numbered):
        start, count = numbered
        part = jax.lax.dynamic_slice_in_dim(w, start, block)
        ahead = jax.lax.dynamic_slice_in_dim(u, start, block)
        scales = jax.lax.dynamic_slice_in_dim(scale, start, block)
        within = jax.lax.dynamic_slice_in_dim(ahead, start, block, 1)
        added = start + jnp.arange(block) >= rows
        scores = jnp.where(added[:, None], jnp.inf, jnp.abs(part) / scales[:, None])
        mask = ~smallest_mask(scores, count)

        def one_row(i, state):
            part, mask, errors = state
            if group is not None:
                n, m = group
                those = lambda a: jax.lax.dynamic_slice_in_dim(a, i, m)
                chosen = lambda: ~smallest_mask(jnp.abs(those(part)) / those(scales)[:, None], m - n, axis=(0,))
                choose = lambda: jax.lax.dynamic_update_slice_in_dim(mask, chosen(), i, 0)
                mask = jax.lax.cond(i % m == 0, choose, lambda: mask)
            error = jnp.where(mask[i], 0, part[i]) / scales[i]
            part = part - within[i][:, None] * error
            return part, mask, errors.at[i].set(error)

        part, mask, errors = jax.lax.fori_loop(0, block, one_row, (part, mask, jnp.zeros_like(part)))
        later = jnp.where(jnp.arange(len(u)) < start + block, 0, ahead)
        w = w - jnp.matmul(later.T, errors, precision="highest")
        return jax.lax.dynamic_update_slice_in_dim(w, jnp.where(mask, part, 0), start, 0), mask

    w, masks = jax.lax.scan(one_block, w, (block * jnp.arange(n_blocks), counts))
    return w[:rows], masks.reshape(n_blocks * block, columns)[:rows]
