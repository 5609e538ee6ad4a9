"""Reinitialization of a tree of weights by rules on paths."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxweights.core.axes import Axes
from jaxweights.core.inference import infer_axes
from jaxweights.levels.paths import check_layout, check_rules, flatten, is_weight, key_of, select
from jaxweights.techniques.initialization import Initializer


def reinitialize(
    params: Any, key: jax.Array, rules: Mapping[str, Initializer], *, layout: Mapping[str, Axes] | None = None
) -> Any:
    """Draws the weights of a tree anew, by rules on their paths.

    Args:
      params: any pytree.
      key: a `jax.random` key. Each weight uses it folded with a hash of its path, so the draw does not depend on the
        rest of the tree.
      rules: {glob: initializer}; the first glob that matches a path applies. An initializer is a function
        `(key, shape, dtype) -> array`, ours or JAX's. If it takes `axes`, it is passed those of the layout, or else
        those that follow from names and shapes (attention, stacks), unless `functools.partial` has set them. Weights
        that no glob matches are kept.
      layout: how a program reads the weights, from `jaxweights.layout`, or {path: Axes}.

    Returns:
      A tree like `params`.

    Raises:
      TypeError: `rules` is not a dict of initializers, a rule is a factory of initializers, or `layout` is no mapping
        of `Axes`.
      ValueError: `rules` is empty, a glob matches nothing, or an initializer returns another shape or dtype.

    >>> import jax, jax.numpy as jnp
    >>> import jaxweights as jw
    >>> params = {"dense": {"kernel": jnp.ones((300, 300)), "bias": jnp.ones(300)}}
    >>> new = reinitialize(params, jax.random.key(0), {"**/kernel": jw.he_normal, "**/bias": jax.nn.initializers.zeros})
    >>> print(new["dense"]["kernel"].std().round(2), new["dense"]["bias"].sum())
    0.08 0.0
    """
    check_rules("rules", rules, "{glob: initializer}")
    for glob, rule in rules.items():
        if not callable(rule):
            raise TypeError(f"the rule {glob!r} must be an initializer (key, shape, dtype) -> array, got {rule!r}")
    check_layout(layout)
    paths, leaves, treedef = flatten(params)
    axes = infer_axes({p: tuple(a.shape) for p, a in zip(paths, leaves, strict=True) if is_weight(a)})
    axes |= layout or {}
    for i, initializer in select(paths, leaves, list(rules.items())).items():
        old = leaves[i]
        options = {"axes": axes[paths[i]]} if paths[i] in axes and _takes_axes(initializer) else {}
        try:
            new = initializer(key_of(key, paths[i]), old.shape, old.dtype, **options)
        except (TypeError, ValueError) as e:
            if type(e) not in (TypeError, ValueError):
                raise
            raise type(e)(f"reinitialize at {paths[i]!r}: {e}") from e
        if callable(new):
            raise TypeError(
                f"reinitialize at {paths[i]!r}: the rule returned a function, so it is a factory: call it first"
            )
        if jnp.shape(new) != old.shape or jnp.result_type(new) != old.dtype:
            raise ValueError(
                f"reinitialize at {paths[i]!r}: the initializer returned {jnp.result_type(new)}{list(jnp.shape(new))}: "
                f"it must return {old.dtype}{list(old.shape)}"
            )
        leaves[i] = new
    return jax.tree_util.tree_unflatten(treedef, leaves)


def _takes_axes(initializer: Initializer) -> bool:
    """Whether it has a parameter `axes` that is not set yet."""
    parameter = inspect.signature(initializer).parameters.get("axes")
    return parameter is not None and parameter.default is None
