"""Layer normalization as a Linen module."""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn

from jaxweights.checks import check_weight
from jaxweights.techniques.layer_norm import check_axis, layer_norm


class LayerNorm(nn.Module):
    """Layer normalization. Parameters are named as Flax's.

    Attributes:
      epsilon: ε under the root.
      use_bias: whether to add a learned bias.
      use_scale: whether to multiply by a learned scale.
      reduction_axes: axis or axes to normalise over.
    """

    epsilon: float = 1e-6
    use_bias: bool = True
    use_scale: bool = True
    reduction_axes: int | Sequence[int] = -1

    @nn.compact
    def __call__(self, x):
        """Normalises `x` within each sample."""
        x = check_weight(x, "x")
        axes = check_axis(self.reduction_axes, x.shape)
        shape = tuple(x.shape[a] for a in axes)
        scale = self.param("scale", nn.initializers.ones, shape) if self.use_scale else None
        bias = self.param("bias", nn.initializers.zeros, shape) if self.use_bias else None
        return layer_norm(x, scale, bias, axis=axes, eps=self.epsilon)
