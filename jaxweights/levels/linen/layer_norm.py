"""Layer normalization and its relatives as Linen modules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jaxweights.core.checks import check_weight
from jaxweights.core.features import check_axis, check_features
from jaxweights.levels.linen.affine import result_dtype, scale_and_bias
from jaxweights.techniques.layer_norm import count_groups, group_norm, instance_norm, layer_norm, rms_norm


class LayerNorm(nn.Module):
    """Layer normalization. Attributes and parameters are named as in Flax.

    Attributes:
      epsilon: ε under the root.
      dtype: dtype of the result; by default that of the input and the parameters together.
      param_dtype: dtype of the parameters.
      use_bias: whether to add a learned bias.
      use_scale: whether to multiply by a learned scale.
      bias_init: initializer of the bias.
      scale_init: initializer of the scale.
      reduction_axes: axis or axes to normalise over.
      feature_axes: axis or axes along which the scale and the bias vary.
      axis_name: name(s) of mapped axes that split a sample over devices.
      axis_index_groups: groups of indices of the mapped axis, each with samples of its own.
    """

    epsilon: float = 1e-6
    dtype: Any = None
    param_dtype: Any = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: nn.initializers.Initializer = nn.initializers.zeros
    scale_init: nn.initializers.Initializer = nn.initializers.ones
    reduction_axes: int | Sequence[int] = -1
    feature_axes: int | Sequence[int] = -1
    axis_name: Any = None
    axis_index_groups: Any = None

    @nn.compact
    def __call__(self, x, *, mask=None):
        """Normalises `x` within each sample; only entries where `mask` is true count."""
        x = check_weight(x, "x")
        features = check_axis(self.feature_axes, x.shape, "feature_axes")
        scale, bias = scale_and_bias(self, tuple(x.shape[a] for a in features))
        return layer_norm(
            x,
            scale,
            bias,
            axis=self.reduction_axes,
            feature_axes=features,
            where=mask,
            **_common(self, x, scale, bias),
        )


class RMSNorm(nn.Module):
    """RMS normalization: division by the root mean square. Attributes and the parameter are named as in Flax.

    Attributes:
      epsilon: ε under the root.
      dtype: dtype of the result; by default that of the input and the parameter together.
      param_dtype: dtype of the parameter.
      use_scale: whether to multiply by a learned scale.
      scale_init: initializer of the scale.
      reduction_axes: axis or axes to take the mean square over.
      feature_axes: axis or axes along which the scale varies.
      axis_name: name(s) of mapped axes that split a sample over devices.
      axis_index_groups: groups of indices of the mapped axis, each with samples of its own.
    """

    epsilon: float = 1e-6
    dtype: Any = None
    param_dtype: Any = jnp.float32
    use_scale: bool = True
    scale_init: nn.initializers.Initializer = nn.initializers.ones
    reduction_axes: int | Sequence[int] = -1
    feature_axes: int | Sequence[int] = -1
    axis_name: Any = None
    axis_index_groups: Any = None

    @nn.compact
    def __call__(self, x, *, mask=None):
        """Normalises `x` within each sample; only entries where `mask` is true count."""
        x = check_weight(x, "x")
        features = check_axis(self.feature_axes, x.shape, "feature_axes")
        scale, _ = scale_and_bias(self, tuple(x.shape[a] for a in features))
        return rms_norm(
            x, scale, axis=self.reduction_axes, feature_axes=features, where=mask, **_common(self, x, scale)
        )


class GroupNorm(nn.Module):
    """Group normalization. Attributes and parameters are named as in Flax.

    Attributes:
      num_groups: number of groups of features; None if `group_size` is given.
      group_size: number of features per group, instead of `num_groups`.
      epsilon: ε under the root.
      dtype: dtype of the result; by default that of the input and the parameters together.
      param_dtype: dtype of the parameters.
      use_bias: whether to add a learned bias.
      use_scale: whether to multiply by a learned scale.
      bias_init: initializer of the bias.
      scale_init: initializer of the scale.
      reduction_axes: axes to normalise over, the last among them; by default all but the first.
      axis_name: name(s) of mapped axes that split a sample over devices.
      axis_index_groups: groups of indices of the mapped axis, each with samples of its own.
    """

    num_groups: int | None = 32
    group_size: int | None = None
    epsilon: float = 1e-6
    dtype: Any = None
    param_dtype: Any = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: nn.initializers.Initializer = nn.initializers.zeros
    scale_init: nn.initializers.Initializer = nn.initializers.ones
    reduction_axes: int | Sequence[int] | None = None
    axis_name: Any = None
    axis_index_groups: Any = None

    @nn.compact
    def __call__(self, x, *, mask=None):
        """Normalises `x`, shape (batch, ..., features), per sample and group; only true entries of `mask` count."""
        x = check_features(x)
        n_groups = count_groups(x.shape[-1], self.num_groups, self.group_size)
        scale, bias = scale_and_bias(self, x.shape[-1:])
        return group_norm(
            x,
            scale,
            bias,
            n_groups=n_groups,
            axis=self.reduction_axes,
            where=mask,
            **_common(self, x, scale, bias),
        )


class InstanceNorm(nn.Module):
    """Instance normalization. Attributes and parameters are named as in Flax.

    Attributes:
      epsilon: ε under the root.
      dtype: dtype of the result; by default that of the input and the parameters together.
      param_dtype: dtype of the parameters.
      use_bias: whether to add a learned bias.
      use_scale: whether to multiply by a learned scale.
      bias_init: initializer of the bias.
      scale_init: initializer of the scale.
      feature_axes: axis or axes of the features. All others but the first, of the batch, are normalised over.
      axis_name: name(s) of mapped axes that split a sample over devices.
      axis_index_groups: groups of indices of the mapped axis, each with samples of its own.
    """

    epsilon: float = 1e-6
    dtype: Any = None
    param_dtype: Any = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: nn.initializers.Initializer = nn.initializers.zeros
    scale_init: nn.initializers.Initializer = nn.initializers.ones
    feature_axes: int | Sequence[int] = -1
    axis_name: Any = None
    axis_index_groups: Any = None

    @nn.compact
    def __call__(self, x, *, mask=None):
        """Normalises each feature of each sample of `x`, shape (batch, *positions, features), over its positions."""
        x = check_features(x)
        features = check_axis(self.feature_axes, x.shape, "feature_axes")
        scale, bias = scale_and_bias(self, tuple(x.shape[a] for a in features))
        return instance_norm(x, scale, bias, feature_axes=features, where=mask, **_common(self, x, scale, bias))


def _common(module: Any, x, *parameters) -> dict[str, Any]:
    """The options that all norms share."""
    return {
        "axis_name": None if module.is_initializing() else module.axis_name,
        "axis_index_groups": None if module.is_initializing() else module.axis_index_groups,
        "eps": module.epsilon,
        "dtype": result_dtype(module.dtype, x, *parameters),
    }
