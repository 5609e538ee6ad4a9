"""Weight standardization: zero mean and unit variance within each output unit's weight vector."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxweights.core.axes import Axes, Reading
from jaxweights.core.checks import check_scalar, check_state, check_weight
from jaxweights.core.transform import Number, Transform
from jaxweights.numerics.dtypes import accumulation_dtype
from jaxweights.numerics.norms import safe_divide, safe_norm
from jaxweights.techniques.weight_norm.centering import centered
from jaxweights.techniques.weight_norm.normalization import check_units


def weight_standardize(
    w: jax.Array,
    gain: jax.Array | None = None,
    *,
    scaled: bool = False,
    eps: Number = 1e-10,
    axes: Axes | None = None,
) -> jax.Array:
    """Standardises the weights of each output unit to mean 0 and variance 1.

    w' = gain · (w − μ) / √(σ² + ε), divided by √n if `scaled`. μ and σ² are the mean and the biased variance of the n
    weights that one output unit sums over.

    Args:
      w: float array of any shape.
      gain: factors, shape (*batch, *output) of `w`, any float dtype; 1 by default.
      scaled: whether to divide by √n, which preserves the variance of independent inputs. Up to ε, this is centred
        weight normalization.
      eps: ε >= 0, a number or a scalar array.
      axes: how `w` is read as a matrix; (..., in, out) by default.

    Returns:
      Array of the shape and dtype of `w`, computed in float32 or wider without overflow. A unit of equal weights
      becomes 0, with finite gradients; a NaN or infinite weight makes its unit NaN.

    Raises:
      TypeError: `w` is not a float array, or `eps` is not a number.
      ValueError: `axes` does not fit `w`, `gain` has another shape, or `eps` is negative or NaN.

    >>> import jax.numpy as jnp
    >>> print(weight_standardize(jnp.array([[3.0, 0.1], [5.0, 0.1], [3.0, 0.1], [5.0, 0.1]])))
    [[-1.  0.]
     [ 1.  0.]
     [-1.  0.]
     [ 1.  0.]]

    References: Qiao, Wang, Liu, Shen and Yuille, Micro-Batch Training with Batch-Channel Normalization and Weight
    Standardization, arXiv:1903.10520, 2019; Brock, De and Smith, Characterizing signal propagation to close the
    performance gap in unnormalized ResNets, arXiv:2101.08692, 2021, for the scaled form.
    """
    w = check_weight(w)
    check_scalar("eps", eps, 0)
    r = Reading.of(axes, w.shape)
    x = centered(w, r.contracted)
    root = math.sqrt(max(1, math.prod(w.shape[a] for a in r.contracted)))
    # √(σ² + ε) by hypot, with σ = ‖x‖/√n: nothing is squared, so nothing overflows.
    deviation = jnp.hypot(safe_norm(x, r.contracted, keepdims=True) / root, jnp.sqrt(jnp.asarray(eps, x.dtype)))
    x = safe_divide(x, deviation * root if scaled else deviation)
    if gain is not None:
        x = x * check_units("gain", gain, w, r).astype(x.dtype)
    return x.astype(w.dtype)


@dataclasses.dataclass(frozen=True)
class WeightStandardization(Transform):
    """Weight standardization, with a learned gain if `gain` is a number.

    `WeightStandardization()` suits a layer that a normalization layer follows. `WeightStandardization(gain,
    scaled=True)` is for networks without normalization layers: `gain` makes up for the variance lost in the preceding
    activation, for example √(2/(1 − 1/π)) for ReLU.

    State: `gain`, shape (*batch, *output), float32 or wider, initially the given number; none without a gain.

    >>> import jax.numpy as jnp
    >>> print(WeightStandardization().apply(jnp.array([3.0, 5.0]), {}))
    [-1.  1.]

    References: Qiao et al., arXiv:1903.10520, 2019; Brock, De and Smith, arXiv:2101.08692, 2021.
    """

    gain: float | None = None
    scaled: bool = False
    eps: float = 1e-10
    axes: Axes | None = None
    learned: ClassVar[frozenset[str]] = frozenset({"gain"})
    takes_axes: ClassVar[bool] = True
    unitwise: ClassVar[bool] = True

    def __post_init__(self):
        check_scalar("eps", self.eps, 0)
        if self.gain is not None:
            check_scalar("gain", self.gain)

    def init(self, w, key):
        """The initial gain of every unit."""
        w = check_weight(w)
        if self.gain is None:
            return {}
        contracted = Reading.of(self.axes, w.shape).contracted
        units = tuple(s for a, s in enumerate(w.shape) if a not in contracted)
        return {"gain": jnp.full(units, self.gain, accumulation_dtype(w.dtype))}

    def apply(self, w, state):
        """`weight_standardize(w, gain)`."""
        if self.gain is not None:
            check_state(state, gain=None)
        return weight_standardize(w, state.get("gain"), scaled=self.scaled, eps=self.eps, axes=self.axes)
