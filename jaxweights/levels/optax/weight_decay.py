"""Weight decay as a term of an optimizer's update."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxweights.core.axes import Axes
from jaxweights.core.checks import check_scalar, naming
from jaxweights.core.transform import Scalar
from jaxweights.levels.paths import Where, check_layout, check_params, check_structure, flatten, is_weight, select
from jaxweights.techniques.weight_decay import PenaltyGrad, check_penalty, weight_decay


class WeightDecayState(NamedTuple):
    """State of `add_weight_decay`: the number of updates made, and the centres by path."""

    step: jax.Array
    toward: dict[str, jax.Array]


def add_weight_decay(
    rate: Scalar,
    where: Where | None = None,
    *,
    layout: Mapping[str, Axes] | None = None,
    penalty_grad: PenaltyGrad | None = None,
    toward: Any = None,
    cautious: bool = False,
    independent: bool = False,
) -> optax.GradientTransformation:
    """Adds rate·w to the update of every selected weight.

    Its place in the chain says what kind of decay it is:

    - before the optimizer, L2 regularization (SGD, Adam): `chain(add_weight_decay(λ), adam(η))`;
    - after its scaling, decoupled decay (AdamW):
      `chain(scale_by_adam(), add_weight_decay(λ), scale_by_learning_rate(η))`;
    - after the learning rate, decay independent of it: `chain(adam(η), add_weight_decay(λ, independent=True))`. There
      updates are added to the weights, so λ·w is subtracted: w ← w + u − λ·w.

    In 16 bits, η·λ·w is less than half the spacing of w and lost: end the chain with `round_stochastically`.

    In place of w it may be the gradient of another penalty, of the distance from other weights than zero, or one that
    keeps out of the optimizer's way: see `weight_decay`.

    Args:
      rate: the decay λ >= 0: a number, a scalar array, or a schedule of the step. `optax.inject_hyperparams`
        works on it; a function as `where` or `penalty_grad` then has to be named in its `static_args`.
      where: the weights to decay, as for `on_tree`: by default those with two or more axes, embeddings among them, but
        no biases or scales of norms, stacked ones (`nn.scan`) included.
      layout: how a program reads the weights, as in `on_tree`: those in it are the default `where`, so no embeddings.
      penalty_grad: the gradient of the penalty, a function of a weight: `jnp.sign` is L1. By default the weight, L2.
      toward: a tree with the paths and shapes of the selected weights, towards which they decay. With the parameters
        that the optimizer starts from it is L2-SP. `init` copies it to the state.
      cautious: whether to decay only where the optimizer's update does not move the weight away from zero, or from
        `toward`. Stands after the optimizer's scaling.
      independent: whether this stands after the learning rate, where the decay has to be subtracted.

    Returns:
      An optax gradient transformation. Its `update` needs `params`.

    Raises:
      TypeError: `rate` is not a number or schedule, or `penalty_grad` not a function.
      ValueError: `rate` is negative or NaN; (when used) `params` is None, `where` selects nothing, or `toward` lacks
        a selected weight.

    >>> import jax.numpy as jnp, optax
    >>> params = {"w": jnp.array([2.0])}
    >>> tx = optax.chain(add_weight_decay(0.5, where="w"), optax.sgd(0.1))
    >>> updates, _ = tx.update({"w": jnp.array([1.0])}, tx.init(params), params)
    >>> print(updates["w"])
    [-0.2]
    >>> tx = optax.chain(optax.sgd(0.1), add_weight_decay(0.5, where="w", independent=True))
    >>> updates, _ = tx.update({"w": jnp.array([1.0])}, tx.init(params), params)
    >>> print(updates["w"])
    [-1.1]

    References: Loshchilov and Hutter, Decoupled Weight Decay Regularization, arXiv:1711.05101, 2017; Li, Grandvalet and
    Davoine, arXiv:1802.01483, 2018 (L2-SP); Chen et al., arXiv:2510.12402, 2025 (cautious).
    """
    check_scalar("rate", rate, 0, schedule=True)
    check_penalty(penalty_grad)
    check_layout(layout)
    sign = -1 if independent else 1

    def init(params):
        paths, leaves, _ = flatten(params)
        chosen = select(paths, leaves, [(None, None)], where, layout)
        centres = {}
        if toward is not None:
            given = {path: a for path, a in flatten(toward).by_path.items() if is_weight(a)}
            for i in chosen:
                found = f"of shape {given[paths[i]].shape}" if paths[i] in given else "missing"
                if found != f"of shape {leaves[i].shape}":
                    raise ValueError(
                        f"add_weight_decay at {paths[i]!r}: toward is {found} there, the weight of shape "
                        f"{leaves[i].shape}: pass a tree like the parameters, or name other weights in where"
                    )
                centres[paths[i]] = jnp.copy(given[paths[i]])  # or it would be donated twice, with the parameters
        return WeightDecayState(jnp.zeros((), jnp.int32), centres)

    def update(updates, state, params=None):
        check_params("add_weight_decay", params)
        weights, updates = flatten(params), flatten(updates)
        check_structure("add_weight_decay", "updates", updates, weights)
        now = rate(state.step) if callable(rate) else rate
        given, decayed = updates.by_path, {}
        for i in select(weights.paths, weights.leaves, [(None, None)], where, layout):
            path = weights.paths[i]
            if path in given:
                with naming("add_weight_decay", path):
                    decayed[path] = sign * weight_decay(
                        sign * given[path],
                        weights.leaves[i],
                        now,
                        penalty_grad=penalty_grad,
                        toward=state.toward.get(path),
                        cautious=cautious,
                    )
        step = jnp.asarray(optax.safe_increment(state.step))
        return updates.replaced(decayed), WeightDecayState(step, state.toward)

    return optax.GradientTransformation(init, update)
