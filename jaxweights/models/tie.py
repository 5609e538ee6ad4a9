"""Tying weights of a tree: one array in several places."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxweights.levels.paths import check_rules, flatten


def tie(params: Any, ties: Mapping[str, str]) -> Any:
    """Puts one leaf in the place of others.

    Inside a loss, the tied places are one weight: its gradient is the sum over all of them, and that of the
    places it replaces is 0.

    Args:
      params: any pytree.
      ties: {path of the place: path of the weight to put there}. A weight that is put somewhere must not
        itself be replaced.

    Returns:
      A tree like `params`.

    Raises:
      ValueError: a path is not in the tree, the shapes differ, or a source is replaced.

    >>> import jax.numpy as jnp
    >>> tied = tie({"embed": jnp.ones((3, 2)), "head": jnp.zeros((3, 2))}, {"head": "embed"})
    >>> bool((tied["head"] == 1).all())
    True

    References: Press and Wolf, Using the Output Embedding to Improve Language Models, arXiv:1608.05859, 2016.
    """
    check_rules("ties", ties, "{path: path}")
    paths, leaves, treedef = flatten(params)
    position = {p: i for i, p in enumerate(paths)}
    new = list(leaves)
    for place, source in ties.items():
        for path in (place, source):
            if path not in position:
                raise ValueError(f"ties names {path!r}, which is not in the tree. It has: {', '.join(paths)}")
        if source in ties:
            raise ValueError(f"ties puts {source!r} at {place!r}, but {source!r} is itself replaced: name the last one")
        old, weight = leaves[position[place]], leaves[position[source]]
        have, want = (f"{jnp.result_type(a)}{list(jnp.shape(a))}" for a in (weight, old))
        if have != want:
            raise ValueError(f"ties puts {source!r} {have} at {place!r} {want}: they must have one shape and dtype")
        new[position[place]] = weight
    return jax.tree_util.tree_unflatten(treedef, new)
