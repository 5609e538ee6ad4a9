"""Numerics that more than one technique stands on: safe norms, straight-through, exact updates."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp


def wide(dtype) -> jnp.dtype:
    """The dtype to accumulate in: `dtype`, or float32 where that is wider."""
    return jnp.dtype(jnp.float32) if jnp.finfo(dtype).bits < 32 else jnp.dtype(dtype)


def safe_norm(x: jax.Array, axis: Sequence[int], *, keepdims: bool = False) -> jax.Array:
    """Euclidean norm that neither overflows nor underflows, in float32 or wider.

    ‖x‖ = m·√Σ(x/m)², m = max|x|. At x = 0 (and below the smallest normal number) the value is 0 and so is
    the gradient. NaN gives NaN; an infinite entry gives NaN.
    """
    x = x.astype(wide(x.dtype))
    axis = tuple(axis)
    if math.prod(x.shape[a] for a in axis) == 0:
        return jnp.sum(x, axis, keepdims=keepdims)
    m = jax.lax.stop_gradient(jnp.max(jnp.abs(x), axis, keepdims=True))
    zero = m < jnp.finfo(x.dtype).tiny
    m = jnp.where(zero, 1, m)
    square = jnp.sum(jnp.square(jnp.where(zero, 0, x) / m), axis, keepdims=True)
    norm = jnp.where(zero, 0, m * jnp.sqrt(jnp.where(zero, 1, square)))
    return norm if keepdims else jnp.squeeze(norm, axis)


@jax.custom_jvp
def safe_divide(x: jax.Array, y: jax.Array) -> jax.Array:
    """x / y, and x where y is 0, with finite gradients for both.

    The derivative is taken as (ẋ − (x/y)·ẏ)/y: JAX's own squares y, which leaves the range of float32 beyond 1e±19.
    """
    return x / jnp.where(y == 0, 1, y)


@safe_divide.defjvp
def _(primals, tangents):
    (x, y), (dx, dy) = primals, tangents
    ratio = safe_divide(x, y)
    return ratio, safe_divide(dx - jnp.where(y == 0, 0, ratio) * dy, y)


@jax.custom_jvp
def straight_through(x: jax.Array, y: jax.Array) -> jax.Array:
    """`y`, with the gradient of `x`: the straight-through estimator.

    Unlike x + stop_gradient(y - x) the value is `y` bit for bit.
    """
    return y


@straight_through.defjvp
def _(primals, tangents):
    return primals[1], tangents[0].astype(primals[1].dtype)


def automatic(f: Callable[..., Any], w: jax.Array, *arguments, like: Any = None) -> Any:
    """f(w, *arguments) with the shardings inside left to the compiler, whatever kind of mesh `w` lies on.

    On a mesh of explicit axes (`jax.make_mesh`'s default) a contraction or a scatter over a sharded axis must be told
    how its result is sharded. This says it once: as `like`, an array or a partition, or a tree of them, as the result
    is, or replicated, which suits small results.
    """
    mesh = jax.typeof(w).sharding.mesh
    if mesh.empty or not mesh.explicit_axes:
        return f(w, *arguments)
    spec = lambda a: a if isinstance(a, jax.sharding.PartitionSpec) else jax.typeof(a).sharding.spec
    out = jax.sharding.PartitionSpec() if like is None else jax.tree.map(spec, like)
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.sharding.auto_axes(f, out_sharding=out)(w, *arguments)


def each_matrix(f: Callable[..., Any], *arrays: jax.Array) -> Any:
    """f(*matrices) for the matrices of arrays of shape (*batch, rows, columns), one after the other, under vmap too.

    For the decompositions: on the CPU a batched one waits, in one of XLA's threads, for work that it gives to the same
    threads. As many of them at once as there are threads wait for ever (jaxlib 0.10.2).
    """
    f = jax.custom_batching.sequential_vmap(f)
    for _ in arrays[0].shape[:-2]:
        f = jax.vmap(f)
    return f(*arrays)


def where_needed(needed: jax.Array, f: Callable[[Any], Any], x: Any) -> Any:
    """f(x) if `needed`, else x: a loop of one turn at most.

    A `cond` that is batched by `vmap` always runs both of its branches. This runs f only if one of the batch needs it.
    """
    sharding = lambda a: jax.typeof(a).sharding
    like = lambda new, old: new if sharding(new) == sharding(old) else jax.sharding.reshard(new, sharding(old))
    turn = lambda state: (jnp.zeros_like(needed), jax.tree.map(like, f(state[1]), state[1]))
    return jax.lax.while_loop(lambda state: state[0], turn, (needed, x))[1]


def round_to(dtype, x: jax.Array) -> jax.Array:
    """`x` in float32 or wider, its values rounded to those of `dtype`.

    XLA may leave out the rounding of `x.astype(dtype)` (`xla_allow_excess_precision`), in one place and not in another.
    """
    x = x.astype(wide(x.dtype))
    narrow, info = jnp.finfo(dtype), jnp.finfo(x.dtype)
    if narrow.bits >= info.bits:
        return x
    rounded = jax.lax.reduce_precision(x, narrow.nexp, narrow.nmant)
    if narrow.nexp == info.nexp:
        return rounded
    # reduce_precision makes 0 of the subnormal values, of which float16 has many. They are evenly spaced.
    spacing = float(narrow.smallest_subnormal)
    return jnp.where(jnp.abs(x) < float(narrow.tiny), jnp.round(x / spacing) * spacing, rounded)


def exact_sum(p: jax.Array, d: jax.Array) -> jax.Array:
    """p + d in float32 or wider, with the value that `optax.apply_updates` stores in p's dtype."""
    return round_to(p.dtype, p.astype(wide(p.dtype)) + round_to(d.dtype, d))


def exact_delta(p: jax.Array, u: jax.Array, target: jax.Array, anchor: float | jax.Array = 0.0) -> jax.Array:
    """d such that p + d, rounded to p's dtype, is `target` or just short of it; `u` where p + u is `target`.

    target − p alone misses `target` in f32 and, if rounded to bf16, overshoots by a whole ulp. Here d is kept in
    float32 or wider. Where p + d lies beyond `target`, seen from `anchor`, d was rounded away from it, so the float
    before d is on the near side and, rounding being monotone, one step is enough. A target of 0 is hit exactly. So
    zeros stay zeros and, with an anchor of 0, |p + d| <= |target| bit for bit.
    """
    u, goal = round_to(u.dtype, u), target.astype(wide(p.dtype))
    d = jnp.where(exact_sum(p, u) == goal, u, goal - p.astype(goal.dtype))
    away, reached = goal - jnp.asarray(anchor, goal.dtype), exact_sum(p, d)
    beyond = jnp.where(away < 0, reached < goal, reached > goal) & (away != 0)
    # The next float towards the anchor: a float's bits count up with its magnitude.
    word = jnp.dtype(f"int{jnp.finfo(d.dtype).bits}")
    bits, sign = jax.lax.bitcast_convert_type(d, word), jax.lax.bitcast_convert_type(away, word)
    step = jnp.where(bits ^ sign < 0, word.type(1), word.type(-1))
    return jax.lax.bitcast_convert_type(bits + jnp.where(beyond, step, word.type(0)), d.dtype)


def sum_within(center: jax.Array, d: jax.Array, dtype) -> jax.Array:
    """s = center + d in `dtype`, rounded towards `center`: |s − center| <= |d|, as computed in the dtype of d.

    A value to be stored: it has no gradient.
    """
    center, d = jax.lax.stop_gradient((center, d))
    s = round_to(dtype, center + d)
    beyond = jnp.abs(s - center) > jnp.abs(d)
    return jnp.where(beyond, jnp.nextafter(s.astype(dtype), center.astype(dtype)), s.astype(dtype))
