"""Projections after an optimizer's update."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import optax

from jaxweights.core.transform import Transform
from jaxweights.levels.paths import Where, check_params, check_structure, flatten
from jaxweights.levels.tree import TreeState, on_tree
from jaxweights.numerics.rounding import exact_delta, exact_sum


class ProjectState(NamedTuple):
    """State of `project`: that of the lifted transform."""

    transform: TreeState


def project(
    transform: Transform | Mapping[str, Transform], where: Where | None = None, *, seed: int = 0
) -> optax.GradientTransformationExtraArgs:
    """Projects the weights after each update: put it last in an `optax.chain`.

    Turns the update u of a weight p into u' such that p + u' is the transform of p + u, so that the constraint
    holds after `optax.apply_updates`: |w| <= c, zeros and masks bit for bit, in float32 and in 16 bits. For that,
    u' is float32 or wider, and where p + u' cannot be the projected weight it is its neighbour towards
    zero, or towards the `anchor` of the transform. A weight that the transform does not change keeps its update u.

    A transform with state keeps it in the optimizer's: each step is its `update`, then its `apply`. A learned
    scale (`WeightNorm`) stays what it is at the start, so that the norms do.

    In 16 bits the updates are wider than the parameters: a wrapper that wants them alike, such as
    `optax.apply_if_finite`, goes around the optimizer before, not around the whole chain. Where speed matters more
    than one line in a chain, `on_tree(transform).apply` on the parameters after `apply_updates` is exact and cheaper.

    Args:
      transform: a transform, or rules {glob: transform} of which the first that matches a path is taken.
      where: the weights to project, as for `on_tree`.
      seed: seed of the random numbers that the state may start from.

    Returns:
      An optax gradient transformation. Its `update` needs `params`.

    >>> import jax.numpy as jnp, optax
    >>> import jaxweights as jw
    >>> tx = optax.chain(optax.sgd(1.0), project(jw.ClipWeights(1.0), where="w"))
    >>> params = {"w": jnp.array([0.5, -0.5])}
    >>> updates, _ = tx.update({"w": jnp.array([-3.0, 0.2])}, tx.init(params), params)
    >>> print(optax.apply_updates(params, updates)["w"])
    [ 1.  -0.7]
    """
    lifted = on_tree(transform, where)

    def init(params):
        return ProjectState(lifted.init(params, jax.random.key(seed)))

    def update(updates, state, params=None, **extra_args):
        del extra_args
        check_params("project", params)
        check_structure("project", "updates", updates, params)
        moved = moved_by(params, updates, lifted.selected(params))
        tree_state = lifted.update(moved, state.transform, updates)
        maps, anchors = lifted.maps(moved, tree_state), lifted.anchors(moved, tree_state)
        return landed(params, updates, moved, maps, anchors), ProjectState(tree_state)

    return optax.GradientTransformationExtraArgs(init, update)


def moved_by(params: Any, updates: Any, chosen: Iterable[str]) -> Any:
    """`params` with those of the chosen paths as the updates move them."""
    by_path, (paths, leaves, treedef) = _by_path(updates), flatten(params)
    new = [
        exact_sum(p, by_path[path]).astype(p.dtype) if path in chosen and path in by_path else p
        for path, p in zip(paths, leaves, strict=True)
    ]
    return jax.tree_util.tree_unflatten(treedef, new)


def landed(
    params: Any,
    updates: Any,
    moved: Any,
    maps: Mapping[str, Callable[[jax.Array], jax.Array]],
    anchors: Mapping[str, float | jax.Array],
) -> Any:
    """The updates that move `params` to `moved` under the maps, by path; the others as they are."""
    before, reached = _by_path(params), _by_path(moved)
    paths, flat, treedef = flatten(updates)
    new = [
        exact_delta(before[path], u, maps[path](reached[path]), anchors[path]) if path in maps else u
        for path, u in zip(paths, flat, strict=True)
    ]
    return jax.tree_util.tree_unflatten(treedef, new)


def _by_path(tree: Any) -> dict[str, Any]:
    return dict(zip(*flatten(tree)[:2], strict=True))
