"""Axes of activations, and arrays with one entry per feature."""

from __future__ import annotations

from collections.abc import Sequence

import jax

from jaxweights.core.axes import axis_tuple
from jaxweights.core.checks import check_weight


def check_features(x) -> jax.Array:
    """Converts `x` to a float array, and raises if it has no axis."""
    x = check_weight(x, "x")
    if x.ndim < 1:
        raise ValueError("x must have a last axis of features, got a scalar: add one with x[None]")
    return x


def check_axis(axis, shape: tuple[int, ...], name: str = "axis") -> tuple[int, ...]:
    """Converts `axis` to sorted non-negative axes of an array of this shape, or raises."""
    axes = axis_tuple(name, axis)
    ndim = len(shape)
    if not ndim:
        raise ValueError("x must have at least one axis, got a scalar: add one with x[None]")
    if not axes or any(not -ndim <= a < ndim for a in axes):
        raise ValueError(f"{name} must name axes of x {shape} from {-ndim} to {ndim - 1}, got {axis!r}")
    resolved = tuple(sorted(a % ndim for a in axes))
    if len(set(resolved)) < len(resolved):
        raise ValueError(f"{name} must name axes of x {shape} once each, got {axis!r}")
    return resolved


def other_axes(axes: Sequence[int], ndim: int) -> tuple[int, ...]:
    """The axes of an array of `ndim` axes that are not in `axes`."""
    return tuple(a for a in range(ndim) if a not in axes)


def spread(name: str, value, shape: tuple[int, ...], axes: Sequence[int], of: str) -> jax.Array | None:
    """Reshapes `value`, with one entry per feature, to broadcast to `shape`; raises if it does not fit. None stays.

    `axes` are the axes of the features, and `of` describes them.
    """
    if value is None:
        return None
    value = check_weight(value, name)
    expected = tuple(shape[a] for a in axes)
    if value.shape != expected:
        raise ValueError(f"{name} must have shape {expected}, {of}, got {value.shape}")
    return value.reshape([n if a in axes else 1 for a, n in enumerate(shape)])


def check_initializer(name: str, initializer) -> None:
    """Raises unless `initializer` can be called with (key, shape, dtype)."""
    if not callable(initializer):
        raise TypeError(
            f"{name} must be an initializer, called with (key, shape, dtype), got {initializer!r}: "
            f"for a number use jax.nn.initializers.constant"
        )
