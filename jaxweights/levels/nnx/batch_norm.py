"""Batch normalization as an NNX module."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from jaxweights.core.checks import check_shape
from jaxweights.levels.nnx.variables import scale_and_bias, value
from jaxweights.techniques.batch_norm import batch_norm, train_batch_norm


class BatchNorm(nnx.Module):
    """Batch normalization with running statistics. Parameters and statistics are named as in Flax.

    The running statistics are updated by `running_stats`. A batch that is masked out entirely leaves them as they are.
    `train()` and `eval()` switch between the statistics of the batch and the running statistics.

    Args:
      num_features: size of the last axis.
      use_running_average: whether to normalise with the running statistics (evaluation); here, by `train()` and
        `eval()`, or in the call.
      momentum: weight of the running average; by default that of the convention, 0.99 for "flax" and 0.1 for "torch".
      convention: with "flax", `momentum` is the weight of the old statistics and the variance is biased; with "torch",
        it is the weight of the batch and the variance is unbiased.
      epsilon: ε under the root.
      use_bias: whether to add a learned bias.
      use_scale: whether to multiply by a learned scale.
      axis_name: name(s) of mapped axes over which to merge the statistics, weighted by count.
      ghost_size: in training, the size along the first axis of ghost batches, each standardised on its own.
      renorm: (r_max, d_max) of batch renormalization; here, or in the call if they follow a schedule.
      rngs: accepted for compatibility with Flax's modules; not used.

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
        momentum: float | None = None,
        convention: Literal["flax", "torch"] = "flax",
        epsilon: float = 1e-5,
        use_bias: bool = True,
        use_scale: bool = True,
        axis_name: Any = None,
        ghost_size: int | None = None,
        renorm: tuple[float, float] | None = None,
        rngs: nnx.Rngs | None = None,
    ):
        del rngs
        shape = check_shape("num_features", (num_features,))
        self.mean = nnx.BatchStat(jnp.zeros(shape))
        self.var = nnx.BatchStat(jnp.ones(shape))
        self.scale, self.bias = scale_and_bias(shape, use_scale, use_bias)
        self.use_running_average = use_running_average
        self.momentum, self.convention = momentum, convention
        self.epsilon, self.axis_name = epsilon, axis_name
        self.ghost_size, self.renorm = ghost_size, renorm

    def __call__(self, x: jax.Array, use_running_average: bool | None = None, *, mask=None, renorm=None) -> jax.Array:
        """Normalises `x`, shape (..., features); only entries where `mask` is true count."""
        evaluate = self.use_running_average if use_running_average is None else use_running_average
        running, scale, bias = (self.mean[...], self.var[...]), value(self.scale), value(self.bias)
        if evaluate:
            return batch_norm(x, scale, bias, mean=running[0], var=running[1], eps=self.epsilon)
        y, (self.mean[...], self.var[...]) = train_batch_norm(
            x,
            running,
            scale,
            bias,
            where=mask,
            axis_name=self.axis_name,
            ghost_size=self.ghost_size,
            renorm=self.renorm if renorm is None else renorm,
            momentum=self.momentum,
            convention=self.convention,
            eps=self.epsilon,
        )
        return y

    def set_view(self, use_running_average: bool | None = None, **kwargs) -> dict:
        """Sets the mode of the module for `nnx.view`.

        Args:
          use_running_average: if True, the running statistics are used.
          **kwargs: options of other modules, returned as they are.
        """
        if use_running_average is not None:
            self.use_running_average = use_running_average
        return kwargs
