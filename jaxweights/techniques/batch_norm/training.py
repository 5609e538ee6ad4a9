"""A training step, shared by the Linen and the NNX module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import jax

from jaxweights.core.checks import check_dtype, check_scalar
from jaxweights.core.devices import device_sum
from jaxweights.core.features import check_features
from jaxweights.numerics.moments import split_moments
from jaxweights.numerics.standardize import normalize
from jaxweights.techniques.batch_norm.renormalization import renormalized_parameters
from jaxweights.techniques.batch_norm.statistics import running_stats, split_batch


def train_batch_norm(
    x: jax.Array,
    running: tuple[jax.Array, ...],
    scale: jax.Array | None,
    bias: jax.Array | None,
    *,
    feature_axes: int | Sequence[int],
    where,
    axis_name,
    axis_index_groups,
    ghost_size: int | None,
    renorm: tuple[float, float] | None,
    momentum: float | Literal["cumulative"] | None,
    convention,
    eps: float,
    dtype,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """(y, new running statistics) of `batch_norm`, or of `batch_renorm` if `renorm` is (r_max, d_max)."""
    x = check_features(x)
    check_scalar("eps", eps, 0)
    if renorm is not None and (not isinstance(renorm, tuple | list) or len(renorm) != 2):
        raise ValueError(f"renorm must be (r_max, d_max) or None, got {renorm!r}: the paper ends at (3.0, 5.0)")
    if renorm is not None and ghost_size is not None:
        raise ValueError("renorm corrects a batch to the running statistics and ghost_size splits it: give one of them")
    batch = split_batch(x, feature_axes, where, axis_name, ghost_size)
    merge = device_sum(axis_name, axis_index_groups)
    known = split_moments(batch.x, batch.axis, where=batch.where, device_sum=merge)
    new = running_stats(running, batch.per_feature(known.stats()), momentum, convention=convention)
    scale, bias = batch.spread("scale", scale), batch.spread("bias", bias)
    if renorm is not None:
        mean, var = batch.spread("mean", running[0]), batch.spread("var", running[1])
        scale, bias = renormalized_parameters(known, mean, var, scale, bias, *renorm, eps)
    y = normalize(
        batch.x,
        scale,
        bias,
        eps,
        axis=batch.axis,
        where=batch.where,
        device_sum=merge,
        known=known,
        dtype=check_dtype(dtype),
    )
    return y.reshape(x.shape), new
