"""Layer, RMS, group and instance normalization: activations standardised within each sample."""

from __future__ import annotations

from collections.abc import Sequence

import jax

from jaxweights.core.axes import axis_tuple
from jaxweights.core.checks import check_integer, check_mask, check_scalar, check_weight
from jaxweights.numerics.standardize import normalize


def layer_norm(
    x: jax.Array,
    scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    *,
    axis: int | Sequence[int] = -1,
    where: jax.Array | None = None,
    eps: float = 1e-6,
) -> jax.Array:
    """Standardises each sample over its features.

    y = (x − μ)/√(σ² + ε)·scale + bias with μ and biased σ² over `axis`, in two passes. The backward pass stores `x` in
    its own dtype and two numbers per sample. Forward and reverse mode work, to any order.

    Args:
      x: float array with at least one axis.
      scale: shape of the normalised axes; 1 by default.
      bias: shape of the normalised axes; 0 by default.
      axis: axis or axes to normalise over.
      where: boolean array that broadcasts to `x`; only true entries count in μ and σ². The others are standardised
        too, and may be NaN.
      eps: ε >= 0. No gradient flows to it.

    Returns:
      Array of the shape and dtype of `x`, computed in float32 or wider. A sample that is constant, has no entry that
      counts, or has a variance beyond the range of float32 becomes 0 before `scale` and `bias`. NaN does not spread to
      other samples.

    Raises:
      TypeError: `x`, `scale` or `bias` is not a float array, or `where` is not a boolean array.
      ValueError: `axis` or a shape does not fit, or `eps` is negative or NaN.

    >>> import jax.numpy as jnp
    >>> print(layer_norm(jnp.array([[1.0, 3.0], [5.0, 5.0]]), eps=0.5).round(2))
    [[-0.82  0.82]
     [ 0.    0.  ]]

    References: Ba, Kiros and Hinton, Layer Normalization, arXiv:1607.06450, 2016.
    """
    return _normalize_samples(x, scale, bias, axis, where, eps, centered=True)


def rms_norm(
    x: jax.Array,
    scale: jax.Array | None = None,
    *,
    axis: int | Sequence[int] = -1,
    where: jax.Array | None = None,
    eps: float = 1e-6,
) -> jax.Array:
    """Divides each sample by its root mean square.

    y = x/√(mean(x²) + ε)·scale. Arguments, result and errors as in `layer_norm`.

    >>> import jax.numpy as jnp
    >>> print(rms_norm(jnp.array([1.0, 7.0]), eps=0.0))
    [0.2 1.4]

    References: Zhang and Sennrich, Root Mean Square Layer Normalization, arXiv:1910.07467, 2019.
    """
    return _normalize_samples(x, scale, None, axis, where, eps, centered=False)


def group_norm(
    x: jax.Array,
    scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    *,
    n_groups: int,
    where: jax.Array | None = None,
    eps: float = 1e-6,
) -> jax.Array:
    """Standardises each sample over the positions and features of each group of features.

    The last axis is split into `n_groups` equal groups. μ and σ² are taken over a group and all axes but the batch.

    Args:
      x: float array, shape (batch, ..., features).
      scale: shape (features,); 1 by default.
      bias: shape (features,); 0 by default.
      n_groups: number of groups, a divisor of the features.
      where: boolean array that broadcasts to `x`, as for `layer_norm`.
      eps: ε >= 0. No gradient flows to it.

    Returns:
      Array of the shape and dtype of `x`, as in `layer_norm`, with each group of a sample as a sample.

    Raises:
      TypeError: `x`, `scale` or `bias` is not a float array, `where` is not a boolean array, or `n_groups` is not an
        integer.
      ValueError: `n_groups` does not divide the features, a shape does not fit, or `eps` is negative or NaN.

    >>> import jax.numpy as jnp
    >>> print(group_norm(jnp.array([[1.0, 3.0, 10.0, 30.0]]), n_groups=2, eps=0.0))
    [[-1.  1. -1.  1.]]

    References: Wu and He, Group Normalization, arXiv:1803.08494, 2018.
    """
    x = check_weight(x, "x")
    check_integer("n_groups", n_groups, 1)
    check_scalar("eps", eps, 0)
    if x.ndim < 2:
        raise ValueError(f"x must have shape (batch, ..., features), got {x.shape}: add a batch axis with x[None]")
    if x.shape[-1] % n_groups:
        raise ValueError(f"n_groups={n_groups} does not divide the {x.shape[-1]} features of x {x.shape}")
    features = (x.ndim - 1,)
    scale, bias = (
        _per_feature("scale", scale, x.shape, features),
        _per_feature("bias", bias, x.shape, features),
    )
    groups = (n_groups, x.shape[-1] // n_groups)

    def split(a):
        return None if a is None else a.reshape(groups)

    if where is not None:
        where = check_mask(where, x.shape)
        where = where.reshape(*where.shape[:-1], *(groups if where.shape[-1] > 1 else (1, 1)))
    axis = (*range(1, x.ndim - 1), x.ndim)
    y = normalize(x.reshape(*x.shape[:-1], *groups), split(scale), split(bias), eps, axis=axis, where=where)
    return y.reshape(x.shape)


def instance_norm(
    x: jax.Array,
    scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    *,
    where: jax.Array | None = None,
    eps: float = 1e-6,
) -> jax.Array:
    """Standardises each feature of each sample over its positions: `group_norm` with one feature per group.

    >>> import jax.numpy as jnp
    >>> print(instance_norm(jnp.array([[[1.0], [3.0]]]), eps=0.0).ravel())
    [-1.  1.]

    References: Ulyanov, Vedaldi and Lempitsky, Instance Normalization: The Missing Ingredient for Fast
    Stylization, arXiv:1607.08022, 2016.
    """
    x = check_weight(x, "x")
    if x.ndim < 3:
        raise ValueError(f"x must have shape (batch, *positions, features), got {x.shape}: it has no positions")
    return group_norm(x, scale, bias, n_groups=max(1, x.shape[-1]), where=where, eps=eps)


def check_axis(axis, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Converts `axis` to sorted non-negative axes of an array of this shape, or raises."""
    axes = axis_tuple("axis", axis)
    ndim = len(shape)
    if not ndim:
        raise ValueError("x must have at least one axis, got a scalar: add one with x[None]")
    if not axes or any(not -ndim <= a < ndim for a in axes):
        raise ValueError(f"axis must name axes of x {shape} from {-ndim} to {ndim - 1}, got {axis!r}")
    resolved = tuple(sorted(a % ndim for a in axes))
    if len(set(resolved)) < len(resolved):
        raise ValueError(f"axis must name axes of x {shape} once each, got {axis!r}")
    return resolved


def count_groups(n_features: int, num_groups: int | None, group_size: int | None) -> int:
    """The number of groups, from their number or their size; raises if the size does not divide the features."""
    if (num_groups is None) == (group_size is None):
        raise ValueError(
            f"give num_groups or group_size and None for the other, got {num_groups!r} and {group_size!r}: "
            f"num_groups is 32 by default"
        )
    if group_size is None:
        assert num_groups is not None
        return num_groups
    check_integer("group_size", group_size, 1)
    if n_features % group_size:
        raise ValueError(f"group_size={group_size} does not divide the {n_features} features")
    return n_features // group_size


def _normalize_samples(x, scale, bias, axis, where, eps, centered: bool) -> jax.Array:
    x = check_weight(x, "x")
    over = check_axis(axis, x.shape)
    scale, bias = _per_feature("scale", scale, x.shape, over), _per_feature("bias", bias, x.shape, over)
    where = None if where is None else check_mask(where, x.shape)
    check_scalar("eps", eps, 0)
    return normalize(x, scale, bias, eps, axis=over, where=where, centered=centered)


def _per_feature(name: str, value, shape: tuple[int, ...], over: Sequence[int]) -> jax.Array | None:
    """Reshapes `value` from the shape of the axes `over` to broadcast to `shape`; raises if it does not fit."""
    if value is None:
        return None
    value = check_weight(value, name)
    expected = tuple(shape[a] for a in over)
    if value.shape != expected:
        raise ValueError(f"{name} must have shape {expected}, the normalised axes of x, got {value.shape}")
    return value.reshape([s if a in over else 1 for a, s in enumerate(shape)])
