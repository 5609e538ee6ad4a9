"""Which layers the batch norms of a Linen model can be folded into."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from jaxweights.models.linen.model import check_model
from jaxweights.models.norm_folds import norm_folds as norm_folds_of_function
from jaxweights.programs.norms.folds import Fold


def norm_folds(model: nn.Module, variables: Mapping[str, Any], *args: Any, **kwargs: Any) -> dict[str, Fold]:
    """Reads off a Linen model which layer each batch norm can be folded into: `jaxweights.norm_folds` of the model.

    Args:
      model: a Linen module, with `nn.scan`, `nn.remat` and shared layers inside as it pleases.
      variables: all its collections, "params" and "batch_stats" among them, of arrays or `jax.ShapeDtypeStruct`:
        `jax.eval_shape(model.init, key, x)` will do.
      *args: the data: arguments of the call, arrays or `jax.ShapeDtypeStruct`.
      **kwargs: keyword arguments of the call, such as `train=False`, and `rngs` and `method` of `apply`.

    Returns:
      {path of the batch norm: `Fold`}.

    Raises:
      TypeError: `model` is not a Linen module, or `variables` have no "params" or no "batch_stats".

    >>> import flax.linen as nn, jax, jax.numpy as jnp
    >>> model, x = nn.Sequential([nn.Dense(4), nn.BatchNorm(use_running_average=True), nn.relu]), jnp.ones((5, 3))
    >>> folds = norm_folds(model, jax.eval_shape(model.init, jax.random.key(0), x), x)
    >>> print({norm: fold.layer for norm, fold in folds.items()})
    {'layers_1': 'layers_0'}
    """
    check_model("norm_folds", model, variables, "batch_stats")
    rest = {name: collection for name, collection in variables.items() if name not in ("params", "batch_stats")}

    def apply(params: Any, stats: Any, rest: Any, *args: Any, **kwargs: Any) -> Any:
        return model.apply({**rest, "params": params, "batch_stats": stats}, *args, **kwargs)

    return norm_folds_of_function(apply, variables["params"], variables["batch_stats"], rest, *args, **kwargs)
