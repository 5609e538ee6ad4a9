"""One-shot methods on a Linen model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.linen as nn

from jaxweights.levels.paths import Where
from jaxweights.models.linen.model import call as own_call
from jaxweights.models.linen.model import check_model
from jaxweights.models.one_shot.compress import compress as compress_function
from jaxweights.models.one_shot.one_shot import Methods


def compress(
    model: nn.Module,
    variables: Mapping[str, Any],
    batches: Iterable[Any],
    method: Methods | Mapping[str, Methods],
    where: Where | None = None,
    *,
    call: Callable[..., Any] | None = None,
    sequential: bool = False,
    progress: bool = False,
) -> dict[str, Any]:
    """Prunes or stores the weights of a Linen model on batches of data: `jaxweights.compress` of the model.

    Args:
      model: a Linen module, with `nn.scan`, `nn.vmap`, `nn.remat` and shared layers inside as it pleases.
      variables: all its collections. They stay as they are.
      batches: an iterable of batches: a tuple of the arguments of the call, or the one argument.
      method: one of `jaxweights.methods`, several in order, or rules {glob: method}.
      where: the weights to take, as for `on_tree`, on paths within "params".
      call: what to run on a batch, (bound module, *batch); by default the module's own call. It may say
        `lambda model, x: model(x, train=False)`.
      sequential: whether to calibrate each layer on the outputs of the layers already done.
      progress: whether to show a bar.

    Returns:
      The variables with new "params". With stored weights in them the model runs by
      `with_stored(model.apply)(variables, x)`.

    Raises:
      TypeError: `model` is not a Linen module, `variables` have no "params", or as `jaxweights.compress` says.
      ValueError: as `jaxweights.compress` says.

    >>> import flax.linen as nn, jax, jax.numpy as jnp
    >>> import jaxweights as jw
    >>> model, x = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(2)]), jnp.ones((5, 4))
    >>> variables = model.init(jax.random.key(0), x)
    >>> new = compress(model, variables, [x], jw.methods.SparseGPT((2, 4)), sequential=True)
    >>> print(jnp.count_nonzero(new["params"]["layers_0"]["kernel"], 0))
    [2 2 2 2 2 2 2 2]
    """
    check_model("compress", model, variables)
    run = nn.apply(call or own_call, model)

    def apply(params: Any, *batch: Any) -> Any:
        return run({**variables, "params": params}, *batch)

    options = {"sequential": sequential, "progress": progress}
    return {**variables, "params": compress_function(apply, variables["params"], batches, method, where, **options)}
