"""Hard thresholding: sparsification by a threshold on the magnitude."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxweights.core.checks import check_scalar, check_weight
from jaxweights.core.transform import Number, Scalar, Transform
from jaxweights.numerics.dtypes import accumulation_dtype


def sparsify(w: jax.Array, threshold: Number) -> jax.Array:
    """Sets weights of magnitude below a threshold to zero (hard thresholding).

    w' = w if |w| >= τ else 0, where τ is `threshold` rounded to the dtype of `w`.

    Args:
      w: float array of any shape.
      threshold: τ >= 0, a number or a scalar array.

    Returns:
      Array of the shape and dtype of `w`. The gradient is 1 where `w` is kept, else 0. NaN becomes 0.

    Raises:
      TypeError: `w` is not a float array, or `threshold` is not a number.
      ValueError: `threshold` is negative or NaN.

    >>> import jax.numpy as jnp
    >>> print(sparsify(jnp.array([-0.7, 0.2, 0.5]), 0.5))
    [-0.7  0.   0.5]
    """
    w = check_weight(w)
    check_scalar("threshold", threshold, 0)
    tau = jnp.asarray(threshold, accumulation_dtype(w.dtype)).astype(w.dtype)
    return jnp.where(jnp.abs(w) >= tau, w, jnp.zeros((), w.dtype))


@dataclasses.dataclass(frozen=True)
class Sparsify(Transform):
    """Sets weights of magnitude below a threshold to zero. State: none, unless `threshold` is a schedule.

    >>> import jax.numpy as jnp
    >>> print(Sparsify(0.5).apply(jnp.array([-0.7, 0.2]), {}))
    [-0.7  0. ]
    """

    threshold: Scalar
    scheduled: ClassVar[frozenset[str]] = frozenset({"threshold"})
    makes_zeros: ClassVar[bool] = True

    def __post_init__(self):
        check_scalar("threshold", self.threshold, 0, schedule=True)

    def apply(self, w, state):
        """`sparsify(w, threshold)`."""
        return sparsify(w, self.value("threshold", state))
