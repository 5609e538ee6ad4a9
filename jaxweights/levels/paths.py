"""Paths in trees, and which weights a glob or a predicate selects."""

from __future__ import annotations

import functools
import re
import zlib
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxweights.core.axes import Axes
from jaxweights.core.inference import infer
from jaxweights.core.stored import is_stored

T = TypeVar("T")
Where = str | Sequence[str] | Callable[[str, jax.Array], bool]
"""A glob on paths, several of them, or a predicate `(path, array) -> bool`."""

STATE = "weight_transform"
"""The name under which Linen and NNX modules keep the state of their transforms, beside the parameters."""


class FlatTree(NamedTuple):
    """The leaves of a pytree and their paths. A stored weight, such as a `QuantizedArray`, is one leaf."""

    paths: list[str]
    leaves: list[Any]
    treedef: Any

    @property
    def by_path(self) -> dict[str, Any]:
        """The leaves by path."""
        return dict(zip(self.paths, self.leaves, strict=True))

    def replaced(self, new: Mapping[str, Any]) -> Any:
        """The tree with new leaves at the given paths."""
        return self.treedef.unflatten(new.get(p, leaf) for p, leaf in zip(self.paths, self.leaves, strict=True))


def flatten(tree: Any) -> FlatTree:
    """Flattens any pytree, down to its arrays and stored weights.

    A path joins dictionary keys, indices and attribute names with "/". The array inside a Flax variable or box has the
    path of the variable: the last ".value" is left out.
    """
    keyed, treedef = jax.tree_util.tree_flatten_with_path(tree, is_stored)
    return FlatTree([_join(keys) for keys, _ in keyed], [leaf for _, leaf in keyed], treedef)


def entries(tree: Mapping[Any, Any]) -> dict[str, dict[str, Any]]:
    """{path: {name: leaf}} of nested dicts, as modules keep the state of their transforms."""
    found: dict[str, dict[str, Any]] = {}

    def visit(path: tuple[str, ...], node: Mapping[Any, Any]) -> None:
        for name, below in node.items():
            if isinstance(below, Mapping):
                visit((*path, str(name)), below)
            else:
                found.setdefault("/".join(path), {})[name] = below

    visit((), tree)
    return found


def is_weight(leaf: Any) -> bool:
    """Whether a leaf is an array of a real floating dtype. A stored weight is none: nothing looks inside it."""
    return isinstance(leaf, jax.Array | np.ndarray) and jnp.issubdtype(leaf.dtype, jnp.floating)


def key_of(key: jax.Array, path: str) -> jax.Array:
    """`key` folded with a hash of the path: it stays the same when other weights join or leave the tree."""
    return jax.random.fold_in(key, zlib.crc32(path.encode()))


def select(
    paths: Sequence[str],
    leaves: Sequence[Any],
    rules: Sequence[tuple[Where | None, T]],
    where: Where | None = None,
    layout: Container[str] | None = None,
) -> dict[int, T]:
    """The value of the first rule that matches each weight, by position; weights without one are left out.

    A rule of None matches all that `where` allows. A `where` of None allows every weight that a glob of a rule matches
    and, to a rule of None, those in the layout; without a layout, weights with two or more axes except biases,
    scales, tokens and positions. Raises if a glob matches nothing, or a stored weight, which is no array.
    """
    weights = [i for i, leaf in enumerate(leaves) if is_weight(leaf) or is_stored(leaf)]
    if where is not None:
        weights = _matching(weights, paths, leaves, where)
    arrays = [i for i in weights if not is_stored(leaves[i])]
    chosen: dict[int, T] = {}
    for pattern, value in rules:
        if pattern is not None:
            matched = _matching(weights, paths, leaves, pattern)
        elif where is not None:
            matched = arrays
        elif layout is not None:
            matched = [i for i in arrays if paths[i] in layout]
            if not matched:
                _nothing("the layout", paths, leaves, ". Name those that the program does not multiply by with `where`")
        else:
            matched = _matrices(arrays, paths, leaves)
            if not matched:
                default = "floating-point arrays with two or more axes except biases, scales, tokens and positions"
                _nothing(f"the default where ({default})", paths, leaves)
        for i in matched:
            chosen.setdefault(i, value)
    return chosen


def check_layout(layout: Any) -> None:
    """Raises unless `layout` is None or a mapping {path: Axes}."""
    if layout is None:
        return
    if not isinstance(layout, Mapping):
        got = type(layout).__name__
        raise TypeError(f"layout must be a mapping {{path: Axes}}, got {got}: make one with jaxweights.layout")
    for path, axes in layout.items():
        if not isinstance(axes, Axes):
            raise TypeError(f"layout must be a mapping {{path: Axes}}, got {axes!r} at {path!r}: see jaxweights.layout")


def check_params(name: str, params: Any) -> None:
    """Raises if an optax transformation was called without the parameters."""
    if params is None:
        raise ValueError(f"{name} needs the parameters: call tx.update(grads, state, params)")


def check_structure(name: str, what: str, updates: FlatTree, params: FlatTree) -> None:
    """Raises unless every leaf of `updates` has a parameter of its shape. Parameters without one (None) are fine."""
    shapes = {path: np.shape(a) for path, a in zip(params.paths, params.leaves, strict=True)}
    for path, u in zip(updates.paths, updates.leaves, strict=True):
        if path not in shapes:
            raise ValueError(f"{name}: {what} has {path!r}, params does not: pass the parameters of these gradients")
        if np.shape(u) != shapes[path]:
            raise ValueError(
                f"{name}: {what} at {path!r} has shape {np.shape(u)}, params {shapes[path]}: pass the parameters "
                f"of these gradients"
            )


def check_rules(name: str, rules: Any, form: str) -> None:
    """Raises unless `rules` is a dict of strings that is not empty."""
    if not isinstance(rules, Mapping):
        raise TypeError(f"{name} must be a dict {form}, got {type(rules).__name__}")
    if not rules:
        raise ValueError(f"{name} is empty: give {form}")
    for key in rules:
        if not isinstance(key, str):
            raise TypeError(f"{name} must be {form}, got the key {key!r}: write it as a string")


def _matching(among: list[int], paths: Sequence[str], leaves: Sequence[Any], where: Where) -> list[int]:
    if callable(where):
        matched = [i for i in among if not is_stored(leaves[i]) and where(paths[i], leaves[i])]
        if not matched:
            _nothing(f"where={getattr(where, '__name__', where)!r}", paths, leaves)
        return matched
    patterns = [where] if isinstance(where, str) else list(where) if isinstance(where, Iterable) else []
    if not patterns or not all(isinstance(p, str) for p in patterns):
        raise TypeError(f"where must be a glob, a list of globs or a predicate (path, array) -> bool, got {where!r}")
    found: set[int] = set()
    for pattern in patterns:
        matches = [i for i in among if _regex(pattern).fullmatch(paths[i])]
        if not matches:
            _nothing(f"where={pattern!r}", paths, leaves)
        for i in matches:
            _check_array(f"where={pattern!r}", paths[i], leaves[i])
        found.update(matches)
    return sorted(found)


def _matrices(among: list[int], paths: Sequence[str], leaves: Sequence[Any]) -> list[int]:
    """The weights with two or more axes, except biases, scales, tokens and positions, by names and shapes."""
    found = infer({paths[i]: tuple(leaves[i].shape) for i in among})
    return [i for i in among if found[paths[i]].axes is not None and STATE not in paths[i].split("/")]


def _check_array(what: str, path: str, leaf: Any) -> None:
    if is_stored(leaf):
        raise ValueError(
            f"{what} selects {path!r}, which is stored as a {type(leaf).__name__} and no array: leave it out of the "
            f"glob, or make arrays of what is stored with jaxweights.densify(params)"
        )


def _nothing(what: str, paths: Sequence[str], leaves: Sequence[Any], remedy: str = "") -> None:
    have = [f"{p} {tuple(a.shape)}" for p, a in zip(paths, leaves, strict=True) if is_weight(a)]
    listing = ", ".join(have[:50]) + (f", and {len(have) - 50} more" if len(have) > 50 else "")
    stored = any(map(is_stored, leaves))
    remedy += ". Others are stored: jaxweights.densify(params) makes arrays of them" if stored else ""
    raise ValueError(
        f"{what} selects no weight. The floating-point arrays of this tree are: {listing or 'none'}{remedy}"
    )


@functools.lru_cache(maxsize=1024)
def _regex(glob: str) -> re.Pattern[str]:
    """`*` and `?` stay within one component, `**/` is any number of them, none included."""
    out = ""
    for token in re.findall(r"\*\*/|\*\*|\*|\?|\[!?[^\]]+\]|.", glob):
        if token in ("**/", "**", "*", "?"):
            out += {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}[token]
        elif len(token) > 1:
            out += token.replace("[!", "[^")
        else:
            out += re.escape(token)
    return re.compile(out)


def _join(keys: Sequence[Any]) -> str:
    names = [str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in keys]
    if len(keys) > 1 and isinstance(keys[-1], jax.tree_util.GetAttrKey) and names[-1] == "value":
        names.pop()
    return "/".join(names)
