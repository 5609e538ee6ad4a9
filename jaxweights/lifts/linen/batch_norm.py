"""Batch normalization as a Linen module."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jaxweights.techniques.batch_norm import batch_norm, batch_stats, check_features, running_stats


class BatchNorm(nn.Module):
    """Batch normalization with running statistics. Parameters and statistics are named as Flax's.

    running ← momentum·running + (1 − momentum)·batch, variance biased. A batch in which nothing counts leaves
    the running statistics as they are.

    Attributes:
      use_running_average: evaluate with the running statistics; here or in the call.
      momentum: what is kept of the running statistics per step.
      epsilon: ε under the root.
      use_bias: whether to add a learned bias.
      use_scale: whether to multiply by a learned scale.
      axis_name: name(s) of mapped axes to take the statistics over, by count.
    """

    use_running_average: bool | None = None
    momentum: float = 0.99
    epsilon: float = 1e-5
    use_bias: bool = True
    use_scale: bool = True
    axis_name: Any = None

    @nn.compact
    def __call__(self, x, use_running_average: bool | None = None, *, mask=None):
        """Normalises `x`, shape (..., features); only entries where `mask` is true count."""
        x = check_features(x)
        evaluate = nn.merge_param("use_running_average", self.use_running_average, use_running_average)
        shape = (x.shape[-1],)
        mean = self.variable("batch_stats", "mean", jnp.zeros, shape)
        var = self.variable("batch_stats", "var", jnp.ones, shape)
        scale = self.param("scale", nn.initializers.ones, shape) if self.use_scale else None
        bias = self.param("bias", nn.initializers.zeros, shape) if self.use_bias else None
        if evaluate:
            return batch_norm(x, scale, bias, mean=mean.value, var=var.value, eps=self.epsilon)
        axis_name = None if self.is_initializing() else self.axis_name
        now = batch_stats(x, where=mask, axis_name=axis_name)
        if not self.is_initializing():
            mean.value, var.value = running_stats((mean.value, var.value), now, self.momentum)
        return batch_norm(x, scale, bias, mean=now[0], var=now[1], eps=self.epsilon)
