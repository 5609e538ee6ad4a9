"""Sparse training: an optimizer whose gradients, moments and weights are under the same masks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import optax

from jaxweights.core.axes import Axes
from jaxweights.core.joint import apply
from jaxweights.core.transform import Transform
from jaxweights.levels.optax.project import landing, moved_weights
from jaxweights.levels.paths import FlatTree, Where, check_params, check_structure, flatten, is_weight
from jaxweights.levels.tree import TreeState, on_tree


class ConfineState(NamedTuple):
    """State of `confine`: the states of the lifted transform and of the optimizer."""

    transform: TreeState
    optimizer: Any


def confine(
    optimizer: optax.GradientTransformation,
    transform: Transform | Mapping[str, Transform],
    where: Where | None = None,
    *,
    layout: Mapping[str, Axes] | None = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Confines an optimizer to the weights that masks keep: sparse training, by `Prune` or `Regrow`.

    Each step updates the transform with the gradients of all weights. Then the optimizer takes a step; the transform
    is applied to the gradients before it and to the moments and weights after it. So a pruned weight is exactly 0 and
    has moments of 0, also when it is regrown.

    Moments are found by their structure, for any optimizer: a part of the optimizer's state that is a tree like the
    parameters, possibly with leaves left out (as by `optax.masked`), holds moments. In it, each array of the shape of
    its weight is one.

    Args:
      optimizer: any optax gradient transformation, complete with its learning rate.
      transform: a transform that applies to weights, gradients and moments alike, that is, a mask: `Prune`, `Regrow`;
        or rules {glob: transform}. The first rule that matches a path applies.
      where: the weights to confine, as in `on_tree`.
      layout: how a program reads the weights, as in `on_tree`.
      seed: seed for masks whose initial state is random.

    Returns:
      An optax gradient transformation. Its `update` needs `params`.

    Raises:
      TypeError: `optimizer` is not an optax transformation, or `transform` not a transform.
      ValueError: (when used) `params` is None, or `where` selects nothing.

    >>> import jax.numpy as jnp, optax
    >>> import jaxweights as jw
    >>> tx = confine(optax.sgd(1.0, momentum=0.9), jw.Prune(0.5), where="w")
    >>> params = {"w": jnp.array([0.5, -2.0])}
    >>> updates, state = tx.update({"w": jnp.array([-3.0, 0.5])}, tx.init(params), params)
    >>> print(optax.apply_updates(params, updates)["w"], state.optimizer[0].trace["w"])
    [ 0.  -2.5] [0.  0.5]

    References: Evci, Gale, Menick, Castro and Elsen, Rigging the Lottery: Making All Tickets Winners,
    arXiv:1911.11134, 2019.
    """
    if not isinstance(optimizer, optax.GradientTransformation):
        raise TypeError(
            f"optimizer must be an optax transformation, got {optimizer!r}: write confine(optax.adam(1e-3), ...)"
        )
    lifted = on_tree(transform, where, layout=layout)
    optimizer = optax.with_extra_args_support(optimizer)

    def init(params):
        return ConfineState(lifted.init(params, jax.random.key(seed)), optimizer.init(params))

    def update(updates, state, params=None, **extra_args):
        check_params("confine", params)
        bound, grads = lifted.bind(params), flatten(updates)
        check_structure("confine", "updates", grads, bound.tree)
        masks = bound.update(state.transform, grads.by_path)
        states = bound.states(masks)

        def masked(arrays):
            return bound.each(lambda t, path: apply(t, arrays[path], states[path]), among=arrays)

        updates, inner = optimizer.update(grads.replaced(masked(grads.by_path)), state.optimizer, params, **extra_args)
        flat = flatten(updates)
        moved = bound.with_weights(moved_weights(bound.weights, flat.by_path))
        updates = flat.replaced(landing(bound, moved, masks, flat.by_path))
        return updates, ConfineState(masks, _with_masked_moments(inner, bound.tree, masked))

    return optax.GradientTransformationExtraArgs(init, update)


def _with_masked_moments(state: Any, params: FlatTree, masked: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
    """The state of an optimizer with its moments masked."""

    def parts(node: Any) -> list[Any] | None:
        """What `node` has in the place of each parameter, if it has the structure of the parameters."""
        try:
            found = params.treedef.flatten_up_to(node)
        except (TypeError, ValueError):
            return None
        return found if any(map(_is_moment, found, params.leaves)) else None

    def mapped(node: Any) -> Any:
        found = parts(node)
        if found is None:
            return node
        triples = zip(params.paths, found, params.leaves, strict=True)
        moments = {path: a for path, a, w in triples if _is_moment(a, w)}
        return FlatTree(params.paths, found, params.treedef).replaced(masked(moments))

    return jax.tree.map(mapped, state, is_leaf=lambda node: parts(node) is not None)


def _is_moment(part: Any, weight: Any) -> bool:
    return is_weight(part) and is_weight(weight) and part.shape == weight.shape
