"""What the NNX norms share: a learned scale and bias, each of which may be absent, and their dtype."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from flax import nnx
from flax.nnx.nn import dtypes, initializers

from jaxweights.core.checks import check_dtype, check_shape
from jaxweights.core.features import check_initializer

Initializer = jax.nn.initializers.Initializer
PromoteDtype = Callable[..., tuple[Any, ...]]
"""Promotes a tuple of arrays or None to `dtype`, or to one dtype if it is None."""

promote_dtype = dtypes.promote_dtype
ONES, ZEROS = initializers.ones_init(), initializers.zeros_init()


def learned(
    name: str,
    used: bool,
    shape: tuple[int, ...],
    initializer: Initializer,
    dtype,
    metadata: Mapping[str, Any],
    rngs: nnx.Rngs | None,
):
    """A learned scale or bias, or None, as data, if it is not used.

    The scale is created before the bias, so that the two take their keys as in Flax.
    """
    dtype = check_dtype(dtype, "param_dtype")
    check_initializer(f"{name}_init", initializer)
    if not used:
        return nnx.data(None)
    if rngs is None and initializer not in (ONES, ZEROS):
        raise ValueError(f"{name}_init needs a key, and rngs is None: give rngs=nnx.Rngs(0)")
    key = jax.random.key(0) if rngs is None else rngs.params()
    return nnx.Param(initializer(key, shape, dtype), **metadata)


def result_dtype(module: Any, *arrays: jax.Array | None):
    """The dtype that `module.promote_dtype` gives to the arrays. Only the dtype: no array is rounded."""
    if module.dtype is not None:
        check_dtype(module.dtype)
    with jax.numpy_dtype_promotion("standard"):
        promoted, *_ = module.promote_dtype(arrays, dtype=module.dtype)
    return promoted.dtype


def value(variable: nnx.Variable | None) -> jax.Array | None:
    """The array of a parameter, or None if the module has none."""
    return None if variable is None else variable[...]


def feature_shape(num_features: int | Sequence[int]) -> tuple[int, ...]:
    """The shape of the parameters, from the size of the feature axis or the sizes of the axes."""
    return check_shape("num_features", num_features if isinstance(num_features, tuple | list) else (num_features,))


def static(value: Any) -> Any:
    """Axes, or groups of indices, as a hashable attribute."""
    return tuple(static(v) for v in value) if isinstance(value, list | tuple) else value
