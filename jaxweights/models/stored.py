"""Whole models on stored weights: run them as they are, and make arrays of what is stored."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxweights.core.stored import is_stored
from jaxweights.programs.stored.walk import dense, run_stored


def with_stored(f: Callable[..., Any]) -> Callable[..., Any]:
    """Lets a function of arrays take trees in which some weights are stored: quantized, clustered, packed or sparse.

    with_stored(f)(params, *args) = f(densify(params), *args), up to rounding, in less memory. The function is traced on
    arrays of the shapes and dtypes of the weights. Then its products, and its convolutions with a window of one
    position, run as `matmul(x, w)` on what is stored. A weight that is cast, transposed, sliced from a stack (`scan`,
    `vmap`, `experts[i]`) or passed on by a loop, a branch or `jax.checkpoint` stays stored on the way. Of a table that
    is looked up, only the rows in question become floats. Everything else gets `todense()` of that one weight, where
    it is used.

    Works with any library, `jit`, `vmap` and `grad`: for the arguments, the weights that are arrays, and the floats
    that others are stored with, such as a codebook. Call it under `jax.jit`: it traces `f` at every call.

    A `PackedArray` and a `BlockSparseArray` are multiplied as the matrix that they are stored as, or as its transpose.
    So store them with the axes of the model. A stack of layers needs its batch axes: `Axes(batch=0)` for `nn.scan`. A
    sparse array of JAX stands for a kernel (in, out).

    Args:
      f: a function of trees. Python numbers, functions and other leaves that are no arrays reach it as they are.

    Returns:
      A function of the same arguments, any of which may hold stored weights, with the same result.

    Raises:
      TypeError: `f` is not callable.

    >>> import flax.linen as nn, jax, jax.numpy as jnp
    >>> import jaxweights as jw
    >>> model, x = nn.Dense(2), jnp.ones((1, 3))
    >>> params = {"kernel": jw.quantize(jnp.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), 8), "bias": jnp.ones(2)}
    >>> apply = jax.jit(with_stored(lambda params, x: model.apply({"params": params}, x)))
    >>> print(apply(params, x).round(1))
    [[10. 13.]]
    """
    if not callable(f):
        raise TypeError(f"f must be a function, got {type(f).__name__}: write with_stored(model.apply)(params, x)")

    @functools.wraps(f)
    def run(*args: Any, **kwargs: Any) -> Any:
        leaves, treedef = jax.tree.flatten((args, kwargs), is_stored)
        if not any(map(is_stored, leaves)):
            return f(*args, **kwargs)
        ins = {i: leaf for i, leaf in enumerate(leaves) if is_stored(leaf) or isinstance(leaf, jax.Array | np.ndarray)}

        def on_arrays(arrays: dict[int, jax.Array]) -> Any:
            args, kwargs = treedef.unflatten(arrays.get(i, leaf) for i, leaf in enumerate(leaves))
            return f(*args, **kwargs)

        shapes = {i: jax.ShapeDtypeStruct(a.shape, a.dtype) if is_stored(a) else a for i, a in ins.items()}
        program, out = jax.make_jaxpr(on_arrays, return_shape=True)(shapes)
        return jax.tree.unflatten(jax.tree.structure(out), run_stored(program, list(ins.values())))

    return run


def densify(tree: Any) -> Any:
    """Makes arrays of all stored weights of a tree.

    Args:
      tree: any pytree. Leaves that are not stored weights stay as they are.

    Returns:
      The tree with w.todense() in place of each stored weight w.

    >>> import jax.numpy as jnp
    >>> import jaxweights as jw
    >>> params = {"kernel": jw.sparse.pack(jnp.array([[0.0], [2.0], [0.0], [1.0]])), "bias": jnp.ones(1)}
    >>> print(densify(params)["kernel"].ravel())
    [0. 2. 0. 1.]
    """
    return jax.tree.map(dense, tree, is_leaf=is_stored)
