"""Zero-mean weights: the first step of centred weight normalization and of weight standardization."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxweights.core.axes import Axes, Reading
from jaxweights.core.checks import check_weight
from jaxweights.core.transform import Transform
from jaxweights.numerics.dtypes import accumulation_dtype


def center(w: jax.Array, *, axes: Axes | None = None) -> jax.Array:
    """Subtracts the mean from the weight vector of each output unit: projection onto the hyperplane of sum 0.

    w' = w − mean(w), the mean over all that one output unit sums over.

    Args:
      w: float array of any shape.
      axes: how `w` is read as a matrix; (..., in, out) by default.

    Returns:
      Array of the shape and dtype of `w`, computed in float32 or wider. Equal weights become exactly 0. A float16
      result that would overflow becomes ±65504; a NaN or infinite weight makes its unit NaN.

    Raises:
      TypeError: `w` is not a float array.
      ValueError: `axes` does not fit `w`.

    >>> import jax.numpy as jnp
    >>> print(center(jnp.array([[3.0, 1.0], [4.0, 1.0]])))
    [[-0.5  0. ]
     [ 0.5  0. ]]

    References: Huang, Liu, Liu, Lang and Tao, Centered Weight Normalization in Accelerating Training of Deep Neural
    Networks, ICCV 2017.
    """
    w = check_weight(w)
    limit = float(jnp.finfo(w.dtype).max)
    return jnp.clip(centered(w, Reading.of(axes, w.shape).contracted), -limit, limit).astype(w.dtype)


def centered(w: jax.Array, axis: Sequence[int]) -> jax.Array:
    """w − mean(w) over `axis`, in float32 or wider."""
    x = w.astype(accumulation_dtype(w.dtype))
    if math.prod(x.shape[a] for a in axis) == 0:
        return x
    # Subtract one of the weights first: equal weights then have an exact mean, and weights far from 0 a precise one.
    x = x - jax.lax.stop_gradient(jnp.max(x, axis, keepdims=True))
    return x - jnp.mean(x, axis, keepdims=True)


@dataclasses.dataclass(frozen=True)
class Center(Transform):
    """Subtracts the mean of each output unit's weights. State: none.

    `Chain(Center(), WeightNorm())` is centred weight normalization, w' = g · (w − w̄) / ‖w − w̄‖ with a learned g that
    starts at ‖w − w̄‖.

    >>> import jax.numpy as jnp
    >>> print(Center().apply(jnp.array([3.0, 4.0]), {}))
    [-0.5  0.5]

    References: Huang et al., Centered Weight Normalization, ICCV 2017.
    """

    axes: Axes | None = None
    takes_axes: ClassVar[bool] = True
    unitwise: ClassVar[bool] = True

    def apply(self, w, state):
        """`center(w)`."""
        return center(w, axes=self.axes)
