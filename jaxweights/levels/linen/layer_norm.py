"""Layer normalization and its relatives as Linen modules."""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn

from jaxweights.core.checks import check_weight
from jaxweights.levels.linen.affine import scale_and_bias
from jaxweights.techniques.batch_norm.statistics import check_features
from jaxweights.techniques.layer_norm import check_axis, count_groups, group_norm, instance_norm, layer_norm, rms_norm


class LayerNorm(nn.Module):
    """Layer normalization. Parameters are named as in Flax.

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
    def __call__(self, x, *, mask=None):
        """Normalises `x` within each sample; only entries where `mask` is true count."""
        x = check_weight(x, "x")
        axes = check_axis(self.reduction_axes, x.shape)
        scale, bias = scale_and_bias(self, tuple(x.shape[a] for a in axes), self.use_scale, self.use_bias)
        return layer_norm(x, scale, bias, axis=axes, where=mask, eps=self.epsilon)


class RMSNorm(nn.Module):
    """RMS normalization: division by the root mean square. The parameter is named as in Flax.

    Attributes:
      epsilon: ε under the root.
      use_scale: whether to multiply by a learned scale.
      reduction_axes: axis or axes to take the mean square over.
    """

    epsilon: float = 1e-6
    use_scale: bool = True
    reduction_axes: int | Sequence[int] = -1

    @nn.compact
    def __call__(self, x, *, mask=None):
        """Normalises `x` within each sample; only entries where `mask` is true count."""
        x = check_weight(x, "x")
        axes = check_axis(self.reduction_axes, x.shape)
        scale, _ = scale_and_bias(self, tuple(x.shape[a] for a in axes), self.use_scale, False)
        return rms_norm(x, scale, axis=axes, where=mask, eps=self.epsilon)


class GroupNorm(nn.Module):
    """Group normalization. Parameters are named as in Flax.

    Attributes:
      num_groups: number of groups of features; None if `group_size` is given.
      group_size: number of features per group, instead of `num_groups`.
      epsilon: ε under the root.
      use_bias: whether to add a learned bias.
      use_scale: whether to multiply by a learned scale.
    """

    num_groups: int | None = 32
    group_size: int | None = None
    epsilon: float = 1e-6
    use_bias: bool = True
    use_scale: bool = True

    @nn.compact
    def __call__(self, x, *, mask=None):
        """Normalises `x`, shape (batch, ..., features), per sample and group; only true entries of `mask` count."""
        x = check_features(x)
        n_groups = count_groups(x.shape[-1], self.num_groups, self.group_size)
        scale, bias = scale_and_bias(self, x.shape[-1:], self.use_scale, self.use_bias)
        return group_norm(x, scale, bias, n_groups=n_groups, where=mask, eps=self.epsilon)


class InstanceNorm(nn.Module):
    """Instance normalization. Parameters are named as in Flax.

    Attributes:
      epsilon: ε under the root.
      use_bias: whether to add a learned bias.
      use_scale: whether to multiply by a learned scale.
    """

    epsilon: float = 1e-6
    use_bias: bool = True
    use_scale: bool = True

    @nn.compact
    def __call__(self, x, *, mask=None):
        """Normalises each feature of each sample of `x`, shape (batch, *positions, features), over its positions."""
        x = check_features(x)
        scale, bias = scale_and_bias(self, x.shape[-1:], self.use_scale, self.use_bias)
        return instance_norm(x, scale, bias, where=mask, eps=self.epsilon)
