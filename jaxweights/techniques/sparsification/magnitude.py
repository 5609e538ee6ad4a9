"""Sparsification by magnitude: a threshold, or the exact fraction of smallest weights."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxweights.checks import check_scalar, check_state, check_weight
from jaxweights.counts import share
from jaxweights.numerics import wide
from jaxweights.selection import smallest_mask
from jaxweights.transform import Number, Scalar, Transform


def sparsify(w: jax.Array, threshold: Number) -> jax.Array:
    """Sets weights of magnitude below a threshold to zero (hard thresholding).

    w' = w if |w| >= τ else 0; τ is `threshold` in the dtype of `w`.

    Args:
      w: float array of any shape.
      threshold: τ >= 0, a number or a scalar array.

    Returns:
      Array of the shape and dtype of `w`. The gradient is 1 where `w` is kept, else 0. NaN becomes 0.

    Raises:
      TypeError: `w` is not a float array, or `threshold` not a number.
      ValueError: `threshold` is negative or NaN.

    >>> import jax.numpy as jnp
    >>> print(sparsify(jnp.array([-0.7, 0.2, 0.5]), 0.5))
    [-0.7  0.   0.5]
    """
    w = check_weight(w)
    check_scalar("threshold", threshold, 0)
    tau = jnp.asarray(threshold, wide(w.dtype)).astype(w.dtype)
    return jnp.where(jnp.abs(w) >= tau, w, jnp.zeros((), w.dtype))


def magnitude_mask(w: jax.Array, sparsity: Number) -> jax.Array:
    """The mask that keeps the weights of largest magnitude.

    False at the round(sparsity·n) weights of smallest |w|, n the size of `w`, half a weight rounded up; of equal
    magnitudes the one with the lower flat index goes first. The count is exact at any size.

    Args:
      w: float array of any shape.
      sparsity: fraction of zeros in [0, 1], a number or a scalar array.

    Returns:
      Boolean array of the shape of `w`. NaN ranks above infinity: it is kept longest.

    Raises:
      TypeError: `w` is not a float array, or `sparsity` not a number.
      ValueError: `sparsity` is NaN or outside [0, 1].

    >>> import jax.numpy as jnp
    >>> print(magnitude_mask(jnp.array([0.3, -2.0, 0.1, 1.0]), 0.5))
    [False  True False  True]

    References: Han, Pool, Tran and Dally, Learning both Weights and Connections for Efficient Neural Networks,
    arXiv:1506.02626, 2015.
    """
    w = check_weight(w)
    check_scalar("sparsity", sparsity, 0, 1)
    if w.size == 0:
        return jnp.ones(w.shape, bool)
    return ~smallest_mask(w, share(sparsity, w.size))


@dataclasses.dataclass(frozen=True)
class Sparsify(Transform):
    """Sets weights below a threshold to zero. State: none, unless `threshold` is a schedule.

    >>> import jax.numpy as jnp
    >>> print(Sparsify(0.5).apply(jnp.array([-0.7, 0.2]), {}))
    [-0.7  0. ]
    """

    threshold: Scalar

    def __post_init__(self):
        check_scalar("threshold", self.threshold, 0, schedule=True)

    def apply(self, w, state):
        """`sparsify(w, threshold)`."""
        return sparsify(w, self.value("threshold", state))


@dataclasses.dataclass(frozen=True)
class Prune(Transform):
    """Sets the given fraction of weights to zero, those of smallest magnitude when the mask is made.

    A number prunes once: the mask is made from the initial weights and kept. A schedule prunes gradually: each
    update makes the mask anew, for the fraction of its step, and what is pruned stays pruned.

    State: `mask`, bool, the shape of `w`, true where a weight is kept.

    >>> import jax, jax.numpy as jnp
    >>> w, t = jnp.array([0.3, -2.0, 0.1, 1.0]), Prune(0.5)
    >>> print(t.apply(w, t.init(w, jax.random.key(0))))
    [ 0. -2.  0.  1.]

    References: Han et al., arXiv:1506.02626, 2015; Zhu and Gupta, To prune, or not to prune: exploring the
    efficacy of pruning for model compression, arXiv:1710.01878, 2017.
    """

    sparsity: Scalar

    def __post_init__(self):
        check_scalar("sparsity", self.sparsity, 0, 1, schedule=True)

    def init(self, w, key):
        """The mask for the initial weights."""
        state = super().init(w, key)
        return {**state, "mask": magnitude_mask(w, self.value("sparsity", state))}

    def update(self, w, state, grad=None):
        """The mask for the sparsity of this step, if it is scheduled."""
        if not callable(self.sparsity):
            return state
        state = super().update(w, state, grad)
        return {**state, "mask": magnitude_mask(self.apply(w, state), state["sparsity"]) & state["mask"]}

    def apply(self, w, state):
        """`w` where the mask is true, else 0."""
        w = check_weight(w)
        check_state(state, mask=w.shape)
        return jnp.where(state["mask"], w, jnp.zeros((), w.dtype))
