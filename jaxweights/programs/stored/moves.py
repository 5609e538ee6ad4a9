"""Casts, transposes, slices and look-ups of a stored weight that need no array of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.lax import GatherScatterMode

from jaxweights.core.axes import Axes, Reading
from jaxweights.core.layer import same_matrices
from jaxweights.core.stored import FollowedStored, coordinates, is_of_jax

Move = Callable[[core.JaxprEqn, Sequence[Any]], Sequence[Any] | None]
"""(equation, its inputs, of which the first is stored) -> its outputs, or None if the weight has to be an array."""


def transpose(w: Any, permutation: Sequence[int]) -> Any | None:
    """A stored weight with its axes in this order."""
    if list(permutation) == list(range(len(w.shape))):
        return w
    if is_of_jax(w):
        return coordinates(w).transpose(tuple(permutation))
    return w.transpose(permutation) if isinstance(w, FollowedStored) else None


def read_as(w: Any, axes: Axes) -> Any | None:
    """A stored weight with these rows and batch axes, if it can be read so."""
    if isinstance(w, FollowedStored):
        return w.read_as(axes)
    return w if same_matrices(axes, getattr(w, "axes", None), w.shape) else None


def as_stack(w: Any) -> Any | None:
    """A stored weight with its first axis as a batch axis, so that its arrays are sliced with it."""
    if not isinstance(w, FollowedStored) or not w.shape:
        return None
    r = Reading.of(w.axes, w.shape)
    if 0 in r.output and r.groups > 1:
        return None
    rest = (tuple(a for a in axes if a != 0) for axes in (r.input, r.output, r.batch, r.window))
    input, output, batch, window = rest
    return w.read_as(Axes(input, output, (0, *batch), window, r.groups))


def batch_axes(w: Any) -> tuple[int, ...]:
    """The batch axes of a stored weight that is sliced along them."""
    return Reading.of(w.axes, w.shape).batch if isinstance(w, FollowedStored) else ()


def _is_stack(w: Any) -> bool:
    return 0 in batch_axes(w)


def _cast(eqn: core.JaxprEqn, ins: Sequence[Any]) -> list[Any] | None:
    (w,), dtype = ins, eqn.params["new_dtype"]
    if not jnp.issubdtype(dtype, jnp.floating):
        return None
    if is_of_jax(w):
        return [jax.tree.map(lambda a: a.astype(dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a, w)]
    return [w.astype(dtype)] if isinstance(w, FollowedStored) else None


def _transpose(eqn: core.JaxprEqn, ins: Sequence[Any]) -> list[Any] | None:
    moved = transpose(ins[0], eqn.params["permutation"])
    return None if moved is None else [moved]


def _slice(eqn: core.JaxprEqn, ins: Sequence[Any]) -> list[Any] | None:
    p, (w,) = eqn.params, ins
    (start, *starts), (stop, *stops) = p["start_indices"], p["limit_indices"]
    whole = not any(starts) and tuple(stops) == w.shape[1:] and set(p["strides"] or [1]) == {1}
    return _span(w, start, stop - start) if whole else None


def _dynamic_slice(eqn: core.JaxprEqn, ins: Sequence[Any]) -> list[Any] | None:
    w, start, *_ = ins
    size, *others = eqn.params["slice_sizes"]
    return _span(w, start, size) if tuple(others) == w.shape[1:] else None


def _span(w: Any, start: Any, size: int) -> list[Any] | None:
    """w[start : start + size], moved to where it fits."""
    if _is_stack(w):
        return [jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, start, size), w)]
    start = jnp.clip(jnp.asarray(start), 0, w.shape[0] - size)
    rows = _rows(w, start + jnp.arange(size, dtype=start.dtype))
    return None if rows is None else [rows]


def _squeeze(eqn: core.JaxprEqn, ins: Sequence[Any]) -> list[Any] | None:
    (w,) = ins
    return [jax.tree.map(lambda a: a[0], w)] if eqn.params["dimensions"] == (0,) and _is_stack(w) else None


def _unstack(eqn: core.JaxprEqn, ins: Sequence[Any]) -> list[Any] | None:
    stack = as_stack(ins[0]) if eqn.params["axis"] == 0 else None
    return None if stack is None else [jax.tree.map(lambda a, i=i: a[i], stack) for i in range(stack.shape[0])]


def _gather(eqn: core.JaxprEqn, ins: Sequence[Any]) -> list[Any] | None:
    """w[index] along the first axis, which is left out of the result, or has size 1 in it, as under `vmap`."""
    (w, index), p = ins, eqn.params
    numbers, n = p["dimension_numbers"], w.shape[0]
    fills = GatherScatterMode.from_any(p["mode"]) == GatherScatterMode.FILL_OR_DROP
    along, squeezed = numbers.start_index_map, numbers.collapsed_slice_dims
    rows = tuple(p["slice_sizes"]) == (1, *w.shape[1:]) and 0 in along and squeezed in ((0,), ())
    if not rows or numbers.operand_batching_dims or n == 0 or (fills and along != (0,)):
        return None
    index = index[..., along.index(0)]
    within = jnp.clip(index, 0, n - 1)
    last = tuple(range(index.ndim, index.ndim + len(w.shape) - 1))
    if _is_stack(w) and not fills and squeezed and numbers.offset_dims == last:
        return [jax.tree.map(lambda a: a[within], w)]
    found = _rows(w, within)
    if found is None:
        return None
    if not squeezed:
        found = jnp.expand_dims(found, index.ndim)
    ends = tuple(range(index.ndim, found.ndim))
    if fills:
        inside = jnp.expand_dims(index == within, ends)
        found = jnp.where(inside, found, jnp.nan if p["fill_value"] is None else p["fill_value"])
    return [jnp.moveaxis(found, ends, numbers.offset_dims)]


def _rows(w: Any, index: jax.Array) -> jax.Array | None:
    """w[index] as an array, for an array of integers in bounds."""
    if _is_stack(w):
        return jax.tree.map(lambda a: a[index], w).todense()
    take = getattr(w, "take", None) if isinstance(w, FollowedStored) else None
    found = take(index) if take else None
    stack = as_stack(w) if found is None else None
    return found if stack is None else _rows(stack, index)


def _placed(eqn: core.JaxprEqn, ins: Sequence[Any]) -> list[Any]:
    """Where an array should lie says nothing about the arrays in its place."""
    return list(ins)


def _barrier(eqn: core.JaxprEqn, ins: Sequence[Any]) -> list[Any]:
    return jax.lax.optimization_barrier(list(ins))


def _stop_gradient(eqn: core.JaxprEqn, ins: Sequence[Any]) -> list[Any]:
    return jax.lax.stop_gradient(list(ins))


MOVES: dict[str, Move] = {
    "convert_element_type": _cast,
    "transpose": _transpose,
    "slice": _slice,
    "dynamic_slice": _dynamic_slice,
    "squeeze": _squeeze,
    "unstack": _unstack,
    "gather": _gather,
    "optimization_barrier": _barrier,
    "stop_gradient": _stop_gradient,
    **dict.fromkeys(("copy", "copy_p", "mesh_cast", "reshard", "sharding_constraint"), _placed),
}
"""{name of a primitive: what becomes of a stored weight}"""
