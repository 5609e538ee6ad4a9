"""Error feedback: rows of a matrix take new values one after the other, and later rows make up for the errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from jaxweights.numerics.inverse_factor import inverse_factor

S = TypeVar("S")


class Block(NamedTuple):
    """Consecutive rows of a matrix, as the errors of the rows before them leave them.

    Attributes:
      w: the rows; those that were visited have their new values.
      scale: U_ii of each. (w/U_ii)² is what it costs to set a weight to 0, if all later rows make up for it.
      there: whether each row is in the matrix. Those that pad the last block are 0.
    """

    w: jax.Array
    scale: jax.Array
    there: jax.Array


def error_feedback(
    w: jax.Array,
    h: jax.Array,
    damping: float | jax.Array,
    begin: Callable[[Block, jax.Array], S],
    visit: Callable[[jax.Array, Block, S], tuple[jax.Array, S]],
    *,
    block: int,
) -> tuple[jax.Array, S]:
    """Gives the rows of a matrix new values, one after the other; after each, the later rows make up for its error.

    Let UᵀU = (H + λI)⁻¹ with U upper triangular. Row i takes a new value q, and each row j > i moves:
    w_j ← w_j − U_ij·(w_i − q)/U_ii. That changes xᵀW least, for inputs x of second moment H. Pruning takes q = 0 or w_i
    (SparseGPT), quantization the nearest code (GPTQ).

    Args:
      w: float array (rows, columns).
      h: float array (rows, rows), positive semidefinite. Errors of rows whose input never occurs, H_ii = 0, move no
        others.
      damping: λ as a fraction of the mean of the diagonal of H.
      begin: (block, its number) -> state, a pytree, when all rows before the block have their values.
      visit: (i, block, state) -> (the value that row i of the block takes, state).
      block: number of rows of which the updates of later rows are summed up.

    Returns:
      (w', the last states of all blocks, along a first axis).

    References: Frantar, Ashkboos, Hoefler and Alistarh, GPTQ: Accurate Post-Training Quantization for Generative
    Pre-trained Transformers, arXiv:2210.17323, 2022; Frantar and Alistarh, SparseGPT, arXiv:2301.00774, 2023.
    """
    rows = len(w)
    n_blocks = -(-rows // block)
    n_padding = n_blocks * block - rows
    # Rows that pad the last block have no effect on the others.
    u = jnp.pad(inverse_factor(h, damping), ((0, n_padding), (0, n_padding))).astype(w.dtype)
    index = jnp.arange(len(u))
    diagonal = jnp.where(index < rows, jnp.diagonal(u), 1)
    w = jnp.pad(w, ((0, n_padding), (0, 0)))

    def visit_block(w: jax.Array, number: jax.Array) -> tuple[jax.Array, S]:
        start = block * number
        u_block = jax.lax.dynamic_slice_in_dim(u, start, block)
        u_within = jax.lax.dynamic_slice_in_dim(u_block, start, block, 1)
        at_start = Block(
            jax.lax.dynamic_slice_in_dim(w, start, block),
            jax.lax.dynamic_slice_in_dim(diagonal, start, block),
            start + jnp.arange(block) < rows,
        )

        def visit_row(i: jax.Array, carry: tuple[jax.Array, S, jax.Array]) -> tuple[jax.Array, S, jax.Array]:
            of_block, state, errors = carry
            value, state = visit(i, at_start._replace(w=of_block), state)
            error = (of_block[i] - value) / at_start.scale[i]
            of_block = (of_block - u_within[i][:, None] * error[None]).at[i].set(value)
            return of_block, state, errors.at[i].set(error)

        carry: Any = (at_start.w, begin(at_start, number), jnp.zeros_like(at_start.w))
        of_block, state, errors = jax.lax.fori_loop(0, block, visit_row, carry)
        u_later = jnp.where(index < start + block, 0, u_block)
        w = w - jnp.matmul(u_later.T, errors, precision="highest")
        return jax.lax.dynamic_update_slice_in_dim(w, of_block, start, 0), state

    w, states = jax.lax.scan(visit_block, w, jnp.arange(n_blocks))
    return w[:rows], states
