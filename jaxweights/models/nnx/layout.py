"""How an NNX model reads its weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flax import nnx

from jaxweights.models.layout import Layout, layout_with_state
from jaxweights.models.nnx.model import split


def layout(model: nnx.Module, *args: Any, call: Callable[..., Any] | None = None, **kwargs: Any) -> Layout:
    """Reads off an NNX model how it uses its weights: `jaxweights.layout` of the model.

    Args:
      model: an NNX module, with `nnx.scan`, `nnx.vmap`, `nnx.remat` and shared layers inside as it pleases; it may come
        from `nnx.eval_shape`. It stays as it is.
      *args: the data: arguments of the call, arrays or `jax.ShapeDtypeStruct`.
      call: what to run, (model, *args, **kwargs); by default the model's own call.
      **kwargs: keyword arguments of the call.

    Returns:
      A `Layout`, whose paths are those of the `nnx.Param` in the model.

    Raises:
      TypeError: `model` is not an NNX module.

    >>> from flax import nnx
    >>> import jax.numpy as jnp
    >>> model = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    >>> print(layout(model, jnp.ones((5, 3))).skipped)
    {'bias': 'added'}
    """
    run, _, params, rest = split("layout", model, call)
    return layout_with_state(run, params, rest, args, kwargs)
