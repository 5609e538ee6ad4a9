"""Statistics of the inputs of every layer of a Linen model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import flax.linen as nn

from jaxweights.core.calibration import InputStats
from jaxweights.levels.paths import Where
from jaxweights.models.capture import capture as capture_function


def capture(
    model: nn.Module,
    variables: Mapping[str, Any],
    batches: Iterable[Any],
    where: Where | None = None,
    *,
    call: Callable[..., Any] | None = None,
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
      second_moment: whether to keep E[xxᵀ], which has the square of the size of `x`.
      progress: whether to show a bar.

    Returns:
      {path: InputStats} in the order of use.

    Raises:
      TypeError: `model` is not a Linen module, `variables` have no "params", or `batches` is not iterable.
      ValueError: as `jaxweights.capture` says.

    >>> import flax.linen as nn, jax, jax.numpy as jnp
    >>> model, x = nn.Sequential([nn.Dense(4), nn.relu, nn.Dense(2)]), jnp.ones((5, 3))
    >>> stats = capture(model, model.init(jax.random.key(0), x), [x, x])
    >>> print({path: (int(s.count), s.norm.shape) for path, s in stats.items()})
    {'layers_0/kernel': (10, (3,)), 'layers_2/kernel': (10, (4,))}
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a linen.Module, got {model!r}: NNX has nnx.capture, others jaxweights.capture")
    if not isinstance(variables, Mapping) or "params" not in variables:
        raise TypeError('variables must be the collections of the module, "params" among them: pass what init returned')
    run = nn.apply(call or _call, model)

    def apply(params: Any, *batch: Any) -> Any:
        return run({**variables, "params": params}, *batch)

    return capture_function(apply, variables["params"], batches, where, second_moment=second_moment, progress=progress)


def _call(module: Any, *batch: Any) -> Any:
    return module(*batch)
