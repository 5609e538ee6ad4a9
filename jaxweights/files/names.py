"""Names of tensors in a file, and the tree that they make up: "a.b.kernel" is tree["a"]["b"]["kernel"]."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxweights.core.stored import is_stored

_KINDS = ("dict", "list", "tuple", "integers", "none")
_DEEPEST = 100


def named(tree: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """({name: leaf}, {name: kind}) of a tree of dicts, lists, tuples and None, and of an `nnx.State`.

    Kinds tell what names do not: where there are lists, tuples, dicts with integers as keys, empty dicts, and None.
    """
    leaves: dict[str, Any] = {}
    kinds: dict[str, str] = {}

    def visit(path: tuple[str, ...], node: Any) -> None:
        name = ".".join(path)
        if len(path) > _DEEPEST:
            raise ValueError(f"the tree is more than {_DEEPEST} levels deep at {name[:200]!r}: flatten it")
        if isinstance(node, Mapping):
            numbered = bool(node) and all(type(key) is int for key in node)
            if numbered or not node:
                kinds[name] = "integers" if numbered else "dict"
            for key, below in node.items():
                visit((*path, str(key) if numbered else _checked(key, name)), below)
        elif type(node) in (list, tuple):
            kinds[name] = type(node).__name__
            for i, below in enumerate(node):
                visit((*path, str(i)), below)
        elif not path:
            raise TypeError(
                f"tree must be a dict, a list or a tuple of arrays and stored weights, got {type(node).__name__}: "
                f"save {{'weight': it}}, or of a Flax NNX module nnx.state(module)"
            )
        elif node is None:
            kinds[name] = "none"
        else:
            leaves[name] = _value(node)

    visit((), tree)
    return leaves, kinds


def nested(leaves: Mapping[str, Any], kinds: Mapping[str, str]) -> Any:
    """The tree of which `named` gave these leaves and kinds. Raises a ValueError if there is none."""
    tree: dict[str, Any] = {}

    def node_at(keys: list[str], name: str) -> dict[str, Any]:
        node = tree
        if len(keys) > _DEEPEST:
            raise ValueError(f"the name {name[:200]!r} has more than {_DEEPEST} parts")
        for key in keys:
            node = node.setdefault(key, {})
            if not isinstance(node, dict):
                raise ValueError(f"the name {name!r} lies below another tensor, at {key!r}: rename one of them")
        return node

    none = {name: None for name, kind in kinds.items() if kind == "none"}
    for name, leaf in (*leaves.items(), *none.items()):
        *above, last = name.split(".")
        node = node_at(above, name)
        if last in node:
            raise ValueError(f"the name {name!r} is taken, or others lie below it: rename one of them")
        node[last] = leaf
    for name, kind in kinds.items():
        if kind != "none" and name:
            node_at(name.split("."), name)
    return _restored((), tree, kinds)


def check_kinds(kinds: Any) -> dict[str, str]:
    """`kinds`, or an error unless it is a dict {name: kind}."""
    if not isinstance(kinds, dict) or not all(isinstance(k, str) and k in _KINDS for k in kinds.values()):
        raise ValueError(f"the kinds of nodes must be {{name: one of {', '.join(_KINDS)}}}, got {str(kinds)[:200]}")
    return kinds


def _restored(path: tuple[str, ...], node: Any, kinds: Mapping[str, str]) -> Any:
    """The node with lists, tuples and dicts with integers as keys where they were."""
    if not isinstance(node, dict):
        return node
    name = ".".join(path)
    kind = kinds.get(name, "dict")
    below = {key: _restored((*path, key), value, kinds) for key, value in node.items()}
    if kind in ("list", "tuple"):
        if set(below) != {str(i) for i in range(len(below))}:
            raise ValueError(f"the metadata calls {name!r} a {kind}, its entries are {sorted(below)[:10]}")
        ordered = [below[str(i)] for i in range(len(below))]
        return ordered if kind == "list" else tuple(ordered)
    if kind == "integers":
        if not all(_is_integer(key) for key in below):
            raise ValueError(f"the metadata says that the keys at {name!r} are integers, got {sorted(below)[:10]}")
        return {int(key): value for key, value in below.items()}
    return below


def _value(leaf: Any) -> Any:
    """What a variable of Flax NNX holds, and any other leaf as it is."""
    if is_stored(leaf) or isinstance(leaf, jax.Array | np.ndarray):
        return leaf
    from flax import nnx  # only here: importing Flax takes a while

    if not isinstance(leaf, nnx.Variable):
        return leaf
    (value,) = jax.tree.leaves(leaf, is_leaf=lambda node: node is not leaf)
    return value


def _checked(key: Any, name: str) -> str:
    if not isinstance(key, str):
        raise TypeError(f"the keys of tree must be strings, got {key!r} at {name!r}: write them as strings")
    if "." in key:
        raise ValueError(f'the key {key!r} at {name!r} has a ".", which parts keys in a file: rename it, or nest it')
    return key


def _is_integer(key: str) -> bool:
    digits = key.removeprefix("-")
    return digits.isascii() and digits.isdigit() and str(int(key)) == key
