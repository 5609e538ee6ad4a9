"""Statistics of the inputs of every layer of an NNX model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from flax import nnx

from jaxweights.core.calibration import InputStats
from jaxweights.levels.paths import Where
from jaxweights.models.capture import capture as capture_function
from jaxweights.models.nnx.model import split


def capture(
    model: nnx.Module,
    batches: Iterable[Any],
    where: Where | None = None,
    *,
    call: Callable[..., Any] | None = None,
    second_moment: bool = True,
    progress: bool = False,
) -> dict[str, InputStats]:
    """What the weights of an NNX model are multiplied by, over batches of data: `jaxweights.capture` of the model.

    Args:
      model: an NNX module, with `nnx.scan`, `nnx.vmap`, `nnx.remat` and shared layers inside as it pleases. It stays as
        it is, also in training mode.
      batches: an iterable of batches: a tuple of the arguments of the call, or the one argument.
      where: the weights to capture, as for `on_tree`.
      call: what to run on a batch, (model, *batch); by default the model's own call.
      second_moment: whether to keep E[xxᵀ], which has the square of the size of `x`.
      progress: whether to show a bar.

    Returns:
      {path: InputStats} in the order of use.

    Raises:
      TypeError: `model` is not an NNX module, or `batches` is not iterable.
      ValueError: as `jaxweights.capture` says.

    >>> from flax import nnx
    >>> import jax.numpy as jnp
    >>> rngs = nnx.Rngs(0)
    >>> model = nnx.Sequential(nnx.Linear(3, 4, rngs=rngs), nnx.relu, nnx.Linear(4, 2, rngs=rngs))
    >>> stats = capture(model, [jnp.ones((5, 3)), jnp.ones((5, 3))])
    >>> print({path: (int(s.count), s.norm.shape) for path, s in stats.items()})
    {'layers/0/kernel': (10, (3,)), 'layers/2/kernel': (10, (4,))}
    """
    run, _, params, rest = split("capture", model, call)

    def apply(params: Any, *batch: Any) -> Any:
        return run(params, rest, *batch)

    return capture_function(apply, params, batches, where, second_moment=second_moment, progress=progress)
