"""Which weight is in the place of which: the paths of a tree that are tied, and the views that are put there."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxweights.core.stored import is_stored
from jaxweights.levels.paths import FlatTree, check_rules
from jaxweights.programs.stored.moves import as_stack, transpose

FORM = "{path: path or Tied}"


@dataclasses.dataclass(frozen=True)
class Tied:
    """The weight at a path, or a view of it, for a place that `jaxweights.tie` or `untie` ties to it.

    view(w) = transpose(w[index]), each step where it is given.

    Args:
      path: path of the weight, or of a subtree. In a subtree, the view is taken of each weight.
      transpose: the axes of the weight in the order that they have in the place. None: of a weight that has the shape
        of the place, as they are; of one whose sizes all differ, as the shape of the place says.
      index: which entry of the first axis to take, such as a layer of a stack. None: all.

    Raises:
      TypeError: `path` is no string, or `index` or an axis is no integer.
      ValueError: `transpose` is no permutation of axes.

    >>> import jax.numpy as jnp
    >>> import jaxweights as jw
    >>> params = {"embed": jnp.array([[1.0, 2.0], [3.0, 4.0]]), "head": jnp.zeros((2, 2))}
    >>> print(jw.tie(params, {"head": Tied("embed", transpose=(1, 0))})["head"])
    [[1. 3.]
     [2. 4.]]
    """

    path: str
    transpose: tuple[int, ...] | None = None
    index: int | None = None

    def __post_init__(self):
        if not isinstance(self.path, str):
            raise TypeError(f"a place is tied to a path, got {self.path!r}: write {FORM}")
        if self.index is not None and not _is_integer(self.index):
            raise TypeError(f"index must be an integer or None, got {self.index!r}: Tied takes one entry of an axis")
        if self.transpose is None:
            return
        if not isinstance(self.transpose, tuple | list) or not all(map(_is_integer, self.transpose)):
            raise TypeError(f"transpose must be a tuple of axes or None, got {self.transpose!r}: write (1, 0)")
        if sorted(self.transpose) != list(range(len(self.transpose))):
            raise ValueError(f"transpose must name each axis once, got {self.transpose!r}: write (1, 0)")
        object.__setattr__(self, "transpose", tuple(self.transpose))

    def view(self, leaf: Any) -> Any:
        """What is put in the place, in memory of its own: a weight as an array, as a shape, or as it is stored."""
        own = jax.tree.leaves(leaf)
        if self.index is None and self.transpose is None:
            seen = leaf
        elif any(isinstance(a, jax.ShapeDtypeStruct) for a in own):
            seen = jax.eval_shape(self._seen, leaf)
        else:
            seen = self._seen(leaf)
        shared = {id(a) for a in own if isinstance(a, jax.Array)}
        return jax.tree.map(lambda a: jnp.copy(a) if id(a) in shared else a, seen)

    def _seen(self, leaf: Any) -> Any:
        stored = is_stored(leaf)
        if self.index is not None:
            stack = as_stack(leaf) if stored else leaf
            if stack is None:
                raise self._cannot(leaf, f"and index={self.index} is no layer of its stack")
            leaf = jax.tree.map(lambda a: a[self.index], stack) if stored else stack[self.index]
        if self.transpose is None:
            return leaf
        moved = transpose(leaf, self.transpose) if stored else leaf.transpose(self.transpose)
        if moved is None:
            raise self._cannot(leaf, f"and transpose={self.transpose} would move its rows")
        return moved

    def _cannot(self, leaf: Any, why: str) -> ValueError:
        return ValueError(
            f"ties: {self.path!r} is stored as a {type(leaf).__name__}, {why}: make arrays of what is stored with "
            f"jaxweights.densify(params)"
        )


def resolve(tree: FlatTree, ties: Mapping[str, str | Tied]) -> dict[str, Tied]:
    """{path of a leaf to replace: the view to put there}, with subtrees taken apart and transposes spelled out."""
    check_rules("ties", ties, FORM)
    leaves = tree.by_path
    found: dict[str, Tied] = {}
    for place, given in ties.items():
        tied = given if isinstance(given, Tied) else Tied(given)
        for path, source in _pairs(leaves, place, tied.path):
            if path in found:
                raise ValueError(f"ties replaces {path!r} twice: name it, or a subtree that has it, once")
            found[path] = _fitted(dataclasses.replace(tied, path=source), leaves[source], path, leaves[path])
    for path, tied in found.items():
        if tied.path in found:
            raise ValueError(
                f"ties puts {tied.path!r} at {path!r}, but {tied.path!r} is itself replaced: name the last one"
            )
    return found


def _pairs(leaves: Mapping[str, Any], place: str, source: str) -> list[tuple[str, str]]:
    """(place, source) of each leaf at or below two paths."""
    below = [_below(leaves, path) for path in (place, source)]
    if below[0] != below[1]:
        which = sorted(set(below[0]).symmetric_difference(below[1]))
        names = ", ".join(repr(name.removeprefix("/")) if name else "a weight" for name in which)
        raise ValueError(
            f"ties puts {source!r} at {place!r}: one of them has {names} and the other has not. Tie weights to "
            f"weights, and subtrees to subtrees of the same names"
        )
    return [(place + name, source + name) for name in below[0]]


def _below(leaves: Mapping[str, Any], path: str) -> list[str]:
    """What the paths of the weights at or below `path` have after it."""
    found = [p.removeprefix(path) for p in leaves if p == path or p.startswith(f"{path}/")]
    if not found:
        raise ValueError(f"ties names {path!r}, which is not in the tree. It has: {', '.join(leaves)}")
    weights = [name for name in found if _is_array(leaves[path + name])]
    if not weights:
        got = type(leaves[path + found[0]]).__name__
        raise TypeError(f"ties names {path!r}, which is no array, got {got}: name a weight")
    return sorted(weights)


def _fitted(tied: Tied, leaf: Any, place: str, old: Any) -> Tied:
    """`tied` with the transpose that its place takes, spelled out. Raises where it does not fit."""
    (dtype, shape), (needed_dtype, needed) = _kind(leaf), _kind(old)
    got, expected = f"{dtype}{list(shape)}", f"{needed_dtype}{list(needed)}"
    puts = f"ties puts {tied.path!r} {got} at {place!r} {expected}"
    if tied.index is not None:
        if not shape or not -shape[0] <= tied.index < shape[0]:
            raise ValueError(f"{puts}: index={tied.index} is not in the first axis. Name an entry that there is")
        shape = shape[1:]
    if tied.transpose is not None:
        if len(tied.transpose) != len(shape):
            raise ValueError(f"{puts}: transpose={tied.transpose} must name each of its {len(shape)} axes once")
        shape = tuple(shape[a] for a in tied.transpose)
    elif shape != needed and sorted(shape) == sorted(needed) and dtype == needed_dtype:
        if len(set(shape)) < len(shape):
            raise ValueError(f"{puts}: several transposes fit. Say which: Tied({tied.path!r}, transpose=(...))")
        tied = dataclasses.replace(tied, transpose=tuple(map(shape.index, needed)))
        shape = needed
    if (dtype, shape) != (needed_dtype, needed):
        raise ValueError(f"{puts}: they must have one shape and dtype, up to a transpose or an index in Tied")
    return tied


def _is_array(leaf: Any) -> bool:
    return (hasattr(leaf, "shape") and hasattr(leaf, "dtype")) or isinstance(leaf, bool | int | float | complex)


def _kind(leaf: Any) -> tuple[Any, tuple[int, ...]]:
    """(dtype, shape) of an array, a shape, a stored weight, or a Python number."""
    if hasattr(leaf, "shape"):
        return leaf.dtype, tuple(leaf.shape)
    return jnp.result_type(leaf), ()


def _is_integer(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)
