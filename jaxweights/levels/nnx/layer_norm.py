"""Layer normalization and its relatives as NNX modules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxweights.levels.nnx.variables import (
    ONES,
    ZEROS,
    Initializer,
    PromoteDtype,
    feature_shape,
    learned,
    promote_dtype,
    result_dtype,
    static,
    value,
)
from jaxweights.techniques.layer_norm import count_groups, group_norm, instance_norm, layer_norm, rms_norm

NO_METADATA: Mapping[str, Any] = MappingProxyType({})


class LayerNorm(nnx.Module):
    """Layer normalization. Arguments and parameters are named as in Flax.

    Args:
      num_features: size of the feature axis, or sizes of the axes.
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
      promote_dtype: function that promotes (x, scale, bias) to `dtype`; it decides the dtype of the result.
      rngs: makes the keys of the initializers. The default ones need none.
      bias_metadata: metadata of the bias, such as its sharding.
      scale_metadata: metadata of the scale.

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
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = ZEROS,
        scale_init: Initializer = ONES,
        reduction_axes: int | Sequence[int] = -1,
        feature_axes: int | Sequence[int] = -1,
        axis_name: Any = None,
        axis_index_groups: Any = None,
        promote_dtype: PromoteDtype = promote_dtype,
        rngs: nnx.Rngs | None = None,
        bias_metadata: Mapping[str, Any] = NO_METADATA,
        scale_metadata: Mapping[str, Any] = NO_METADATA,
    ):
        shape = feature_shape(num_features)
        self.scale = learned("scale", use_scale, shape, scale_init, param_dtype, scale_metadata, rngs)
        self.bias = learned("bias", use_bias, shape, bias_init, param_dtype, bias_metadata, rngs)
        self.epsilon, self.dtype, self.promote_dtype = epsilon, dtype, promote_dtype
        self.reduction_axes, self.feature_axes = static(reduction_axes), static(feature_axes)
        self.axis_name, self.axis_index_groups = axis_name, static(axis_index_groups)

    def __call__(self, x: jax.Array, *, mask=None) -> jax.Array:
        """Normalises `x` within each sample; only entries where `mask` is true count."""
        arrays = x, value(self.scale), value(self.bias)
        return layer_norm(
            *arrays, axis=self.reduction_axes, feature_axes=self.feature_axes, where=mask, **_common(self, *arrays)
        )


class RMSNorm(nnx.Module):
    """RMS normalization: division by the root mean square. Arguments and the parameter are named as in Flax.

    Args:
      num_features: size of the feature axis, or sizes of the axes.
      epsilon: ε under the root.
      dtype: dtype of the result; by default that of the input and the parameters together.
      param_dtype: dtype of the parameters.
      use_scale: whether to multiply by a learned scale.
      scale_init: initializer of the scale.
      reduction_axes: axis or axes to take the mean square over.
      feature_axes: axis or axes along which the scale varies.
      axis_name: name(s) of mapped axes that split a sample over devices.
      axis_index_groups: groups of indices of the mapped axis, each with samples of its own.
      promote_dtype: function that promotes (x, scale) to `dtype`; it decides the dtype of the result.
      rngs: makes the keys of the initializers. The default ones need none.
      scale_metadata: metadata of the scale, such as its sharding.

    >>> from flax import nnx
    >>> import jax.numpy as jnp
    >>> print(RMSNorm(2, epsilon=0.0)(jnp.array([1.0, 7.0])))
    [0.2 1.4]
    """

    def __init__(
        self,
        num_features: int | Sequence[int],
        *,
        epsilon: float = 1e-6,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        use_scale: bool = True,
        scale_init: Initializer = ONES,
        reduction_axes: int | Sequence[int] = -1,
        feature_axes: int | Sequence[int] = -1,
        axis_name: Any = None,
        axis_index_groups: Any = None,
        promote_dtype: PromoteDtype = promote_dtype,
        rngs: nnx.Rngs | None = None,
        scale_metadata: Mapping[str, Any] = NO_METADATA,
    ):
        shape = feature_shape(num_features)
        self.scale = learned("scale", use_scale, shape, scale_init, param_dtype, scale_metadata, rngs)
        self.epsilon, self.dtype, self.promote_dtype = epsilon, dtype, promote_dtype
        self.reduction_axes, self.feature_axes = static(reduction_axes), static(feature_axes)
        self.axis_name, self.axis_index_groups = axis_name, static(axis_index_groups)

    def __call__(self, x: jax.Array, *, mask=None) -> jax.Array:
        """Normalises `x` within each sample; only entries where `mask` is true count."""
        arrays = x, value(self.scale)
        return rms_norm(
            *arrays, axis=self.reduction_axes, feature_axes=self.feature_axes, where=mask, **_common(self, *arrays)
        )


class GroupNorm(nnx.Module):
    """Group normalization. Arguments and parameters are named as in Flax.

    Args:
      num_features: size of the last axis.
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
      promote_dtype: function that promotes (x, scale, bias) to `dtype`; it decides the dtype of the result.
      rngs: makes the keys of the initializers. The default ones need none.
      bias_metadata: metadata of the bias, such as its sharding.
      scale_metadata: metadata of the scale.

    >>> from flax import nnx
    >>> import jax.numpy as jnp
    >>> print(GroupNorm(4, num_groups=2, epsilon=0.0)(jnp.array([[1.0, 3.0, 10.0, 30.0]])))
    [[-1.  1. -1.  1.]]
    """

    def __init__(
        self,
        num_features: int,
        num_groups: int | None = 32,
        group_size: int | None = None,
        *,
        epsilon: float = 1e-6,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = ZEROS,
        scale_init: Initializer = ONES,
        reduction_axes: int | Sequence[int] | None = None,
        axis_name: Any = None,
        axis_index_groups: Any = None,
        promote_dtype: PromoteDtype = promote_dtype,
        rngs: nnx.Rngs | None = None,
        bias_metadata: Mapping[str, Any] = NO_METADATA,
        scale_metadata: Mapping[str, Any] = NO_METADATA,
    ):
        shape = feature_shape(num_features)
        self.scale = learned("scale", use_scale, shape, scale_init, param_dtype, scale_metadata, rngs)
        self.bias = learned("bias", use_bias, shape, bias_init, param_dtype, bias_metadata, rngs)
        self.epsilon, self.dtype, self.promote_dtype = epsilon, dtype, promote_dtype
        self.n_groups = count_groups(num_features, num_groups, group_size)
        self.reduction_axes = static(reduction_axes)
        self.axis_name, self.axis_index_groups = axis_name, static(axis_index_groups)

    def __call__(self, x: jax.Array, *, mask=None) -> jax.Array:
        """Normalises `x`, shape (batch, ..., features), per sample and group; only true entries of `mask` count."""
        arrays = x, value(self.scale), value(self.bias)
        return group_norm(
            *arrays, n_groups=self.n_groups, axis=self.reduction_axes, where=mask, **_common(self, *arrays)
        )


class InstanceNorm(nnx.Module):
    """Instance normalization. Arguments and parameters are named as in Flax.

    Args:
      num_features: size of the feature axis, or sizes of the axes.
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
      promote_dtype: function that promotes (x, scale, bias) to `dtype`; it decides the dtype of the result.
      rngs: makes the keys of the initializers. The default ones need none.
      bias_metadata: metadata of the bias, such as its sharding.
      scale_metadata: metadata of the scale.

    >>> from flax import nnx
    >>> import jax.numpy as jnp
    >>> print(InstanceNorm(1, epsilon=0.0)(jnp.array([[[1.0], [3.0]]])).ravel())
    [-1.  1.]
    """

    def __init__(
        self,
        num_features: int | Sequence[int],
        *,
        epsilon: float = 1e-6,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = ZEROS,
        scale_init: Initializer = ONES,
        feature_axes: int | Sequence[int] = -1,
        axis_name: Any = None,
        axis_index_groups: Any = None,
        promote_dtype: PromoteDtype = promote_dtype,
        rngs: nnx.Rngs | None = None,
        bias_metadata: Mapping[str, Any] = NO_METADATA,
        scale_metadata: Mapping[str, Any] = NO_METADATA,
    ):
        shape = feature_shape(num_features)
        self.scale = learned("scale", use_scale, shape, scale_init, param_dtype, scale_metadata, rngs)
        self.bias = learned("bias", use_bias, shape, bias_init, param_dtype, bias_metadata, rngs)
        self.epsilon, self.dtype, self.promote_dtype = epsilon, dtype, promote_dtype
        self.feature_axes = static(feature_axes)
        self.axis_name, self.axis_index_groups = axis_name, static(axis_index_groups)

    def __call__(self, x: jax.Array, *, mask=None) -> jax.Array:
        """Normalises each feature of each sample of `x`, shape (batch, *positions, features), over its positions."""
        arrays = x, value(self.scale), value(self.bias)
        return instance_norm(*arrays, feature_axes=self.feature_axes, where=mask, **_common(self, *arrays))


def _common(module: Any, *arrays) -> dict[str, Any]:
    """The options that all norms share."""
    return {
        "axis_name": module.axis_name,
        "axis_index_groups": module.axis_index_groups,
        "eps": module.epsilon,
        "dtype": result_dtype(module, *arrays),
    }
