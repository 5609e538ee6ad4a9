"""The learned scale and bias that the Linen norms share, named as in Flax."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from jaxweights.core.checks import check_dtype
from jaxweights.core.features import check_initializer


def scale_and_bias(module: Any, shape: tuple[int, ...]) -> tuple[jax.Array | None, jax.Array | None]:
    """Creates the parameters that the attributes of `module` ask for; None for one that it does not use."""
    dtype = check_dtype(module.param_dtype, "param_dtype")

    def create(name: str) -> jax.Array | None:
        if not getattr(module, f"use_{name}", False):
            return None
        initializer = getattr(module, f"{name}_init")
        check_initializer(f"{name}_init", initializer)
        return module.param(name, initializer, shape, dtype)

    return create("scale"), create("bias")


def result_dtype(dtype, *arrays: jax.Array | None):
    """`dtype`, or if it is None, what the dtypes of the arrays promote to, as in Flax."""
    if dtype is not None:
        return dtype
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*(a.dtype for a in arrays if a is not None))
