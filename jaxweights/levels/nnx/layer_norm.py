"""Layer normalization and its relatives as NNX modules."""

from __future__ import annotations

from collections.abc import Sequence

import jax
from flax import nnx

from jaxweights.core.checks import check_shape
from jaxweights.levels.nnx.variables import scale_and_bias, value
from jaxweights.techniques.layer_norm import count_groups, group_norm, instance_norm, layer_norm, rms_norm


class LayerNorm(nnx.Module):
    """Layer normalization. Parameters are named as in Flax.

    Args:
      num_features: size of the normalised axis, or sizes of the axes.
      epsilon: ε under the root.
      use_bias: whether to add a learned bias.
      use_scale: whether to multiply by a learned scale.
      reduction_axes: axis or axes to normalise over.
      rngs: accepted for compatibility with Flax's modules; not used.

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
        self.scale, self.bias = scale_and_bias(_shape(num_features), use_scale, use_bias)
        self.epsilon, self.reduction_axes = epsilon, _static(reduction_axes)

    def __call__(self, x: jax.Array, *, mask=None) -> jax.Array:
        """Normalises `x` within each sample; only entries where `mask` is true count."""
        scale, bias = value(self.scale), value(self.bias)
        return layer_norm(x, scale, bias, axis=self.reduction_axes, where=mask, eps=self.epsilon)


class RMSNorm(nnx.Module):
    """RMS normalization: division by the root mean square. The parameter is named as in Flax.

    Args:
      num_features: size of the axis that the mean square is taken over, or sizes of the axes.
      epsilon: ε under the root.
      use_scale: whether to multiply by a learned scale.
      reduction_axes: axis or axes to take the mean square over.
      rngs: accepted for compatibility with Flax's modules; not used.

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
        use_scale: bool = True,
        reduction_axes: int | Sequence[int] = -1,
        rngs: nnx.Rngs | None = None,
    ):
        del rngs
        self.scale, _ = scale_and_bias(_shape(num_features), use_scale, False)
        self.epsilon, self.reduction_axes = epsilon, _static(reduction_axes)

    def __call__(self, x: jax.Array, *, mask=None) -> jax.Array:
        """Normalises `x` within each sample; only entries where `mask` is true count."""
        return rms_norm(x, value(self.scale), axis=self.reduction_axes, where=mask, eps=self.epsilon)


class GroupNorm(nnx.Module):
    """Group normalization. Parameters are named as in Flax.

    Args:
      num_features: size of the last axis.
      num_groups: number of groups of features; None if `group_size` is given.
      group_size: number of features per group, instead of `num_groups`.
      epsilon: ε under the root.
      use_bias: whether to add a learned bias.
      use_scale: whether to multiply by a learned scale.
      rngs: accepted for compatibility with Flax's modules; not used.

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
        use_bias: bool = True,
        use_scale: bool = True,
        rngs: nnx.Rngs | None = None,
    ):
        del rngs
        shape = check_shape("num_features", (num_features,))
        self.n_groups = count_groups(num_features, num_groups, group_size)
        self.scale, self.bias = scale_and_bias(shape, use_scale, use_bias)
        self.epsilon = epsilon

    def __call__(self, x: jax.Array, *, mask=None) -> jax.Array:
        """Normalises `x`, shape (batch, ..., features), per sample and group; only true entries of `mask` count."""
        scale, bias = value(self.scale), value(self.bias)
        return group_norm(x, scale, bias, n_groups=self.n_groups, where=mask, eps=self.epsilon)


class InstanceNorm(nnx.Module):
    """Instance normalization. Parameters are named as in Flax.

    Args:
      num_features: size of the last axis.
      epsilon: ε under the root.
      use_bias: whether to add a learned bias.
      use_scale: whether to multiply by a learned scale.
      rngs: accepted for compatibility with Flax's modules; not used.

    >>> from flax import nnx
    >>> import jax.numpy as jnp
    >>> print(InstanceNorm(1, epsilon=0.0)(jnp.array([[[1.0], [3.0]]])).ravel())
    [-1.  1.]
    """

    def __init__(
        self,
        num_features: int,
        *,
        epsilon: float = 1e-6,
        use_bias: bool = True,
        use_scale: bool = True,
        rngs: nnx.Rngs | None = None,
    ):
        del rngs
        self.scale, self.bias = scale_and_bias(check_shape("num_features", (num_features,)), use_scale, use_bias)
        self.epsilon = epsilon

    def __call__(self, x: jax.Array, *, mask=None) -> jax.Array:
        """Normalises each feature of each sample of `x`, shape (batch, *positions, features), over its positions."""
        return instance_norm(x, value(self.scale), value(self.bias), where=mask, eps=self.epsilon)


def _shape(num_features: int | Sequence[int]) -> tuple[int, ...]:
    return check_shape("num_features", num_features if isinstance(num_features, Sequence) else (num_features,))


def _static(axes: int | Sequence[int]) -> int | tuple[int, ...]:
    return axes if isinstance(axes, int) else tuple(axes)
