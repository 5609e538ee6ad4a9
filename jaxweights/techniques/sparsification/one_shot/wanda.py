"""Wanda: pruning by weights and activations."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from jaxweights.core.axes import Axes, Reading, axes_or_default
from jaxweights.core.checks import check_weight
from jaxweights.core.method import Method
from jaxweights.numerics.counts import fraction_of
from jaxweights.numerics.dtypes import accumulation_dtype
from jaxweights.numerics.selection import by_value, smallest_mask
from jaxweights.numerics.sharding import auto_sharded
from jaxweights.techniques.sparsification.one_shot.reconstruction import reconstruct
from jaxweights.techniques.sparsification.pattern import Sparsity, check_sparsity


def wanda_mask(w: jax.Array, norm: jax.Array, sparsity: Sparsity, *, axes: Axes | None = None) -> jax.Array:
    """The mask that keeps, in each output unit, the weights that matter most for its output (Wanda).

    False where the score |W_ij|·‖x_i‖₂ is smallest among the inputs i of output unit j: at round(sparsity·n_in) of
    them, halves rounded up, or at m − n of every m consecutive inputs. Of equal scores, the first is pruned first.

    Args:
      w: float array of any shape.
      norm: ‖x_i‖₂ of each input over the calibration data, float array (*batch, [groups,] rows), as in the `InputStats`
        that `capture` returns.
      sparsity: fraction of zeros in [0, 1], a number or a scalar array; or (n, m), to keep n of every m consecutive
        inputs.
      axes: how `w` is read as a matrix, (..., in, out) by default. `InputStats` has it.

    Returns:
      Boolean array of the shape of `w`, true where a weight is kept. NaN ranks above infinity, so it is pruned last.

    Raises:
      TypeError: `w` or `norm` is not a float array, or `sparsity` is of the wrong type.
      ValueError: a shape or `axes` does not fit, or `sparsity` is out of range.

    >>> import jax.numpy as jnp
    >>> w = jnp.array([[3.0, 1.0], [2.0, -2.0]])
    >>> print(wanda_mask(w, jnp.array([1.0, 5.0]), 0.5))
    [[False False]
     [ True  True]]

    References: Sun, Liu, Bair and Kolter, A Simple and Effective Pruning Approach for Large Language Models,
    arXiv:2306.11695, 2023.
    """
    w, norm = check_weight(w), check_weight(norm, "norm")
    axes = axes_or_default(axes, w.ndim)
    *batch, rows, _ = jax.eval_shape(axes.matrix, w).shape
    check_sparsity(sparsity, rows)
    if norm.shape != (*batch, rows):
        raise ValueError(
            f"norm must have shape {(*batch, rows)} for a weight of shape {w.shape}, got {norm.shape}: take it, and "
            f"axes, from what capture returns for this weight"
        )

    return auto_sharded(lambda w, norm: _mask(w, norm, axes, sparsity), w, norm, like=w)


def _mask(w: jax.Array, norm: jax.Array, axes: Axes, sparsity: Sparsity) -> jax.Array:
    shape = w.shape
    w, r = Reading.of(axes, shape).split_groups(w)
    norm = _broadcastable(norm.astype(accumulation_dtype(norm.dtype)), r, w.shape)
    scores = jnp.abs(w).astype(accumulation_dtype(w.dtype)) * norm
    if not isinstance(sparsity, tuple):
        n_inputs = math.prod(w.shape[a] for a in r.contracted)
        return ~smallest_mask(scores, fraction_of(sparsity, n_inputs), axis=r.contracted).reshape(shape)
    n, m = sparsity
    matrix = axes.matrix(scores.reshape(shape))
    groups = matrix.reshape(*matrix.shape[:-2], -1, m, matrix.shape[-1])
    mask = ~smallest_mask(groups, m - n, axis=(-2,), rank=by_value)
    return axes.weight(mask.reshape(matrix.shape), shape)


def _broadcastable(rows: jax.Array, r: Reading, shape: tuple[int, ...]) -> jax.Array:
    """An array (*batch, rows), reshaped to broadcast to a weight of this shape."""
    order = (*r.batch, *r.contracted)
    split = rows.reshape([shape[a] for a in order])
    return jnp.expand_dims(jnp.transpose(split, [order.index(a) for a in sorted(order)]), r.output)


@dataclasses.dataclass(frozen=True)
class Wanda(Method):
    """Sets to 0 what `wanda_mask` does not keep: the weights that matter least for the outputs on the data.

    Args:
      sparsity: fraction of zeros in [0, 1]; or (n, m), to keep n of every m consecutive inputs.
      reconstruct: whether to adjust the kept weights by `reconstruct`, so that they make up for the others. It needs
        the second moment of the inputs.

    >>> import jax.numpy as jnp
    >>> import jaxweights as jw
    >>> params, x = {"kernel": jnp.array([[3.0], [2.0]])}, jnp.array([[1.0, 5.0], [0.0, 5.0]])
    >>> stats = jw.capture(lambda params, x: x @ params["kernel"], params, [x])
    >>> print(Wanda(0.5).fit(params["kernel"], stats["kernel"]).ravel())
    [0. 2.]
    >>> print(Wanda(0.5, reconstruct=True).fit(params["kernel"], stats["kernel"]).ravel().round(4))
    [0.  2.3]

    References: Sun, Liu, Bair and Kolter, A Simple and Effective Pruning Approach for Large Language Models,
    arXiv:2306.11695, 2023.
    """

    sparsity: Sparsity
    _: dataclasses.KW_ONLY
    reconstruct: bool = False

    def __post_init__(self):
        check_sparsity(self.sparsity, 0)

    @property
    def needs(self):  # type: ignore[override]
        """The norms of the inputs; their second moment too, to reconstruct."""
        return frozenset({"norm", "second_moment"} if self.reconstruct else {"norm"})

    def fit(self, w, stats):
        """Returns `w` where the mask is true, else 0; adjusted if asked for."""
        mask = wanda_mask(w, stats.norm, self.sparsity, axes=stats.axes)
        if self.reconstruct:
            return reconstruct(w, mask, stats.second_moment, axes=stats.axes)
        return jnp.where(mask, w, 0)
