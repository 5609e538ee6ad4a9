"""Batch normalization as a Linen module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp

from jaxweights.core.features import check_axis, check_features
from jaxweights.levels.linen.affine import result_dtype, scale_and_bias
from jaxweights.techniques.batch_norm import batch_norm, train_batch_norm


class BatchNorm(nn.Module):
    """Batch normalization with running statistics. Attributes, parameters and statistics are named as in Flax.

    The running statistics are updated by `running_stats`. A batch that is masked out entirely leaves them as they are.

    Attributes:
      use_running_average: whether to normalise with the running statistics (evaluation); here or in the call.
      axis: axis or axes of the features.
      momentum: weight of the running average; by default that of the convention, 0.99 for "flax" and 0.1 for "torch".
        "cumulative" averages all batches equally, torch's momentum=None; their number is kept as `count`.
      epsilon: ε under the root.
      dtype: dtype of the result; by default that of the input and the parameters together.
      param_dtype: dtype of the parameters.
      use_bias: whether to add a learned bias.
      use_scale: whether to multiply by a learned scale.
      bias_init: initializer of the bias.
      scale_init: initializer of the scale.
      axis_name: name(s) of mapped axes over which to merge the statistics, weighted by count.
      axis_index_groups: groups of indices of the mapped axis to merge within, such as [[0, 1], [2, 3]].
      convention: with "flax", `momentum` is the weight of the old statistics and the variance is biased; with "torch",
        it is the weight of the batch and the variance is unbiased.
      ghost_size: in training, the size along the first axis of ghost batches, each standardised on its own.
      renorm: (r_max, d_max) of batch renormalization; here, or in the call if they follow a schedule.
    """

    use_running_average: bool | None = None
    axis: int | Sequence[int] = -1
    momentum: float | Literal["cumulative"] | None = None
    epsilon: float = 1e-5
    dtype: Any = None
    param_dtype: Any = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: nn.initializers.Initializer = nn.initializers.zeros
    scale_init: nn.initializers.Initializer = nn.initializers.ones
    axis_name: Any = None
    axis_index_groups: Any = None
    convention: Literal["flax", "torch"] = "flax"
    ghost_size: int | None = None
    renorm: tuple[float, float] | None = None

    @nn.compact
    def __call__(self, x, use_running_average: bool | None = None, *, mask=None, renorm=None):
        """Normalises `x`, features along `axis`; only entries where `mask` is true count."""
        x = check_features(x)
        evaluate = nn.merge_param("use_running_average", self.use_running_average, use_running_average)
        features = check_axis(self.axis, x.shape)
        shape = tuple(x.shape[a] for a in features)
        running = [
            self.variable("batch_stats", "mean", jnp.zeros, shape),
            self.variable("batch_stats", "var", jnp.ones, shape),
        ]
        if self.momentum == "cumulative":
            running.append(self.variable("batch_stats", "count", jnp.zeros, shape))
        scale, bias = scale_and_bias(self, shape)
        dtype = result_dtype(self.dtype, x, scale, bias)
        if evaluate:
            mean, var = running[0].value, running[1].value
            return batch_norm(x, scale, bias, mean=mean, var=var, feature_axes=features, eps=self.epsilon, dtype=dtype)
        y, new = train_batch_norm(
            x,
            tuple(r.value for r in running),
            scale,
            bias,
            feature_axes=features,
            where=mask,
            axis_name=None if self.is_initializing() else self.axis_name,
            axis_index_groups=None if self.is_initializing() else self.axis_index_groups,
            ghost_size=self.ghost_size,
            renorm=self.renorm if renorm is None else renorm,
            momentum=self.momentum,
            convention=self.convention,
            eps=self.epsilon,
            dtype=dtype,
        )
        if not self.is_initializing():
            for variable, value in zip(running, new, strict=True):
                variable.value = value
        return y
