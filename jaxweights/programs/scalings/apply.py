"""Factors of units, applied to every weight that has them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxweights.core.stored import is_stored
from jaxweights.levels.paths import flatten
from jaxweights.numerics.dtypes import accumulation_dtype
from jaxweights.programs.flat import Flat
from jaxweights.programs.scalings.groups import Coordinates, Group, Slot
from jaxweights.programs.scalings.walk import scalings

Weights = Mapping[int, jax.Array]
"""Weights by their place among the arguments of a program."""


def check_scalable(f: Any, params: Any) -> None:
    """Raises unless `f` is a function and `params` a tree without stored weights."""
    if not callable(f):
        raise TypeError(f"f must be a function (params, *args), got {type(f).__name__}: wrap the model in one")
    tree = flatten(params)
    if stored := [path for path, leaf in zip(tree.paths, tree.leaves, strict=True) if is_stored(leaf)]:
        raise TypeError(f"params has the stored weight {stored[0]!r}: scale arrays, and store them afterwards")


def scalable_groups(program: Flat, wanted: Callable[[Group], bool] | None = None) -> list[Group]:
    """The groups of units that some weights make, others read, and nothing hinders. Raises if there are none."""
    groups = [group for group in scalings(program.program, program.n_params) if wanted is None or wanted(group)]
    if free := [group for group in groups if group.why is None and makers(group) and readers(group)]:
        return free
    reasons = ", ".join(f"{why} ({n})" for why, n in Counter(group.why for group in groups if group.why).most_common())
    raise ValueError(
        f"f has no units that can be scaled: {reasons or 'no weight reads what another one makes'}. Between the "
        f"weights that make units and those that read them there may only be ReLU, pooling, scaling and the like"
    )


def makers(group: Group) -> list[Slot]:
    """The slots of the weights that make the units, and of what is added to them."""
    return [slot for slot in group.slots if not slot.reads]


def readers(group: Group) -> list[Slot]:
    """The slots of the weights that sum over the units."""
    return [slot for slot in group.slots if slot.reads]


def largest(weights: Weights, group: Group, slots: Iterable[Slot]) -> jax.Array:
    """The largest magnitude of each unit among the weights in these slots."""
    tops = [largest_of(weights[slot.place], slot.coordinates, group.shape) for slot in slots]
    return jnp.max(jnp.stack(tops), 0)


def largest_of(a: jax.Array, coordinates: Coordinates, shape: tuple[int, ...]) -> jax.Array:
    """The largest magnitude of each unit, given which one each entry belongs to."""
    along = [max(sizes) for sizes in zip(*(c.shape for c in coordinates), strict=True)]
    others = [axis for axis, n in enumerate(along) if n == 1]
    top = jnp.max(jnp.abs(a.astype(accumulation_dtype(a.dtype))), others, keepdims=True)
    return jnp.zeros(shape, top.dtype).at[coordinates].max(top)


def scaled(weights: Weights, group: Group, factor: jax.Array) -> dict[int, jax.Array]:
    """The weights of a group, divided by the factor of each unit where they make it, multiplied where they read it."""
    new: dict[int, jax.Array] = {}
    for slot in group.slots:
        w = new.get(slot.place, weights[slot.place])
        by = factor[slot.coordinates]
        new[slot.place] = (w * by if slot.reads else w / by).astype(w.dtype)
    return new
