"""Statistics of the inputs of every layer of a Linen model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from jaxweights.core.calibration import InputStats
from jaxweights.levels.paths import STATE, Where
from jaxweights.models.capture import as_arguments, check_batches
from jaxweights.models.capture import capture as capture_function
from jaxweights.models.linen.model import call as own_call
from jaxweights.models.linen.model import check_model


def capture(
    model: nn.Module,
    variables: Mapping[str, Any],
    batches: Iterable[Any],
    where: Where | None = None,
    *,
    call: Callable[..., Any] | None = None,
    rngs: Mapping[str, jax.Array] | None = None,
    second_moment: bool = True,
    progress: bool = False,
) -> dict[str, InputStats]:
    """What the weights of a Linen model are multiplied by, over batches of data: `jaxweights.capture` of the model.

    Args:
      model: a Linen module, with `nn.scan`, `nn.vmap`, `nn.remat` and shared layers inside as it pleases.
      variables: all its collections. They stay as they are.
      batches: an iterable of batches: a tuple of the arguments of the call, or the one argument.
      where: the weights to capture, as for `on_tree`, on paths within "params".
      call: what to run on a batch, (bound module, *batch); by default the module's own call. It may say
        `lambda model, x: model(x, train=False)`.
      rngs: keys by name, where the call draws, as in {"dropout": key}; each is folded with the number of the batch.
      second_moment: whether to keep E[xxᵀ], which has the square of the size of `x`.
      progress: whether to show a bar.

    Returns:
      {path: InputStats} in the order of use.

    Raises:
      TypeError: `model` is not a Linen module, `variables` have no "params", `batches` is not iterable, or `rngs` is no
        dict.
      ValueError: as `jaxweights.capture` says.

    >>> import flax.linen as nn, jax, jax.numpy as jnp
    >>> model, x = nn.Sequential([nn.Dense(4), nn.relu, nn.Dense(2)]), jnp.ones((5, 3))
    >>> stats = capture(model, model.init(jax.random.key(0), x), [x, x])
    >>> print({path: (int(s.count), s.norm.shape) for path, s in stats.items()})
    {'layers_0/kernel': (10, (3,)), 'layers_2/kernel': (10, (4,))}
    """
    check_model("capture", model, variables)
    if rngs is not None and not isinstance(rngs, Mapping):
        raise TypeError(f'rngs must be a dict of keys, got {type(rngs).__name__}: write {{"dropout": key}}')
    # A call in training mode may write statistics, which are then left. The state of a transform stays as it is.
    run = nn.apply(call or own_call, model, mutable=[name for name in variables if name not in ("params", STATE)])

    def apply(params: Any, *batch: Any, rngs: Mapping[str, jax.Array] | None = None) -> Any:
        return run({**variables, "params": params}, *batch, rngs=rngs)

    def draw(params: Any, number: Any, *batch: Any) -> Any:
        return apply(params, *batch, rngs={name: jax.random.fold_in(key, number) for name, key in (rngs or {}).items()})

    options: dict[str, Any] = {"second_moment": second_moment, "progress": progress}
    if rngs is None:
        return capture_function(apply, variables["params"], batches, where, **options)
    check_batches(batches)
    numbered = ((np.int32(i), *as_arguments(batch)) for i, batch in enumerate(batches))
    return capture_function(draw, variables["params"], numbered, where, **options)
