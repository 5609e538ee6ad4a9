"""The program of a function of arrays and of other things."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend import core


def is_array(leaf: Any) -> bool:
    """Whether a leaf is an array, or stands for one."""
    return isinstance(leaf, jax.Array | np.ndarray | jax.ShapeDtypeStruct)


def split_arrays(tree: Any) -> tuple[list[Any], Callable[[Sequence[Any]], Any]]:
    """The arrays of a tree, which JAX can trace, and the tree as a function of them.

    All other leaves, such as the activation functions and flags of an Equinox module, stay as they are.

    >>> arrays, rebuild = split_arrays({"w": np.zeros(2), "activation": abs})
    >>> rebuild([a + 1 for a in arrays])
    {'activation': <built-in function abs>, 'w': array([1., 1.])}
    """
    leaves, treedef = jax.tree.flatten(tree)
    places = [i for i, leaf in enumerate(leaves) if is_array(leaf)]

    def rebuild(arrays: Sequence[Any]) -> Any:
        new = dict(zip(places, arrays, strict=True))
        return treedef.unflatten(new.get(i, leaf) for i, leaf in enumerate(leaves))

    return [leaves[i] for i in places], rebuild


def trace(f: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> core.ClosedJaxpr:
    """The program of f(*args, **kwargs), with the arrays among the arguments as inputs, in their order.

    Arrays may be `jax.ShapeDtypeStruct`. Anything else, such as a flag, is passed as it is; what is returned beside
    arrays is left out.
    """
    arrays, rebuild = split_arrays((args, dict(kwargs)))

    def run(*given: Any) -> list[Any]:
        args, kwargs = rebuild(given)
        return [out for out in jax.tree.leaves(f(*args, **kwargs)) if is_array(out)]

    return jax.make_jaxpr(run)(*arrays)
