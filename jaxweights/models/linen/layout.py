"""How a Linen model reads its weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn

from jaxweights.models.layout import Layout, layout_with_state
from jaxweights.models.linen.model import check_model


def layout(
    model: nn.Module, variables: Mapping[str, Any], *args: Any, call: Callable[..., Any] | None = None, **kwargs: Any
) -> Layout:
    """Reads off a Linen model how it uses its weights: `jaxweights.layout` of the model.

    Args:
      model: a Linen module, with `nn.scan`, `nn.vmap`, `nn.remat` and shared layers inside as it pleases.
      variables: all its collections, of arrays or `jax.ShapeDtypeStruct`: `jax.eval_shape(model.init, key, x)` will do.
      *args: the data: arguments of the call, arrays or `jax.ShapeDtypeStruct`.
      call: what to run, (bound module, *args, **kwargs); by default the module's own call.
      **kwargs: keyword arguments of the call, and `rngs`, `mutable` and `method` of `apply`. All collections but
        "params" are mutable by default.

    Returns:
      A `Layout`, whose paths are within "params".

    Raises:
      TypeError: `model` is not a Linen module, or `variables` have no "params".

    >>> import flax.linen as nn, jax, jax.numpy as jnp
    >>> model, x = nn.Sequential([nn.Dense(4), nn.relu, nn.Dense(2)]), jnp.ones((5, 3))
    >>> found = layout(model, jax.eval_shape(model.init, jax.random.key(0), x), x)
    >>> list(found), found.skipped
    (['layers_0/kernel', 'layers_2/kernel'], {'layers_0/bias': 'added', 'layers_2/bias': 'added'})
    """
    check_model("layout", model, variables)
    rest = {name: collection for name, collection in variables.items() if name != "params"}
    options = {name: kwargs.pop(name) for name in ("rngs", "mutable", "method") if name in kwargs}
    options.setdefault("mutable", [*rest, "intermediates"])

    def apply(params: Any, rest: Any, *args: Any, **kwargs: Any) -> Any:
        everything = {**rest, "params": params}
        if call is not None:
            options["method"] = call
        return model.apply(everything, *args, **options, **kwargs)

    return layout_with_state(apply, variables["params"], rest, args, kwargs)
