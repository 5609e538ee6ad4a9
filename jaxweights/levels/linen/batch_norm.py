"""Batch normalization as a Linen module."""

from __future__ import annotations

from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp

from jaxweights.levels.linen.affine import scale_and_bias
from jaxweights.techniques.batch_norm import batch_norm, train_batch_norm
from jaxweights.techniques.batch_norm.statistics import check_features


class BatchNorm(nn.Module):
    """Batch normalization with running statistics. Parameters and statistics are named as in Flax.

    The running statistics are updated by `running_stats`. A batch that is masked out entirely leaves them as they are.

    Attributes:
      use_running_average: whether to normalise with the running statistics (evaluation); here or in the call.
      momentum: weight of the running average; by default that of the convention, 0.99 for "flax" and 0.1 for "torch".
      convention: with "flax", `momentum` is the weight of the old statistics and the variance is biased; with "torch",
        it is the weight of the batch and the variance is unbiased.
      epsilon: ε under the root.
      use_bias: whether to add a learned bias.
      use_scale: whether to multiply by a learned scale.
      axis_name: name(s) of mapped axes over which to merge the statistics, weighted by count.
      ghost_size: in training, the size along the first axis of ghost batches, each standardised on its own.
      renorm: (r_max, d_max) of batch renormalization; here, or in the call if they follow a schedule.
    """

    use_running_average: bool | None = None
    momentum: float | None = None
    convention: Literal["flax", "torch"] = "flax"
    epsilon: float = 1e-5
    use_bias: bool = True
    use_scale: bool = True
    axis_name: Any = None
    ghost_size: int | None = None
    renorm: tuple[float, float] | None = None

    @nn.compact
    def __call__(self, x, use_running_average: bool | None = None, *, mask=None, renorm=None):
        """Normalises `x`, shape (..., features); only entries where `mask` is true count."""
        x = check_features(x)
        evaluate = nn.merge_param("use_running_average", self.use_running_average, use_running_average)
        shape = (x.shape[-1],)
        mean = self.variable("batch_stats", "mean", jnp.zeros, shape)
        var = self.variable("batch_stats", "var", jnp.ones, shape)
        scale, bias = scale_and_bias(self, shape, self.use_scale, self.use_bias)
        if evaluate:
            return batch_norm(x, scale, bias, mean=mean.value, var=var.value, eps=self.epsilon)
        y, running = train_batch_norm(
            x,
            (mean.value, var.value),
            scale,
            bias,
            where=mask,
            axis_name=None if self.is_initializing() else self.axis_name,
            ghost_size=self.ghost_size,
            renorm=self.renorm if renorm is None else renorm,
            momentum=self.momentum,
            convention=self.convention,
            eps=self.epsilon,
        )
        if not self.is_initializing():
            mean.value, var.value = running
        return y
