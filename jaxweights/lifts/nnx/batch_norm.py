"""Batch normalization as an NNX module."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxweights.checks import check_shape
from jaxweights.lifts.nnx.variables import value
from jaxweights.techniques.batch_norm import batch_norm, batch_stats, running_stats


class BatchNorm(nnx.Module):
    """Batch normalization with running statistics. Parameters and statistics are named as Flax's.

    running ← momentum·running + (1 − momentum)·batch, variance biased. A batch in which nothing counts leaves
    the running statistics as they are. `train()` and `eval()` switch between batch and running statistics.

    Args:
      num_features: size of the last axis.
      use_running_average: evaluate with the running statistics; here, by `train`/`eval`, or in the call.
      momentum: what is kept of the running statistics per step.
      epsilon: ε under the root.
      use_bias: whether to add a learned bias.
      use_scale: whether to multiply by a learned scale.
      axis_name: name(s) of mapped axes to take the statistics over, by count.
      rngs: taken for the likeness to Flax's modules; nothing is drawn.

    >>> from flax import nnx
    >>> import jax.numpy as jnp
    >>> print(BatchNorm(1, epsilon=0.0)(jnp.array([[1.0], [3.0]])))
    [[-1.]
     [ 1.]]
    """

    def __init__(
        self,
        num_features: int,
        *,
        use_running_average: bool = False,
        momentum: float = 0.99,
        epsilon: float = 1e-5,
        use_bias: bool = True,
        use_scale: bool = True,
        axis_name: Any = None,
        rngs: nnx.Rngs | None = None,
    ):
        del rngs
        shape = check_shape("num_features", (num_features,))
        self.mean = nnx.BatchStat(jnp.zeros(shape))
        self.var = nnx.BatchStat(jnp.ones(shape))
        self.scale = nnx.Param(jnp.ones(shape)) if use_scale else nnx.data(None)
        self.bias = nnx.Param(jnp.zeros(shape)) if use_bias else nnx.data(None)
        self.use_running_average = use_running_average
        self.momentum, self.epsilon, self.axis_name = momentum, epsilon, axis_name

    def __call__(self, x: jax.Array, use_running_average: bool | None = None, *, mask=None) -> jax.Array:
        """Normalises `x`, shape (..., features); only entries where `mask` is true count."""
        evaluate = self.use_running_average if use_running_average is None else use_running_average
        mean, var = self.mean[...], self.var[...]
        if not evaluate:
            mean, var, count = batch_stats(x, where=mask, axis_name=self.axis_name)
            new = running_stats((self.mean[...], self.var[...]), (mean, var, count), self.momentum)
            self.mean[...], self.var[...] = new
        return batch_norm(x, value(self.scale), value(self.bias), mean=mean, var=var, eps=self.epsilon)

    def set_view(self, use_running_average: bool | None = None, **kwargs) -> dict:
        """Class method used by `nnx.view`.

        Args:
          use_running_average: if True, the stored statistics are used.
          **kwargs: returned for others.
        """
        if use_running_average is not None:
            self.use_running_average = use_running_average
        return kwargs
