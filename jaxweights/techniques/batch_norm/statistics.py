"""Statistics of a batch, with counts: taken, merged, and averaged over the steps of training."""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxweights.core.checks import check_integer, check_mask, check_scalar, check_weight
from jaxweights.numerics.moments import Stats, moments


class Convention(NamedTuple):
    """How a library averages statistics over the steps."""

    momentum: float
    keeps: bool
    """Whether `momentum` is the share of the old statistics, or of the new."""
    unbiased: bool
    """Whether the variance is multiplied by n/(n − 1)."""


CONVENTIONS = {"flax": Convention(0.99, True, False), "torch": Convention(0.1, False, True)}


def batch_stats(
    x: jax.Array, *, where: jax.Array | None = None, axis_name=None, ghost_size: int | None = None
) -> Stats:
    """Mean, biased variance and count of each feature.

    μ = Σx/n and σ² = Σ(x − μ)²/n over all but the last axis, in two passes.

    Args:
      x: float array, shape (..., features).
      where: boolean array that broadcasts to `x`; only true entries count.
      axis_name: name(s) of mapped axes (`jax.vmap`, `jax.shard_map`) to merge over, by count.
      ghost_size: splits the first axis into ghost batches of so many entries, each with statistics of its own.

    Returns:
      (mean, var, count), each of shape (features,), or (n_ghosts, features) of ghost batches, float32 or wider.
      Where nothing counts, all are 0.

    Raises:
      TypeError: `x` is not a float array.
      ValueError: `x` is a scalar, `where` does not broadcast to it, or `ghost_size` does not divide the first axis.

    >>> import jax.numpy as jnp
    >>> print(batch_stats(jnp.array([[1.0, 10.0], [3.0, 10.0]])))
    (Array([ 2., 10.], dtype=float32), Array([1., 0.], dtype=float32), Array([2., 2.], dtype=float32))

    References: Ioffe and Szegedy, arXiv:1502.03167, 2015; Chan, Golub and LeVeque, Algorithms for Computing the
    Sample Variance, 1983; Hoffer, Hubara and Soudry, Train longer, generalize better, arXiv:1705.08741, 2017.
    """
    x, where, axis = split_batch(check_features(x), where, axis_name, ghost_size)
    return per_feature(moments(x, axis, where=where, axis_name=axis_name), axis)


def merge_stats(a: Stats, b: Stats) -> Stats:
    """Statistics of two batches together.

    n = n_a + n_b, μ = (n_a·μ_a + n_b·μ_b)/n, σ² = (n_a·σ²_a + n_b·σ²_b)/n + (n_a/n)(n_b/n)(μ_b − μ_a)². Associative and
    commutative up to rounding, so batches may be merged in any order, as by `jax.lax.scan` or
    `jax.lax.associative_scan`. (0, 0, 0) changes nothing.

    Args:
      a: (mean, biased variance, count) as of `batch_stats`, arrays that broadcast to one shape.
      b: the same.

    Returns:
      (mean, var, count). An operand whose count is 0 is left out, even if it is NaN; with both 0, all are 0.

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
    (mean_a, var_a, n_a), (mean_b, var_b, n_b) = (tuple(jnp.where(s[2] > 0, v, 0) for v in s) for s in (a, b))
    n = n_a + n_b
    share_a, share_b = n_a / jnp.maximum(n, 1), n_b / jnp.maximum(n, 1)
    # The product of two small factors, one of them 0 for an empty batch: the square alone might overflow.
    difference = mean_b - mean_a
    spread = (share_a * difference) * (share_b * difference)
    return share_a * mean_a + share_b * mean_b, share_a * var_a + share_b * var_b + spread, n


def running_stats(
    running: tuple[jax.Array, jax.Array],
    batch: Stats,
    momentum: float | jax.Array | None = None,
    *,
    convention: Literal["flax", "torch"] = "flax",
) -> tuple[jax.Array, jax.Array]:
    """Running mean and variance, one step on; as they were where the batch counts nothing.

    Flax: running ← momentum·running + (1 − momentum)·batch, with the biased variance.
    torch: running ← (1 − momentum)·running + momentum·batch, with the unbiased variance σ²·n/(n − 1).

    Args:
      running: (mean, var), each of shape (features,).
      batch: (mean, var, count) from `batch_stats`. Of ghost batches, (n_ghosts, features), one after the other.
      momentum: in [0, 1]; by default the convention's own, 0.99 in Flax and 0.1 in torch.
      convention: "flax" or "torch".

    Returns:
      (mean, var) in the dtypes of `running`. A single entry has no unbiased variance: it moves the mean alone.

    Raises:
      TypeError: `momentum` is not a number.
      ValueError: a shape does not fit, `momentum` is out of [0, 1], or the convention is unknown.

    >>> import jax.numpy as jnp
    >>> now = batch_stats(jnp.array([[2.0], [4.0]]))
    >>> print(running_stats((jnp.zeros(1), jnp.ones(1)), now, 0.5))
    (Array([1.5], dtype=float32), Array([1.], dtype=float32))
    >>> print(running_stats((jnp.zeros(1), jnp.ones(1)), now, 0.5, convention="torch"))
    (Array([1.5], dtype=float32), Array([1.5], dtype=float32))

    References: Hoffer, Hubara and Soudry, arXiv:1705.08741, 2017, algorithm 1, for ghost batches.
    """
    if len(running) != 2 or len(batch) != 3:
        raise ValueError(
            f"running must be (mean, var) and batch (mean, var, count), got {len(running)} and {len(batch)} arrays: "
            f"take batch from batch_stats"
        )
    default, keeps, unbiased = check_convention(convention)
    momentum = default if momentum is None else momentum
    check_scalar("momentum", momentum, 0, 1)
    shape = jnp.shape(running[0])
    ghosts = jnp.shape(batch[0])[:-1]
    one_each = lambda s: s == shape or (len(ghosts) == 1 and s == ghosts + shape)
    for name, value in zip(("running var", "mean", "var", "count"), (running[1], *batch), strict=True):
        if jnp.shape(value) != shape and (name == "running var" or not one_each(jnp.shape(value))):
            raise ValueError(
                f"{name} has shape {jnp.shape(value)}, the running mean {shape}: both must have one entry per feature"
            )
    if jnp.shape(batch[0]) != shape:
        step = lambda now, ghost: (running_stats(now, ghost, momentum, convention=convention), None)
        return jax.lax.scan(step, tuple(running), batch)[0]  # type: ignore[return-value]
    mean, var, count = batch
    kept = momentum if keeps else 1 - momentum
    mix = lambda old, new, counts: jnp.where(counts, kept * old + (1 - kept) * new, old).astype(old.dtype)
    if unbiased:
        var = var * (count / jnp.maximum(count - 1, 1))
    return mix(running[0], mean, count > 0), mix(running[1], var, count > (1 if unbiased else 0))


def check_features(x) -> jax.Array:
    """`x` as a float array with a last axis, or an error."""
    x = check_weight(x, "x")
    if x.ndim < 1:
        raise ValueError("x must have a last axis of features, got a scalar: add one with x[None]")
    return x


def check_convention(convention: str) -> Convention:
    """What the convention of this name is, or an error."""
    if convention not in CONVENTIONS:
        raise ValueError(f"convention must be one of {', '.join(map(repr, CONVENTIONS))}, got {convention!r}")
    return CONVENTIONS[convention]


def check_stats(name: str, stats) -> Stats:
    """`stats` as three float arrays, or an error."""
    if not isinstance(stats, tuple | list) or len(stats) != 3:
        raise ValueError(f"{name} must be (mean, var, count), got {type(stats).__name__}: take it from batch_stats")
    mean, var, count = (
        check_weight(s, f"the {n} of {name}") for n, s in zip(("mean", "var", "count"), stats, strict=True)
    )
    return mean, var, count


def split_batch(
    x: jax.Array, where: jax.Array | None, axis_name, ghost_size: int | None
) -> tuple[jax.Array, jax.Array | None, tuple[int, ...]]:
    """`x` and its mask with the first axis split in (ghosts, ghost_size), if at all, and the axes of the statistics."""
    where = None if where is None else check_mask(where, x.shape)
    if ghost_size is None:
        return x, where, tuple(range(x.ndim - 1))
    check_integer("ghost_size", ghost_size, 1)
    if axis_name is not None:
        raise ValueError("axis_name merges devices and ghost_size parts a batch: give one of them")
    if x.ndim < 2 or x.shape[0] % ghost_size:
        raise ValueError(f"ghost_size={ghost_size} must divide the first axis of x, which has shape {x.shape}")
    split = lambda a: a[None] if a.shape[0] == 1 else a.reshape(-1, ghost_size, *a.shape[1:])
    return split(x), None if where is None else split(where), tuple(range(1, x.ndim))


def per_feature(stats: Stats, axis: tuple[int, ...]) -> Stats:
    """Statistics without the axes they are over."""
    return tuple(jnp.squeeze(s, axis) for s in stats)  # type: ignore[return-value]
