"""Layer, RMS, group and instance normalization: activations standardised within each sample."""

from __future__ import annotations

from collections.abc import Sequence

import jax

from jaxweights.core.checks import check_dtype, check_integer, check_mask, check_scalar, check_weight
from jaxweights.core.devices import device_sum
from jaxweights.core.features import check_axis, other_axes, spread
from jaxweights.numerics.moments import DeviceSum
from jaxweights.numerics.standardize import normalize


def layer_norm(
    x: jax.Array,
    scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    *,
    axis: int | Sequence[int] = -1,
    feature_axes: int | Sequence[int] | None = None,
    where: jax.Array | None = None,
    axis_name=None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    eps: float = 1e-6,
    dtype=None,
) -> jax.Array:
    """Standardises each sample over its features.

    y = (x − μ)/√(σ² + ε)·scale + bias with μ and biased σ² over `axis`. μ is kept as two floats, so a mean far from 0
    costs no digits. The backward pass stores `x` in its own dtype and three numbers per sample. Forward and reverse
    mode work, to any order.

    Args:
      x: float array with at least one axis.
      scale: shape of the feature axes; 1 by default.
      bias: shape of the feature axes; 0 by default.
      axis: axis or axes to normalise over.
      feature_axes: axis or axes along which `scale` and `bias` vary, by default those of `axis`.
      where: boolean array that broadcasts to `x`; only true entries count in μ and σ². The others are standardised
        too, and may be NaN.
      axis_name: name(s) of mapped axes that split a sample over devices.
      axis_index_groups: groups of indices of the mapped axis, each with samples of its own, such as [[0, 1], [2, 3]].
      eps: ε >= 0. No gradient flows to it.
      dtype: float dtype of the result, by default that of `x`.

    Returns:
      Array of the shape of `x`, computed in float32 or wider. A sample that is constant or has no entry that counts
      becomes 0 before `scale` and `bias`. σ² may be beyond the range of float32, but Σ|x| may not: the sample becomes
      NaN. NaN does not spread to other samples.

    Raises:
      TypeError: `x`, `scale` or `bias` is not a float array, `where` is not a boolean array, or `dtype` is not a float
        dtype.
      ValueError: an axis, a shape or a group does not fit, or `eps` is negative or NaN.

    >>> import jax.numpy as jnp
    >>> print(layer_norm(jnp.array([[1.0, 3.0], [5.0, 5.0]]), eps=0.5).round(2))
    [[-0.82  0.82]
     [ 0.    0.  ]]

    References: Ba, Kiros and Hinton, Layer Normalization, arXiv:1607.06450, 2016.
    """
    merge = device_sum(axis_name, axis_index_groups)
    return _normalize_samples(x, scale, bias, axis, feature_axes, where, merge, eps, dtype, centered=True)


def rms_norm(
    x: jax.Array,
    scale: jax.Array | None = None,
    *,
    axis: int | Sequence[int] = -1,
    feature_axes: int | Sequence[int] | None = None,
    where: jax.Array | None = None,
    axis_name=None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    eps: float = 1e-6,
    dtype=None,
) -> jax.Array:
    """Divides each sample by its root mean square.

    y = x/√(mean(x²) + ε)·scale. Arguments, result and errors as in `layer_norm`.

    >>> import jax.numpy as jnp
    >>> print(rms_norm(jnp.array([1.0, 7.0]), eps=0.0))
    [0.2 1.4]

    References: Zhang and Sennrich, Root Mean Square Layer Normalization, arXiv:1910.07467, 2019.
    """
    merge = device_sum(axis_name, axis_index_groups)
    return _normalize_samples(x, scale, None, axis, feature_axes, where, merge, eps, dtype, centered=False)


def group_norm(
    x: jax.Array,
    scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    *,
    n_groups: int,
    axis: int | Sequence[int] | None = None,
    where: jax.Array | None = None,
    axis_name=None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    eps: float = 1e-6,
    dtype=None,
) -> jax.Array:
    """Standardises each sample over the positions and features of each group of features.

    The last axis is split into `n_groups` equal groups. μ and σ² are taken over a group and all axes but the batch.

    Args:
      x: float array, shape (batch, ..., features).
      scale: shape (features,); 1 by default.
      bias: shape (features,); 0 by default.
      n_groups: number of groups, a divisor of the features.
      axis: axes to normalise over, the last among them; by default all but the first.
      where: boolean array that broadcasts to `x`, as for `layer_norm`.
      axis_name: name(s) of mapped axes that split a sample over devices.
      axis_index_groups: groups of indices of the mapped axis, as for `layer_norm`.
      eps: ε >= 0. No gradient flows to it.
      dtype: float dtype of the result, by default that of `x`.

    Returns:
      Array of the shape of `x`, as in `layer_norm`, with each group of a sample as a sample.

    Raises:
      TypeError: `x`, `scale` or `bias` is not a float array, `where` is not a boolean array, `n_groups` is not an
        integer, or `dtype` is not a float dtype.
      ValueError: `n_groups` does not divide the features, an axis, a shape or a group does not fit, or `eps` is
        negative or NaN.

    >>> import jax.numpy as jnp
    >>> print(group_norm(jnp.array([[1.0, 3.0, 10.0, 30.0]]), n_groups=2, eps=0.0))
    [[-1.  1. -1.  1.]]

    References: Wu and He, Group Normalization, arXiv:1803.08494, 2018.
    """
    x = check_weight(x, "x")
    check_integer("n_groups", n_groups, 1)
    check_scalar("eps", eps, 0)
    if x.ndim < 2 and axis is None:
        raise ValueError(f"x must have shape (batch, ..., features), got {x.shape}: add a batch axis with x[None]")
    over = check_axis(range(1, x.ndim) if axis is None else axis, x.shape)
    last = x.ndim - 1
    if last not in over:
        raise ValueError(f"axis must include the last axis of x {x.shape}, which is split into groups, got {axis!r}")
    if x.shape[-1] % n_groups:
        raise ValueError(f"n_groups={n_groups} does not divide the {x.shape[-1]} features of x {x.shape}")
    scale, bias = (spread(n, v, x.shape, (last,), _PER_FEATURE) for n, v in (("scale", scale), ("bias", bias)))

    def split(a):
        """Splits the last axis into groups, unless it is broadcast."""
        if a is None:
            return None
        return a.reshape(*a.shape[:-1], *((n_groups, a.shape[-1] // n_groups) if a.shape[-1] > 1 else (1, 1)))

    batch = x.reshape(*x.shape[:-1], n_groups, x.shape[-1] // n_groups)
    y = normalize(
        batch,
        split(scale),
        split(bias),
        eps,
        axis=(*over[:-1], last + 1),
        where=split(None if where is None else check_mask(where, x.shape)),
        device_sum=device_sum(axis_name, axis_index_groups),
        dtype=x.dtype if dtype is None else check_dtype(dtype),
    )
    return y.reshape(x.shape)


def instance_norm(
    x: jax.Array,
    scale: jax.Array | None = None,
    bias: jax.Array | None = None,
    *,
    feature_axes: int | Sequence[int] = -1,
    where: jax.Array | None = None,
    axis_name=None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    eps: float = 1e-6,
    dtype=None,
) -> jax.Array:
    """Standardises each feature of each sample over its positions: `group_norm` with one feature per group.

    μ and σ² are taken over all axes but the first, of the batch, and the `feature_axes`, which `scale` and `bias` have
    the shape of. Arguments, result and errors as in `layer_norm`.

    >>> import jax.numpy as jnp
    >>> print(instance_norm(jnp.array([[[1.0], [3.0]]]), eps=0.0).ravel())
    [-1.  1.]

    References: Ulyanov, Vedaldi and Lempitsky, Instance Normalization: The Missing Ingredient for Fast
    Stylization, arXiv:1607.08022, 2016.
    """
    x = check_weight(x, "x")
    features = check_axis(feature_axes, x.shape, "feature_axes")
    over = other_axes((0, *features), x.ndim)
    if 0 in features:
        raise ValueError(
            f"feature_axes must not include axis 0 of x {x.shape}, that of the batch, got {feature_axes!r}"
        )
    if not over:
        raise ValueError(f"x must have shape (batch, *positions, features), got {x.shape}: it has no positions")
    merge = device_sum(axis_name, axis_index_groups)
    return _normalize_samples(x, scale, bias, over, features, where, merge, eps, dtype, centered=True)


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


def _normalize_samples(
    x, scale, bias, axis, feature_axes, where, device_sum: DeviceSum | None, eps, dtype, *, centered: bool
) -> jax.Array:
    x = check_weight(x, "x")
    over = check_axis(axis, x.shape)
    features, of = over, "the normalised axes of x"
    if feature_axes is not None:
        features, of = check_axis(feature_axes, x.shape, "feature_axes"), _PER_FEATURE
    scale, bias = (spread(n, v, x.shape, features, of) for n, v in (("scale", scale), ("bias", bias)))
    where = None if where is None else check_mask(where, x.shape)
    check_scalar("eps", eps, 0)
    dtype = x.dtype if dtype is None else check_dtype(dtype)
    return normalize(x, scale, bias, eps, axis=over, where=where, device_sum=device_sum, centered=centered, dtype=dtype)


_PER_FEATURE = "one per feature of x"
