"""Layer normalization as an NNX module."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from jaxweights.checks import check_shape
from jaxweights.lifts.nnx.variables import value
from jaxweights.techniques.layer_norm import layer_norm


class LayerNorm(nnx.Module):
    """Layer normalization. Parameters are named as Flax's.

    Args:
      num_features: size of the normalised axis, or sizes of the axes.
      epsilon: ε under the root.
      use_bias: whether to add a learned bias.
      use_scale: whether to multiply by a learned scale.
      reduction_axes: axis or axes to normalise over.
      rngs: taken for the likeness to Flax's modules; nothing is drawn.

    >>> from flax import nnx
    >>> import jax.numpy as jnp
    >>> print(LayerNorm(2, epsilon=0.0)(jnp.array([1.0, 3.0])))
    [-1.  1.]
    """

    def __init__(
        self,
        num_features: int | Sequence[int],
        *,
        epsilon: float = 1e-6,
        use_bias: bool = True,
        use_scale: bool = True,
        reduction_axes: int | Sequence[int] = -1,
        rngs: nnx.Rngs | None = None,
    ):
        del rngs
        shape = check_shape("num_features", num_features if isinstance(num_features, Sequence) else (num_features,))
        self.scale = nnx.Param(jnp.ones(shape)) if use_scale else nnx.data(None)
        self.bias = nnx.Param(jnp.zeros(shape)) if use_bias else nnx.data(None)
        self.epsilon = epsilon
        self.reduction_axes = reduction_axes if isinstance(reduction_axes, int) else tuple(reduction_axes)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises `x` within each sample."""
        return layer_norm(x, value(self.scale), value(self.bias), axis=self.reduction_axes, eps=self.epsilon)
