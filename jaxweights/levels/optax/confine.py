"""An optimizer that moves kept weights only: gradients, moments and weights under the same masks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import optax

from jaxweights.core.joint import apply
from jaxweights.core.transform import Transform
from jaxweights.levels.optax.project import landing, moved_weights
from jaxweights.levels.paths import FlatTree, Where, check_params, check_structure, flatten, is_weight
from jaxweights.levels.tree import TreeState, on_tree


class ConfineState(NamedTuple):
    """State of `confine`: that of the lifted transform, and that of the optimizer."""

    transform: TreeState
    optimizer: Any


def confine(
    optimizer: optax.GradientTransformation,
    transform: Transform | Mapping[str, Transform],
    where: Where | None = None,
    *,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Confines an optimizer to the weights that masks keep: sparse training, by `Prune` or `Regrow`.

    Each step is the `update` of the transform with the gradients of all weights, then a step of the optimizer in which
    gradients, moments and the weights after it are transformed alike. What is pruned is exactly 0 then, has no moment,
    and starts without one if it comes back.

    Moments are found by structure: whatever in the optimizer's state is a tree like the parameters, or that with
    some leaves left out, as by `optax.masked`. Of it every array of the shape of a weight is taken for one of its
    moments. No optimizer is known by name.

    Args:
      optimizer: any optax gradient transformation, the whole of it.
      transform: what applies to weights, gradients and moments alike, that is, a mask: `Prune`, `Regrow`; or rules
        {glob: transform} of which the first that matches a path is taken.
      where: the weights to confine, as for `on_tree`.
      seed: seed of the random numbers that the masks may start from.

    Returns:
      An optax gradient transformation. Its `update` needs `params`.

    Raises:
      TypeError: `optimizer` or `transform` is none.
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
    lifted = on_tree(transform, where)
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
