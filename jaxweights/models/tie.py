"""Weight tying: one array in several places of a tree."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxweights.levels.paths import check_rules, flatten


def tie(params: Any, ties: Mapping[str, str]) -> Any:
    """Ties weights: replaces some leaves of a tree by others.

    Tie inside the loss: there, the tied leaves are one weight. Its gradient is the sum over all its places, and the
    gradient of the leaves that were replaced is 0. An optimizer that updates a tied tree without tying it in the loss
    moves each leaf by itself.

    Outside `jit`, each replaced leaf is a copy with its own memory, so that a tied tree can be donated
    (`donate_argnums`). Inside, a copy costs nothing.

    Args:
      params: any pytree.
      ties: {path of the leaf to replace: path of the leaf to put there}. A leaf that replaces others must not itself be
        replaced.

    Returns:
      A tree like `params`.

    Raises:
      TypeError: `ties` is not a dict of paths.
      ValueError: `ties` is empty, a path is not in the tree, shapes or dtypes differ, or a source is itself replaced.

    >>> import jax.numpy as jnp
    >>> tied = tie({"embed": jnp.ones((3, 2)), "head": jnp.zeros((3, 2))}, {"head": "embed"})
    >>> bool((tied["head"] == 1).all())
    True

    References: Press and Wolf, Using the Output Embedding to Improve Language Models, arXiv:1608.05859, 2016.
    """
    check_rules("ties", ties, "{path: path}")
    tree = flatten(params)
    leaves = tree.by_path
    for place, source in ties.items():
        for path in (place, source):
            if path not in leaves:
                raise ValueError(f"ties names {path!r}, which is not in the tree. It has: {', '.join(tree.paths)}")
        if source in ties:
            raise ValueError(f"ties puts {source!r} at {place!r}, but {source!r} is itself replaced: name the last one")
        got, expected = (f"{jnp.result_type(leaves[p])}{list(jnp.shape(leaves[p]))}" for p in (source, place))
        if got != expected:
            raise ValueError(f"ties puts {source!r} {got} at {place!r} {expected}: they must have one shape and dtype")
    return tree.replaced({place: _copy(leaves[source]) for place, source in ties.items()})


def _copy(leaf: Any) -> Any:
    """A leaf in memory of its own; leaves without a device buffer, such as shapes, as they are."""
    return jnp.copy(leaf) if isinstance(leaf, jax.Array) else leaf
