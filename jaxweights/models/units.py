"""Removing units from every weight that has them: scores, masks, and smaller arrays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxweights.levels.paths import flatten
from jaxweights.numerics.norms import safe_norm
from jaxweights.programs.units.groups import UnitGroup, check_group, leaf_of


def unit_norms(params: Any, group: UnitGroup) -> jax.Array:
    """The Euclidean norm of each unit over all kernels that make it: a score for removal.

    Args:
      params: any pytree with the arrays of the group.
      group: one of `unit_groups`.

    Returns:
      Array of shape (size,) in float32 or wider: √Σ‖W_u‖² over the arrays of two or more axes that have the units
      and do not read them. Without one, over those that read them.

    Raises:
      TypeError: `group` is not a `UnitGroup`.
      ValueError: it does not fit the tree.

    >>> import jax.numpy as jnp
    >>> params = {"a": jnp.array([[3.0, 0.0], [4.0, 1.0]]), "b": jnp.ones((2, 5))}
    >>> print(unit_norms(params, UnitGroup(2, (("a", 1), ("b", 0, 1, True)))))
    [5. 1.]

    References: Li, Kadav, Durdanovic, Samet and Graf, Pruning Filters for Efficient ConvNets, arXiv:1608.08710, 2016.
    """
    check_group(group)
    paths, leaves, _ = flatten(params)
    position = {p: i for i, p in enumerate(paths)}
    parts: dict[bool, list[jax.Array]] = {False: [], True: []}
    for slot in group.slots:
        a = leaf_of(slot, position, leaves)
        group.entries(slot, a.shape)
        if a.ndim < 2:
            continue
        axis = slot.axis % a.ndim
        split = a.reshape(*a.shape[:axis], -1, group.size, slot.inner, *a.shape[axis + 1 :])
        parts[slot.reads].append(safe_norm(split, [i for i in range(split.ndim) if i != axis + 1]))
    norms = parts[False] or parts[True]
    if not norms:
        raise ValueError(f"the group of {group.name!r} has no array of two or more axes: score it another way")
    return safe_norm(jnp.stack(norms), (0,))


def mask_units(params: Any, keep: Mapping[UnitGroup, jax.Array]) -> Any:
    """Sets the weights of units to zero, in every array that has them.

    A unit whose incoming weights alone are zero is still there: batch norm and bias give it a constant output. Here the
    weights of the layers that read it are zero too, so the model computes what it computes without the unit, whatever
    lies between; that is what `remove_units` gives.

    Args:
      params: any pytree with the arrays of the groups.
      keep: {group: boolean array (size,), true for the units that stay}.

    Returns:
      A tree like `params`.

    Raises:
      TypeError: a group is not a `UnitGroup`, or its mask not boolean.
      ValueError: a mask has the wrong size, or a group does not fit the tree.

    >>> import jax.numpy as jnp
    >>> params = {"a": jnp.ones((2, 3)), "b": jnp.ones((3, 1))}
    >>> masked = mask_units(params, {UnitGroup(3, (("a", 1), ("b", 0, 1, True))): jnp.array([True, False, True])})
    >>> print(masked["a"], masked["b"].ravel())
    [[1. 0. 1.]
     [1. 0. 1.]] [1. 0. 1.]
    """
    paths, leaves, treedef = flatten(params)
    for cut in _cuts(paths, leaves, keep):
        a = leaves[cut.leaf]
        along = jnp.expand_dims(cut.kept, [j for j in range(a.ndim) if j != cut.axis])
        leaves[cut.leaf] = jnp.where(along, a, jnp.zeros((), a.dtype))
    return jax.tree_util.tree_unflatten(treedef, leaves)


def remove_units(params: Any, keep: Mapping[UnitGroup, jax.Array]) -> Any:
    """Removes units from every array that has them: the parameters of a smaller model.

    Apply the result with the same model of smaller widths, which are those of the arrays. It computes what the model
    computes with `mask_units(params, keep)`.

    Args:
      params: any pytree with the arrays of the groups: parameters, running statistics, or all in one.
      keep: {group: boolean array (size,), true for the units that stay}. At least one must.

    Returns:
      A tree like `params` of smaller arrays.

    Raises:
      TypeError: a group is not a `UnitGroup`, its mask not boolean, or not known (under jit).
      ValueError: a mask has the wrong size or keeps nothing, a group does not fit the tree, or it leaves out a
        vector, such as a bias, beside a kernel whose units it has.

    >>> import jax.numpy as jnp
    >>> params = {"a": jnp.ones((2, 3)), "b": jnp.ones((3, 1))}
    >>> small = remove_units(params, {UnitGroup(3, (("a", 1), ("b", 0, 1, True))): jnp.array([True, False, True])})
    >>> print(small["a"].shape, small["b"].shape)
    (2, 2) (2, 1)

    References: Li et al., arXiv:1608.08710, 2016; Fang, Ma, Song, Bi Mi and Wang, DepGraph: Towards Any Structural
    Pruning, arXiv:2301.12900, 2023.
    """
    paths, leaves, treedef = flatten(params)
    cuts = _cuts(paths, leaves, keep)
    for group, mask in keep.items():
        if isinstance(mask, Tracer):
            raise TypeError("keep must be known, it decides shapes: call remove_units outside of jit, or mask_units")
        if not np.any(mask):
            raise ValueError(f"keep removes all {group.size} units of {group.name!r}: keep at least one")
        _check_siblings(group, paths, leaves)
    for cut in cuts:
        leaves[cut.leaf] = jnp.take(leaves[cut.leaf], np.flatnonzero(cut.kept), cut.axis)
    return jax.tree_util.tree_unflatten(treedef, leaves)


class _Cut(NamedTuple):
    """Which entries along one axis of a leaf stay."""

    leaf: int
    axis: int
    kept: Any


def _cuts(paths: list[str], leaves: list[Any], keep: Any) -> list[_Cut]:
    """What is cut, once for each axis."""
    if not isinstance(keep, Mapping):
        raise TypeError(f"keep must be a dict {{UnitGroup: boolean array}}, got {type(keep).__name__}")
    position = {p: i for i, p in enumerate(paths)}
    cuts: dict[tuple[int, int], Any] = {}
    for group, mask in keep.items():
        check_group(group)
        kind = getattr(mask, "dtype", type(mask).__name__)
        if kind != jnp.bool_:
            raise TypeError(f"keep of {group.name!r} must be a boolean array, got {kind}: compare it with a number")
        if mask.shape != (group.size,):
            raise ValueError(f"keep of {group.name!r} must have shape ({group.size},), one per unit, got {mask.shape}")
        mask = mask if isinstance(mask, Tracer) else np.asarray(mask)
        for slot in group.slots:
            a = leaf_of(slot, position, leaves)
            place = position[slot.path], slot.axis % max(a.ndim, 1)
            cuts[place] = cuts.get(place, True) & mask[group.entries(slot, a.shape)]
    return [_Cut(leaf, axis, kept) for (leaf, axis), kept in cuts.items()]


def _check_siblings(group: UnitGroup, paths: list[str], leaves: list[Any]) -> None:
    """Raises if a vector beside an array that makes the units has as many entries and is left out."""

    def parent(path: str) -> str:
        return path.rpartition("/")[0]

    shapes = {p: jnp.shape(a) for p, a in zip(paths, leaves, strict=True)}
    makers = {parent(s.path): shapes[s.path][s.axis] for s in group.slots if not s.reads}
    named = {s.path for s in group.slots}
    for path, shape in shapes.items():
        if path not in named and len(shape) == 1 and makers.get(parent(path)) == shape[0]:
            raise ValueError(f"the group of {group.name!r} leaves out {path!r}, of as many entries: add its slot")
