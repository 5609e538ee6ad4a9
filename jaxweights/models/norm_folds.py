"""Which layers the batch norms of a model can be folded into."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from jaxweights.levels.paths import flatten
from jaxweights.programs.norms.folds import Fold, read_folds
from jaxweights.programs.norms.walk import Layer, Norm
from jaxweights.programs.trace import is_array, trace


def norm_folds(f: Callable[..., Any], params: Any, batch_stats: Any, *args: Any, **kwargs: Any) -> dict[str, Fold]:
    """Reads off a function which layer each of its batch norms can be folded into, for `fold_batch_norms`.

    The function is traced on abstract values and nothing is computed. A batch norm is found by what the program does
    with its running statistics, however it is written. It can be folded

    - into the layer before it, if it is all that the output of that layer meets;
    - otherwise, as where a nonlinearity comes before it, into the layer after it, if that is all that the norm meets.
      The layer must not pad its input with zeros: they are not shifted.

    The layer's kernel must be used as it is, without weight norm or the like, and be the only one.

    Args:
      f: a function (params, batch_stats, *args, **kwargs) -> anything, as in evaluation.
      params: a tree with the "kernel" and "bias" of layers and the "scale" and "bias" of norms, arrays or
        `jax.ShapeDtypeStruct`.
      batch_stats: a tree with the "mean" and "var" of each batch norm, at the paths that they have in `params`.
      *args: the data, of arrays or `jax.ShapeDtypeStruct`. Leaves of other types, such as flags, are passed as they
        are.
      **kwargs: keyword arguments of the call.

    Returns:
      {path of the batch norm: `Fold`}, with ε and the axes of the kernel as the program has them. Where there is no
      layer, `why` tells the reason.

    Raises:
      TypeError: `f` is not callable.

    >>> import jax.numpy as jnp
    >>> params = {"conv": {"kernel": jnp.ones((2, 3))}, "head": {"kernel": jnp.ones((3, 1)), "bias": jnp.ones(1)}}
    >>> stats = {"norm": {"mean": jnp.ones(3), "var": jnp.ones(3)}}
    >>> def f(params, stats, x):
    ...     x = jnp.maximum(x @ params["conv"]["kernel"], 0)
    ...     x = (x - stats["norm"]["mean"]) / jnp.sqrt(stats["norm"]["var"] + 1e-3)
    ...     return x @ params["head"]["kernel"] + params["head"]["bias"]
    >>> fold = norm_folds(f, params, stats, jnp.ones((8, 2)))["norm"]
    >>> fold.layer, fold.follows, fold.eps
    ('head', True, 0.001)
    """
    if not callable(f):
        got = type(f).__name__
        raise TypeError(f"f must be a function (params, batch_stats, *args), got {got}: wrap the model in one")
    weights = _positions(params, 0)
    stats = _positions(batch_stats, sum(map(is_array, jax.tree.leaves(params))))
    layers = {path: Layer(at["kernel"], at.get("bias")) for path, at in weights.items() if "kernel" in at}
    norms = {}
    for path, at in stats.items():
        if {"mean", "var"} <= at.keys():
            affine = weights.get(path, {})
            norms[path] = Norm(at["mean"], at["var"], affine.get("scale"), affine.get("bias"))
    return read_folds(trace(f, (params, batch_stats, *args), kwargs), norms, layers)


def _positions(tree: Any, first: int) -> dict[str, dict[str, int]]:
    """{path of a module: {name: position of the array among those of the program}}."""
    found: dict[str, dict[str, int]] = {}
    for path, leaf in flatten(tree).by_path.items():
        parent, _, name = path.rpartition("/")
        if is_array(leaf):
            found.setdefault(parent, {})[name] = first
        first += sum(map(is_array, jax.tree.leaves(leaf)))
    return found
