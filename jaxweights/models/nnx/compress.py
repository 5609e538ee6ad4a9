"""One-shot methods on an NNX model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from flax import nnx

from jaxweights.levels.paths import Where
from jaxweights.models.nnx.model import split
from jaxweights.models.one_shot.compress import compress as compress_function
from jaxweights.models.one_shot.one_shot import Methods

M = TypeVar("M", bound=nnx.Module)


def compress(
    model: M,
    batches: Iterable[Any],
    method: Methods | Mapping[str, Methods],
    where: Where | None = None,
    *,
    call: Callable[..., Any] | None = None,
    sequential: bool = False,
    progress: bool = False,
) -> M:
    """Prunes or stores the weights of an NNX model on batches of data: `jaxweights.compress` of the model.

    Args:
      model: an NNX module, with `nnx.scan`, `nnx.vmap`, `nnx.remat` and shared layers inside as it pleases. It stays as
        it is.
      batches: an iterable of batches: a tuple of the arguments of the call, or the one argument.
      method: one of `jaxweights.methods`, several in order, or rules {glob: method}.
      where: the weights to take, as for `on_tree`.
      call: what to run on a batch, (model, *batch); by default the model's own call.
      sequential: whether to calibrate each layer on the outputs of the layers already done.
      progress: whether to show a bar.

    Returns:
      A copy of `model` with the new weights. With stored weights in it, split it and run
      `with_stored(lambda state, x: nnx.merge(graph, state)(x))`.

    Raises:
      TypeError: `model` is not an NNX module, or as `jaxweights.compress` says.
      ValueError: as `jaxweights.compress` says.

    >>> from flax import nnx
    >>> import jax.numpy as jnp
    >>> import jaxweights as jw
    >>> rngs = nnx.Rngs(0)
    >>> model = nnx.Sequential(nnx.Linear(4, 8, rngs=rngs), nnx.relu, nnx.Linear(8, 2, rngs=rngs))
    >>> new = compress(model, [jnp.ones((5, 4))], jw.methods.Wanda((2, 4)))
    >>> print(jnp.count_nonzero(new.layers[0].kernel[...], 0))
    [2 2 2 2 2 2 2 2]
    """
    run, merge, params, rest = split("compress", model, call)

    def apply(params: Any, *batch: Any) -> Any:
        return run(params, rest, *batch)

    options = {"sequential": sequential, "progress": progress}
    return merge(compress_function(apply, params, batches, method, where, **options), rest)
