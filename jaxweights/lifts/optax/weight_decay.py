"""Weight decay as a term of an optimizer's update."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxweights.checks import check_scalar
from jaxweights.lifts.paths import Where, check_params, check_structure, flatten, naming, select
from jaxweights.techniques.weight_decay import weight_decay
from jaxweights.transform import Scalar


class WeightDecayState(NamedTuple):
    """State of `add_weight_decay`: the number of updates made."""

    step: jax.Array


def add_weight_decay(rate: Scalar, where: Where | None = None) -> optax.GradientTransformation:
    """Adds rate·w to the update of every selected weight.

    Before the optimizer's scaling it is L2 regularization, after it decoupled decay (AdamW):
    `optax.chain(optax.scale_by_adam(), add_weight_decay(1e-2), optax.scale_by_learning_rate(1e-3))`.

    Args:
      rate: the decay λ >= 0: a number, a scalar array, or a schedule of the step. `optax.inject_hyperparams`
        works on it; a predicate `where` then has to be named in its `static_args`.
      where: the weights to decay, as for `on_tree`: by default those with two or more axes, not biases or the
        scales of norms.

    Returns:
      An optax gradient transformation. Its `update` needs `params`.

    Raises:
      TypeError: `rate` is not a number or schedule.
      ValueError: `rate` is negative or NaN; (when used) `params` is None or `where` selects nothing.

    >>> import jax.numpy as jnp, optax
    >>> tx = optax.chain(add_weight_decay(0.5, where="w"), optax.sgd(1.0))
    >>> params = {"w": jnp.array([2.0])}
    >>> updates, _ = tx.update({"w": jnp.array([0.25])}, tx.init(params), params)
    >>> print(updates["w"])
    [-1.25]

    References: Loshchilov and Hutter, Decoupled Weight Decay Regularization, arXiv:1711.05101, 2017.
    """
    check_scalar("rate", rate, 0, schedule=True)

    def init(params):
        paths, leaves, _ = flatten(params)
        select(paths, leaves, [(None, None)], where)
        return WeightDecayState(jnp.zeros((), jnp.int32)) if callable(rate) else optax.EmptyState()

    def update(updates, state, params=None):
        check_params("add_weight_decay", params)
        check_structure("add_weight_decay", "updates", updates, params)
        now = rate(state.step) if callable(rate) else rate
        paths, p_leaves, _ = flatten(params)
        weights = {paths[i]: p_leaves[i] for i in select(paths, p_leaves, [(None, None)], where)}
        u_paths, flat, treedef = flatten(updates)
        decayed = []
        for path, u in zip(u_paths, flat, strict=True):
            with naming("add_weight_decay", path):
                decayed.append(weight_decay(u, weights[path], now) if path in weights else u)
        new_state = WeightDecayState(jnp.asarray(optax.safe_increment(state.step))) if callable(rate) else state
        return jax.tree_util.tree_unflatten(treedef, decayed), new_state

    return optax.GradientTransformation(init, update)
