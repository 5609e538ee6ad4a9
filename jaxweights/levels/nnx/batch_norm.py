"""Batch normalization as an NNX module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal

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
from jaxweights.techniques.batch_norm import batch_norm, train_batch_norm

NO_METADATA: Mapping[str, Any] = MappingProxyType({})


class BatchNorm(nnx.Module):
    """Batch normalization with running statistics. Arguments, parameters and statistics are named as in
    Flax.

    The running statistics are updated by `running_stats`. A batch that is masked out entirely leaves them as they are.
    `train()` and `eval()` switch between the statistics of the batch and the running statistics.

    Args:
      num_features: size of the feature axis, or sizes of the axes.
      use_running_average: whether to normalise with the running statistics (evaluation); here, by `train()` and
        `eval()`, or in the call.
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
      promote_dtype: function that promotes (x, mean, var, scale, bias) to `dtype`; it decides the dtype of the result.
      convention: with "flax", `momentum` is the weight of the old statistics and the variance is biased; with "torch",
        it is the weight of the batch and the variance is unbiased.
      ghost_size: in training, the size along the first axis of ghost batches, each standardised on its own.
      renorm: (r_max, d_max) of batch renormalization; here, or in the call if they follow a schedule.
      rngs: makes the keys of the initializers. The default ones need none.
      bias_metadata: metadata of the bias, such as its sharding.
      scale_metadata: metadata of the scale.

    >>> from flax import nnx
    >>> import jax.numpy as jnp
    >>> print(BatchNorm(1, epsilon=0.0)(jnp.array([[1.0], [3.0]])))
    [[-1.]
     [ 1.]]
    """

    def __init__(
        self,
        num_features: int | Sequence[int],
        *,
        use_running_average: bool | None = False,
        axis: int | Sequence[int] = -1,
        momentum: float | Literal["cumulative"] | None = None,
        epsilon: float = 1e-5,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = ZEROS,
        scale_init: Initializer = ONES,
        axis_name: Any = None,
        axis_index_groups: Any = None,
        promote_dtype: PromoteDtype = promote_dtype,
        convention: Literal["flax", "torch"] = "flax",
        ghost_size: int | None = None,
        renorm: tuple[float, float] | None = None,
        rngs: nnx.Rngs | None = None,
        bias_metadata: Mapping[str, Any] = NO_METADATA,
        scale_metadata: Mapping[str, Any] = NO_METADATA,
    ):
        shape = feature_shape(num_features)
        self.mean = nnx.BatchStat(jnp.zeros(shape))
        self.var = nnx.BatchStat(jnp.ones(shape))
        self.count = nnx.BatchStat(jnp.zeros(shape)) if momentum == "cumulative" else nnx.data(None)
        self.scale = learned("scale", use_scale, shape, scale_init, param_dtype, scale_metadata, rngs)
        self.bias = learned("bias", use_bias, shape, bias_init, param_dtype, bias_metadata, rngs)
        self.use_running_average = use_running_average
        self.momentum: float | Literal["cumulative"] | None = momentum
        self.convention = convention
        self.epsilon, self.dtype, self.promote_dtype = epsilon, dtype, promote_dtype
        self.axis = static(axis)
        self.axis_name, self.axis_index_groups = axis_name, static(axis_index_groups)
        self.ghost_size, self.renorm = ghost_size, renorm

    def __call__(self, x: jax.Array, use_running_average: bool | None = None, *, mask=None, renorm=None) -> jax.Array:
        """Normalises `x`, features along `axis`; only entries where `mask` is true count."""
        evaluate = self.use_running_average if use_running_average is None else use_running_average
        if evaluate is None:
            raise ValueError("use_running_average is None: give it here, in the call, or by train() or eval()")
        scale, bias = value(self.scale), value(self.bias)
        mean, var = self.mean[...], self.var[...]
        options: dict[str, Any] = {
            "feature_axes": self.axis,
            "eps": self.epsilon,
            "dtype": result_dtype(self, x, mean, var, scale, bias),
        }
        if evaluate:
            return batch_norm(x, scale, bias, mean=mean, var=var, **options)
        variables = [v for v in (self.mean, self.var, self.count) if v is not None]
        y, new = train_batch_norm(
            x,
            tuple(v[...] for v in variables),
            scale,
            bias,
            where=mask,
            axis_name=self.axis_name,
            axis_index_groups=self.axis_index_groups,
            ghost_size=self.ghost_size,
            renorm=self.renorm if renorm is None else renorm,
            momentum=self.momentum,
            convention=self.convention,
            **options,
        )
        for variable, array in zip(variables, new, strict=True):
            variable[...] = array
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
