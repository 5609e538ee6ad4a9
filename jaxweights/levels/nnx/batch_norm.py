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
    """Batch normalization with running statistics. Parameters and statistics are named as Flax's.

    The running statistics move as `running_stats` says, and not at all in a batch in which nothing counts.
    `train()` and `eval()` switch between the statistics of the batch and the running ones.

    Args:
      num_features: size of the last axis.
      use_running_average: evaluate with the running statistics; here, by `train`/`eval`, or in the call.
      momentum: the share per step, as the convention reads it; by default its own: 0.99 in Flax, 0.1 in torch.
      convention: "flax" keeps `momentum` of the running statistics, variance biased; "torch" takes `momentum` of the
        batch's, variance unbiased.
      epsilon: ε under the root.
      use_bias: whether to add a learned bias.
      use_scale: whether to multiply by a learned scale.
      axis_name: name(s) of mapped axes to take the statistics over, by count.
      ghost_size: trains on ghost batches of so many entries of the first axis, each standardised on its own.
      renorm: (r_max, d_max) of batch renormalization; here or, so that they may grow, in the call.
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
        """Class method used by `nnx.view`.

        Args:
          use_running_average: if True, the stored statistics are used.
          **kwargs: returned for others.
        """
        if use_running_average is not None:
            self.use_running_average = use_running_average
        return kwargs
