"""Statistics of the inputs of every layer, streamed over batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxweights.core.calibration import InputStats, input_stats
from jaxweights.levels.paths import Where
from jaxweights.models.progress import shown
from jaxweights.numerics.sharding import auto_sharded
from jaxweights.programs.contractions.contraction import Contraction
from jaxweights.programs.contractions.found import zeros_like
from jaxweights.programs.contractions.visit import check_found, visit_contractions
from jaxweights.programs.trace import split_arrays


def capture(
    f: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    where: Where | None = None,
    *,
    second_moment: bool = True,
    progress: bool = False,
) -> dict[str, InputStats]:
    """Computes statistics of the inputs of every layer while a function runs over batches of data.

    The inputs of a weight are what it is multiplied by, in matrix products and convolutions, whatever library the
    function is written in. One jitted step per batch adds to running sums in float32; nothing else is kept. If a weight
    is used in several places, or in every step of a loop, all its inputs count. A stack of layers has separate
    statistics for each layer, along the batch axes of the weight.

    Args:
      f: a function (params, *batch), as in evaluation.
      params: the tree of weights. An Equinox module is one as it is: leaves that are no arrays, such as activation
        functions, stay as they are.
      batches: an iterable of batches: a tuple of the arguments after `params`, or the one argument.
      where: the weights to capture, as in `on_tree`; by default those of two or more axes that meet data in a product.
      second_moment: whether to keep E[xxᵀ], whose size is the square of that of `x`.
      progress: whether to show a bar.

    Returns:
      {path: InputStats} in the order of use.

    Raises:
      TypeError: `f` is not callable, or `batches` not iterable.
      ValueError: there are no batches; `where` selects nothing, or a weight that is not multiplied by data, because it
        is unused, or reshaped or sliced first; or no weight is multiplied by data.

    >>> import jax.numpy as jnp
    >>> params = {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}
    >>> dense = lambda params, x: x @ params["kernel"] + params["bias"]
    >>> stats = capture(dense, params, [jnp.array([[3.0, 6.0]]), jnp.array([[4.0, 8.0]])])
    >>> print(stats["kernel"].count, stats["kernel"].norm, stats["kernel"].mean_abs)
    2 [ 5. 10.] [3.5 7. ]
    """
    if not callable(f):
        raise TypeError(f"f must be a function (params, *batch), got {type(f).__name__}: wrap the model in one")
    check_batches(batches)

    def visit(product: Contraction) -> tuple[InputStats, jax.Array]:
        def stats(x: jax.Array) -> InputStats:
            return input_stats(product.inputs(x), product.axes, second_moment=second_moment)

        return auto_sharded(stats, product.x), product.y

    arrays, rebuild = split_arrays(params)

    def collect(arrays: list[jax.Array], batch: tuple[Any, ...]) -> Mapping[str, InputStats]:
        _, stats = visit_contractions(f, rebuild(arrays), *batch, visit=visit, where=where)
        return stats

    @jax.jit
    def step(total: dict[str, InputStats], arrays: list[jax.Array], batch: tuple[Any, ...]) -> dict[str, InputStats]:
        return jax.tree.map(jnp.add, total, dict(collect(arrays, batch)))

    shapes: Mapping[str, InputStats] = {}
    total = None
    for batch in shown(batches, "capture", progress):
        batch = as_arguments(batch)
        if total is None:
            shapes = jax.eval_shape(collect, arrays, batch)
            check_found("capture", f, params, batch, where, shapes)
            total = zeros_like(dict(shapes))
        total = step(total, arrays, batch)
    if total is None:
        raise ValueError("batches is empty: give at least one batch")
    return {path: total[path] for path in shapes}  # jit has sorted the keys of `total`


def check_batches(batches: Any) -> None:
    """Raises unless `batches` is an iterable of batches. An array is one batch."""
    if not isinstance(batches, Iterable) or isinstance(batches, jax.Array | np.ndarray | str | dict):
        raise TypeError(f"batches must be an iterable of batches, got {type(batches).__name__}: write [batch]")


def as_arguments(batch: Any) -> tuple[Any, ...]:
    """The arguments of a call: a tuple of them, or the one argument."""
    return batch if isinstance(batch, tuple) else (batch,)
