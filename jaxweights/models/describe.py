"""What names and shapes tell of a tree of weights, without a program."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxweights.core.axes import in_words
from jaxweights.core.biases import Shape
from jaxweights.core.inference import Inferred, infer
from jaxweights.core.stored import is_stored
from jaxweights.levels.paths import Where, flatten, select
from jaxweights.models.layout import Layout, Weight


def describe(params: Any, where: Where | None = None) -> Layout:
    """Says how the weights of a tree are read where no layout is given, what that follows from, and how sure it is.

    This is what every level assumes by itself, from the name and the shape of each weight and from the weights beside
    it. It prints as `layout` does, which reads the axes off the program instead. Where the two differ, `layout` is
    right. A guess is marked as one: another reading fits as well.

    Args:
      params: a tree of weights: arrays, `jax.ShapeDtypeStruct` or stored weights such as a `QuantizedArray`.
      where: the weights to describe, as for `on_tree`; by default every floating-point array.

    Returns:
      A `Layout`, {path: Axes}, for `layout=` too: it then stands for what it says, guesses included. Biases, scales,
      tokens and positions, which are no kernels, are in `skipped`.

    Raises:
      ValueError: `params` has no floating-point array, or `where` selects nothing.

    >>> params = {"dense": {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4)}, "proj": {"kernel": jnp.ones((8, 2, 4))}}
    >>> for weight in describe(params).weights:
    ...     print(weight.path, weight.why)
    dense/bias a vector
    dense/kernel by the bias beside it
    proj/kernel a guess: win in out, batch in out or in out out
    """
    tree = flatten(params)
    weights = {p: leaf for p, leaf in tree.by_path.items() if jnp.issubdtype(_dtype(leaf), jnp.floating)}
    if not weights:
        raise ValueError(f"params has no floating-point array, got {type(params).__name__}: pass the tree of weights")
    paths = list(weights)
    if where is not None:
        chosen = select(paths, [_array(leaf) for leaf in weights.values()], [(None, True)], where)
        paths = [paths[i] for i in sorted(chosen)]
    shapes = {path: tuple(leaf.shape) for path, leaf in weights.items()}
    found = infer(shapes)
    return Layout(tuple(_weight(path, shapes[path], weights[path], found[path]) for path in paths))


def _weight(path: str, shape: Shape, leaf: Any, found: Inferred) -> Weight:
    """One row of the layout."""
    if is_stored(leaf) and (axes := getattr(leaf, "axes", None)) is not None:
        return Weight(path, shape, axes, "stored so")
    return Weight(path, shape, found.axes, _reason(found, shape))


def _reason(found: Inferred, shape: Shape) -> str:
    """What a reading follows from; of a guess, all readings that fit."""
    if not found.others:
        return found.why
    *some, last = dict.fromkeys(in_words(axes, shape) for axes in (found.axes, *found.others))
    return f"a guess: {', '.join(some)} or {last}"


def _dtype(leaf: Any) -> Any:
    return getattr(leaf, "dtype", np.dtype(bool))


def _array(leaf: Any) -> Any:
    """An array for a predicate to look at."""
    if is_stored(leaf):
        return leaf.todense()
    return np.zeros(leaf.shape, leaf.dtype) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf
