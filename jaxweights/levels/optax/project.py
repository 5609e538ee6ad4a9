"""Projections after an optimizer's update."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax
import optax

from jaxweights.core.tracing import traced_once
from jaxweights.core.transform import State, Transform
from jaxweights.levels.paths import Where, check_params, check_structure, flatten
from jaxweights.levels.tree import BoundTransform, TreeState, on_tree
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

    def update(updates, state, params=None, *, grad=None, **extra_args):
        del extra_args
        check_params("project", params)
        bound, updates = lifted.bind(params), flatten(updates)
        check_structure("project", "updates", updates, bound.tree)
        moved = bound.with_weights(moved_weights(bound.weights, updates.by_path))
        grads = None
        if grad is not None:
            grads = flatten(grad)
            check_structure("project", "grad", grads, bound.tree)
        new = moved.update(state.transform, None if grads is None else grads.by_path)
        return updates.replaced(landing(bound, moved, new, updates.by_path)), ProjectState(new)

    return optax.GradientTransformationExtraArgs(init, update)


def moved_weights(weights: Mapping[str, jax.Array], updates: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """The weights as the updates move them, by path. Those without an update stay."""
    return {path: _moved(None, w, updates[path]) if path in updates else w for path, w in weights.items()}


def landing(
    bound: BoundTransform, moved: BoundTransform, state: TreeState, updates: Mapping[str, jax.Array]
) -> dict[str, jax.Array]:
    """The updates, by path, that take each weight of `bound` to the transform of the `moved` one."""
    states = moved.states(state)

    def land(t, path):
        return _landing(t, bound.weights[path], updates[path], moved.weights[path], states[path])

    return bound.each(land, among=updates)


@traced_once
def _moved(_, p: jax.Array, u: jax.Array) -> jax.Array:
    return exact_sum(p, u).astype(p.dtype)


@traced_once
def _landing(t: Transform, p: jax.Array, u: jax.Array, moved: jax.Array, state: State) -> jax.Array:
    return exact_delta(p, u, t.apply(moved, state), t.anchor(moved, state))
