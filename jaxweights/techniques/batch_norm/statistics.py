"""Batch statistics with counts: computed, merged, and averaged over training steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxweights.core.checks import check_integer, check_mask, check_scalar, check_weight
from jaxweights.core.devices import device_sum
from jaxweights.core.features import check_axis, check_features, other_axes, spread
from jaxweights.numerics.moments import Stats, moments


class Convention(NamedTuple):
    """How a library averages statistics over training steps."""

    momentum: float
    weights_old: bool
    """Whether `momentum` is the weight of the old statistics; otherwise of the new ones."""
    unbiased: bool
    """Whether the variance is multiplied by n/(n − 1)."""


CONVENTIONS = {
    "flax": Convention(momentum=0.99, weights_old=True, unbiased=False),
    "torch": Convention(momentum=0.1, weights_old=False, unbiased=True),
}


def batch_stats(
    x: jax.Array,
    *,
    feature_axes: int | Sequence[int] = -1,
    where: jax.Array | None = None,
    axis_name=None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    ghost_size: int | None = None,
) -> Stats:
    """Mean, biased variance and count of each feature.

    μ = Σx/n and σ² = Σ(x − μ)²/n over all axes but the `feature_axes`, by default the last.

    Args:
      x: float array, shape (..., features).
      feature_axes: axis or axes of the features; the shapes below are theirs.
      where: boolean array that broadcasts to `x`; only true entries count.
      axis_name: name(s) of mapped axes (`jax.vmap`, `jax.shard_map`) over which to merge, weighted by count.
      axis_index_groups: groups of indices of the mapped axis to merge within, such as [[0, 1], [2, 3]].
      ghost_size: splits the first axis into ghost batches of this size, each with its own statistics.

    Returns:
      (mean, var, count), each of shape (features,), or (n_ghosts, features) for ghost batches, float32 or wider. All
      are 0 where no entry counts. A variance beyond the range of float32 is infinite.

    Raises:
      TypeError: `x` is not a float array.
      ValueError: `x` is a scalar, `where` does not broadcast to it, an axis or a group does not fit, or `ghost_size`
        does not divide the first axis.

    >>> import jax.numpy as jnp
    >>> print(batch_stats(jnp.array([[1.0, 10.0], [3.0, 10.0]])))
    (Array([ 2., 10.], dtype=float32), Array([1., 0.], dtype=float32), Array([2., 2.], dtype=float32))

    References: Ioffe and Szegedy, arXiv:1502.03167, 2015; Chan, Golub and LeVeque, Algorithms for Computing the
    Sample Variance, 1983; Hoffer, Hubara and Soudry, Train longer, generalize better, arXiv:1705.08741, 2017.
    """
    batch = split_batch(check_features(x), feature_axes, where, axis_name, ghost_size)
    merge = device_sum(axis_name, axis_index_groups)
    return batch.per_feature(moments(batch.x, batch.axis, where=batch.where, device_sum=merge))


def merge_stats(a: Stats, b: Stats) -> Stats:
    """Merges the statistics of two batches.

    n = n_a + n_b, μ = (n_a·μ_a + n_b·μ_b)/n, σ² = (n_a·σ²_a + n_b·σ²_b)/n + (n_a/n)(n_b/n)(μ_b − μ_a)². Associative and
    commutative up to rounding, so batches may be merged in any order, for example by `jax.lax.scan` or
    `jax.lax.associative_scan`. (0, 0, 0) is the neutral element.

    Args:
      a: (mean, biased variance, count) as from `batch_stats`, arrays that broadcast to one shape.
      b: the same.

    Returns:
      (mean, var, count). An operand whose count is 0 is ignored, even if it is NaN; if both are 0, the result is 0.

    Raises:
      TypeError: an entry is not a float array.
      ValueError: `a` or `b` is not (mean, var, count), or shapes do not broadcast.

    >>> import jax.numpy as jnp
    >>> x = jnp.array([[1.0], [3.0], [5.0], [7.0]])
    >>> print(merge_stats(batch_stats(x[:2]), batch_stats(x[2:])))
    (Array([4.], dtype=float32), Array([5.], dtype=float32), Array([4.], dtype=float32))

    References: Chan, Golub and LeVeque, Algorithms for Computing the Sample Variance, 1983.
    """
    a, b = check_stats("a", a), check_stats("b", b)
    try:
        jnp.broadcast_shapes(*(s.shape for s in (*a, *b)))
    except ValueError as e:
        shapes = f"{[s.shape for s in a]} and {[s.shape for s in b]}"
        raise ValueError(f"the shapes of a and b must broadcast, got {shapes}: pass statistics of one layer") from e
    (mean_a, var_a, n_a), (mean_b, var_b, n_b) = _zero_if_empty(a), _zero_if_empty(b)
    n = n_a + n_b
    share_a, share_b = n_a / jnp.maximum(n, 1), n_b / jnp.maximum(n, 1)
    # The product of two small factors, one of which is 0 for an empty batch: the plain square might overflow.
    difference = mean_b - mean_a
    spread = (share_a * difference) * (share_b * difference)
    return share_a * mean_a + share_b * mean_b, share_a * var_a + share_b * var_b + spread, n


def _zero_if_empty(stats: Stats) -> Stats:
    """Statistics with zeros where the count is 0."""
    mean, var, count = stats
    return jnp.where(count > 0, mean, 0), jnp.where(count > 0, var, 0), jnp.where(count > 0, count, 0)


def running_stats(
    running: tuple[jax.Array, ...],
    batch: Stats,
    momentum: float | jax.Array | Literal["cumulative"] | None = None,
    *,
    convention: Literal["flax", "torch"] = "flax",
) -> tuple[jax.Array, ...]:
    """Updates the running mean and variance; unchanged where no entry of the batch counts.

    Flax: running ← momentum·running + (1 − momentum)·batch, with the biased variance.
    torch: running ← (1 − momentum)·running + momentum·batch, with the unbiased variance σ²·n/(n − 1).
    Cumulative: running ← (k·running + batch)/(k + 1) after k batches, the plain average of all; torch's momentum=None.

    Args:
      running: (mean, var), each of the shape of the features; (mean, var, k) for a cumulative average, k = 0 at first.
      batch: (mean, var, count) from `batch_stats`. Ghost batches, (n_ghosts, features), apply one after the other.
      momentum: in [0, 1], or "cumulative"; by default that of the convention, 0.99 in Flax and 0.1 in torch.
      convention: "flax" or "torch".

    Returns:
      `running`, updated, in its dtypes. A single entry has no unbiased variance, so it only updates the mean, and
      nothing of a cumulative average.

    Raises:
      TypeError: `momentum` is not a number.
      ValueError: a shape does not fit, `momentum` is out of [0, 1], or the convention is unknown.

    >>> import jax.numpy as jnp
    >>> now = batch_stats(jnp.array([[2.0], [4.0]]))
    >>> print(running_stats((jnp.zeros(1), jnp.ones(1)), now, 0.5))
    (Array([1.5], dtype=float32), Array([1.], dtype=float32))
    >>> print(running_stats((jnp.zeros(1), jnp.ones(1)), now, 0.5, convention="torch"))
    (Array([1.5], dtype=float32), Array([1.5], dtype=float32))
    >>> print(running_stats((jnp.zeros(1), jnp.ones(1), jnp.zeros(1)), now, "cumulative"))
    (Array([3.], dtype=float32), Array([1.], dtype=float32), Array([1.], dtype=float32))

    References: Hoffer, Hubara and Soudry, arXiv:1705.08741, 2017, algorithm 1, for ghost batches.
    """
    rule = check_convention(convention)
    momentum = rule.momentum if momentum is None else momentum
    cumulative = isinstance(momentum, str)
    if not cumulative:
        check_scalar("momentum", momentum, 0, 1)
    elif momentum != "cumulative":
        raise ValueError(f'momentum must be a number in [0, 1] or "cumulative", got {momentum!r}')
    _check_running(running, batch, cumulative)
    if jnp.shape(batch[0]) != jnp.shape(running[0]):

        def step(running, ghost):
            return running_stats(running, ghost, momentum, convention=convention), None

        updated, _ = jax.lax.scan(step, tuple(running), batch)
        return updated
    mean, var, count = batch
    has_var = count > (1 if rule.unbiased else 0)
    if rule.unbiased:
        var = var * (count / jnp.maximum(count - 1, 1))
    if isinstance(momentum, str):
        k = running[2]
        kept, has_mean, rest = k / (k + 1), has_var, (k + has_var.astype(k.dtype),)
    else:
        kept, has_mean, rest = momentum if rule.weights_old else 1 - momentum, count > 0, ()

    def mix(old, new, counts):
        weight = jnp.asarray(kept, new.dtype)
        return jnp.where(counts, weight * old.astype(new.dtype) + (1 - weight) * new, old).astype(old.dtype)

    return mix(running[0], mean, has_mean), mix(running[1], var, has_var), *rest


def _check_running(running, batch, cumulative: bool) -> None:
    """Raises unless `running` and `batch` have the statistics they need, with one entry per feature."""
    of_running = ("mean", "var", "k") if cumulative else ("mean", "var")
    if len(running) != len(of_running) or len(batch) != 3:
        raise ValueError(
            f"running must be ({', '.join(of_running)}) and batch (mean, var, count), got {len(running)} and "
            f"{len(batch)} arrays: take batch from batch_stats"
        )
    shape = jnp.shape(running[0])
    ghosts = jnp.shape(batch[0])[: max(0, jnp.ndim(batch[0]) - len(shape))]
    of_batch = (shape, ghosts + shape) if len(ghosts) == 1 else (shape,)
    for name, value, allowed in (
        *((f"running {n}", v, (shape,)) for n, v in zip(of_running, running, strict=True)),
        *((n, v, of_batch) for n, v in zip(("mean", "var", "count"), batch, strict=True)),
    ):
        if jnp.shape(value) not in allowed:
            raise ValueError(
                f"{name} has shape {jnp.shape(value)} and the running mean {shape}: both must have one entry per "
                f"feature"
            )


def check_convention(convention: str) -> Convention:
    """The convention of this name; raises if there is none."""
    if convention not in CONVENTIONS:
        raise ValueError(f"convention must be one of {', '.join(map(repr, CONVENTIONS))}, got {convention!r}")
    return CONVENTIONS[convention]


def check_stats(name: str, stats) -> Stats:
    """Converts `stats` to three float arrays, or raises."""
    if not isinstance(stats, tuple | list) or len(stats) != 3:
        raise ValueError(f"{name} must be (mean, var, count), got {type(stats).__name__}: take it from batch_stats")
    mean, var, count = (
        check_weight(s, f"the {n} of {name}") for n, s in zip(("mean", "var", "count"), stats, strict=True)
    )
    return mean, var, count


class Batch(NamedTuple):
    """A batch, or ghost batches along a first axis of their own."""

    x: jax.Array
    where: jax.Array | None
    axis: tuple[int, ...]
    """The axes to reduce."""
    features: tuple[int, ...]

    def per_feature(self, stats: Stats) -> Stats:
        """Removes the reduced axes from statistics."""
        return tuple(jnp.squeeze(s, self.axis) for s in stats)  # type: ignore[return-value]

    def spread(self, name: str, value) -> jax.Array | None:
        """Reshapes an array with one entry per feature to broadcast to `x`; raises if it does not fit. None stays."""
        return spread(name, value, self.x.shape, self.features, "one per feature of x")


def split_batch(x: jax.Array, feature_axes, where: jax.Array | None, axis_name, ghost_size: int | None) -> Batch:
    """Finds the axes to reduce, and splits the first axis of `x` and the mask into (ghosts, ghost_size), if given."""
    where = None if where is None else check_mask(where, x.shape)
    features = check_axis(feature_axes, x.shape, "feature_axes")
    axis = other_axes(features, x.ndim)
    if ghost_size is None:
        return Batch(x, where, axis, features)
    check_integer("ghost_size", ghost_size, 1)
    if axis_name is not None:
        raise ValueError("axis_name merges batches and ghost_size splits one: give one of them")
    if 0 not in axis or x.shape[0] % ghost_size:
        raise ValueError(
            f"ghost_size={ghost_size} must divide the first axis of x, of samples: it has shape {x.shape} and "
            f"feature_axes={feature_axes!r}"
        )

    def split(a):
        return a[None] if a.shape[0] == 1 else a.reshape(-1, ghost_size, *a.shape[1:])

    def after(axes):
        return tuple(a + 1 for a in axes)

    return Batch(split(x), None if where is None else split(where), after(axis), after(features))
