"""What is done once to a whole tree: tying leaves, and drawing weights anew."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxweights.axes import Axes, infer_axes
from jaxweights.lifts.paths import check_axes, flatten, is_weight, key_of, select
from jaxweights.techniques.initialization import Initializer


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
    _check_rules("ties", ties, "{path: path}")
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


def reinitialize(
    params: Any,
    key: jax.Array,
    rules: Mapping[str, Initializer],
    *,
    axes: Mapping[str, Axes] | None = None,
) -> Any:
    """Draws the weights of a tree anew, by rules on their paths.

    Args:
      params: any pytree.
      key: a `jax.random` key; each weight draws from it, folded with a hash of its path, so that what it draws does not
        change with the rest of the tree.
      rules: {glob: initializer} of which the first that matches is taken; an initializer is
        `(key, shape, dtype) -> array`, ours or JAX's. One that takes `axes`, and has not got them by
        `functools.partial`, is given those that follow from the tree (attention, stacks). Weights that no rule matches
        are kept.
      axes: {path: Axes} for kernels whose reading does not follow from the tree; `read_axes` has it from the model.

    Returns:
      A tree like `params`.

    Raises:
      ValueError: the rules are empty, a glob matches nothing, or an initializer returns another shape.

    >>> import jax, jax.numpy as jnp
    >>> import jaxweights as jw
    >>> params = {"dense": {"kernel": jnp.ones((300, 300)), "bias": jnp.ones(300)}}
    >>> new = reinitialize(params, jax.random.key(0), {"**/kernel": jw.he_normal, "**/bias": jax.nn.initializers.zeros})
    >>> print(new["dense"]["kernel"].std().round(2), new["dense"]["bias"].sum())
    0.08 0.0
    """
    _check_rules("rules", rules, "{glob: initializer}")
    for glob, rule in rules.items():
        if not callable(rule):
            raise TypeError(f"the rule {glob!r} must be an initializer (key, shape, dtype) -> array, got {rule!r}")
    paths, leaves, _ = flatten(params)
    given = check_axes(axes, [p for p, a in zip(paths, leaves, strict=True) if is_weight(a)])
    chosen = {paths[i]: initializer for i, initializer in select(paths, leaves, list(rules.items())).items()}
    return redraw("reinitialize", params, key, chosen, given)


def redraw(name: str, params: Any, key: jax.Array, chosen: Mapping[str, Initializer], axes: Mapping[str, Axes]) -> Any:
    """`params` with the weights of `chosen`, by path, drawn anew. `name` is that of the function that asks."""
    paths, leaves, treedef = flatten(params)
    readings = infer_axes({p: tuple(a.shape) for p, a in zip(paths, leaves, strict=True) if is_weight(a)}) | dict(axes)
    for i, path in enumerate(paths):
        if path not in chosen:
            continue
        initializer, old = chosen[path], leaves[i]
        options = {"axes": readings[path]} if path in readings and _takes_axes(initializer) else {}
        try:
            new = initializer(key_of(key, path), old.shape, old.dtype, **options)
        except (TypeError, ValueError) as e:
            if type(e) not in (TypeError, ValueError):
                raise
            raise type(e)(f"{name} at {path!r}: {e}") from e
        if callable(new):
            raise TypeError(f"{name} at {path!r}: the rule is a factory, it returned a function: call it first")
        if jnp.shape(new) != old.shape or jnp.result_type(new) != old.dtype:
            raise ValueError(
                f"{name} at {path!r}: the initializer returned {jnp.result_type(new)}{list(jnp.shape(new))}: "
                f"it must return {old.dtype}{list(old.shape)}"
            )
        leaves[i] = new
    return jax.tree_util.tree_unflatten(treedef, leaves)


def _check_rules(name: str, rules: Any, form: str) -> None:
    if not isinstance(rules, Mapping):
        raise TypeError(f"{name} must be a dict {form}, got {type(rules).__name__}")
    if not rules:
        raise ValueError(f"{name} is empty: give {form}")
    for key in rules:
        if not isinstance(key, str):
            raise TypeError(f"{name} must be {form}, got the key {key!r}: write it as a string")


def _takes_axes(initializer: Initializer) -> bool:
    """Whether it has a parameter `axes` that is still open."""
    parameter = inspect.signature(initializer).parameters.get("axes")
    return parameter is not None and parameter.default is None
