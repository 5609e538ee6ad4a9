"""The program of a function of arrays and of other things."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.extend import core


def is_array(leaf: Any) -> bool:
    """Whether a leaf is an array, or stands for one."""
    return isinstance(leaf, jax.Array | np.ndarray | jax.ShapeDtypeStruct)


def trace(f: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> core.ClosedJaxpr:
    """The program of f(*args, **kwargs), with the arrays among the arguments as inputs, in their order.

    Arrays may be `jax.ShapeDtypeStruct`. Anything else, such as a flag, is passed as it is; what is returned beside
    arrays is left out.
    """
    leaves, treedef = jax.tree.flatten((args, dict(kwargs)))
    arrays = [i for i, leaf in enumerate(leaves) if is_array(leaf)]

    def run(*given: Any) -> list[Any]:
        new = list(leaves)
        for i, value in zip(arrays, given, strict=True):
            new[i] = value
        args, kwargs = treedef.unflatten(new)
        return [out for out in jax.tree.leaves(f(*args, **kwargs)) if is_array(out)]

    return jax.make_jaxpr(run)(*(leaves[i] for i in arrays))
