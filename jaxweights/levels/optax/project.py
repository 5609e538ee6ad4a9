"""Projections after an optimizer's update."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax
import optax

from jaxweights.core.axes import Axes
from jaxweights.core.tracing import traced_once
from jaxweights.core.transform import State, Transform
from jaxweights.levels.paths import Where, check_params, check_structure, flatten
from jaxweights.levels.tree import BoundTransform, TreeState, on_tree
from jaxweights.numerics.rounding import exact_delta, exact_sum
from jaxweights.numerics.sixteen_bits import narrow


class ProjectState(NamedTuple):
    """State of `project`: the state of the lifted transform."""

    transform: TreeState


def project(
    transform: Transform | Mapping[str, Transform],
    where: Where | None = None,
    *,
    layout: Mapping[str, Axes] | None = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Projects the weights after each update: put it last in an `optax.chain`.

    Replaces the update u of a weight p by u' such that p + u' is the transform of p + u. So the constraint holds after
    `optax.apply_updates`: bounds, zeros and masks bit for bit, in float32 and in 16 bits. To that end u' is float32 or
    wider, and where no u' gives the projected weight exactly, p + u' is its neighbour towards zero, or towards the
    `anchor` of the transform. A weight that the transform does not change keeps its update u.

    The state of the transform is part of the optimizer's state. Each step calls `update`, then `apply`. A learned scale
    (`WeightNorm`) keeps its initial value, and so the norms stay as they were at `init`. So does a learned codebook,
    and with it the weights: leave out the `codebook_gradient` of `ShareWeights` here.

    A transform that uses gradients, such as `Prune(0.5, score=jw.scores.saliency)`, gets those that are passed to the
    chain: `tx.update(updates, state, params, grad=grads)`. `confine` needs no such argument.

    In 16 bits the updates are wider than the parameters. A wrapper that expects equal dtypes, such as
    `optax.apply_if_finite`, must go around the optimizer, not around the whole chain. Where speed matters, call
    `on_tree(transform).apply` on the parameters after `apply_updates`: it is exact and cheaper.

    Args:
      transform: a transform, or rules {glob: transform}. The first rule that matches a path applies.
      where: the weights to project, as in `on_tree`.
      layout: how a program reads the weights, as in `on_tree`.
      seed: seed for transforms whose initial state is random.

    Returns:
      An optax gradient transformation. Its `update` needs `params`.

    Raises:
      TypeError: `transform` is not a transform.
      ValueError: (when used) `params` is None, or `where` selects nothing.

    >>> import jax.numpy as jnp, optax
    >>> import jaxweights as jw
    >>> tx = optax.chain(optax.sgd(1.0), project(jw.ClipWeights(1.0), where="w"))
    >>> params = {"w": jnp.array([0.5, -0.5])}
    >>> updates, _ = tx.update({"w": jnp.array([-3.0, 0.2])}, tx.init(params), params)
    >>> print(optax.apply_updates(params, updates)["w"])
    [ 1.  -0.7]
    """
    lifted = on_tree(transform, where, layout=layout)

    def init(params):
        return ProjectState(lifted.init(params, jax.random.key(seed)))

    def update(updates, state, params=None, *, grad=None, **extra_args):
        del extra_args
        check_params("project", params)
        bound, updates = lifted.bind(params), flatten(updates)
        check_structure("project", "updates", updates, bound.tree)
        grads = None
        if grad is not None:
            grads = flatten(grad)
            check_structure("project", "grad", grads, bound.tree)
        moved = bound.with_weights(moved_weights(bound.weights, updates.by_path))
        new = moved.update(state.transform, grads and grads.by_path)
        return updates.replaced(landing(bound, moved, new, updates.by_path)), ProjectState(new)

    return optax.GradientTransformationExtraArgs(init, update)


def moved_weights(weights: Mapping[str, jax.Array], updates: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """The weights after the updates, by path. A weight without an update stays as it is."""
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
    return narrow(exact_sum(p, u), p.dtype)


@traced_once
def _landing(t: Transform, p: jax.Array, u: jax.Array, moved: jax.Array, state: State) -> jax.Array:
    return exact_delta(p, u, t.apply(moved, state), t.anchor(moved, state))
