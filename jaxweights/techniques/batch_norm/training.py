"""A training step, shared by the Linen and the NNX module."""

from __future__ import annotations

import jax

from jaxweights.core.checks import check_scalar
from jaxweights.numerics.moments import moments
from jaxweights.numerics.standardize import normalize
from jaxweights.techniques.batch_norm.normalization import check_parameters
from jaxweights.techniques.batch_norm.renormalization import renormalized_parameters
from jaxweights.techniques.batch_norm.statistics import check_features, per_feature, running_stats, split_batch


def train_batch_norm(
    x: jax.Array,
    running: tuple[jax.Array, jax.Array],
    scale: jax.Array | None,
    bias: jax.Array | None,
    *,
    where,
    axis_name,
    ghost_size: int | None,
    renorm: tuple[float, float] | None,
    momentum: float | None,
    convention,
    eps: float,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """(y, new running statistics) of `batch_norm`, or of `batch_renorm` if `renorm` is (r_max, d_max)."""
    x = check_features(x)
    check_scalar("eps", eps, 0)
    if renorm is not None and (not isinstance(renorm, tuple | list) or len(renorm) != 2):
        raise ValueError(f"renorm must be (r_max, d_max) or None, got {renorm!r}: the paper ends at (3.0, 5.0)")
    if renorm is not None and ghost_size is not None:
        raise ValueError("renorm corrects a batch to the running statistics and ghost_size splits it: give one of them")
    batch, where, axis = split_batch(x, where, axis_name, ghost_size)
    stats = moments(batch, axis, where=where, axis_name=axis_name)
    new = running_stats(running, per_feature(stats, axis), momentum, convention=convention)
    check_parameters(x, scale=scale, bias=bias)
    if renorm is not None:
        scale, bias = renormalized_parameters(stats, *running, scale, bias, *renorm, eps)
    y = normalize(batch, scale, bias, eps, axis=axis, where=where, axis_name=axis_name, stats=stats)
    return y.reshape(x.shape), new
