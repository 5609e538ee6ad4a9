"""The learning rates of muP."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import optax

from jaxweights.axes import Axes
from jaxweights.lifts.mup import mup_scales
from jaxweights.lifts.paths import check_params, check_structure, flatten


def scale_by_mup(
    base: Any, *, adaptive: bool = True, axes: Mapping[str, Axes] | None = None
) -> optax.GradientTransformation:
    """Scales the update of every weight as muP has it, so that one learning rate suits all widths.

    Multiplies by 1/r_in, or with `adaptive=False` by r_out/r_in, where r_in and r_out are the ratios of the fans of a
    weight to those it has in `base`. `mup_init` has the table, and makes the initial weights that go with it.

    Its place is behind the optimizer's scaling:
    `chain(scale_by_adam(), scale_by_mup(base), add_weight_decay(λ), scale_by_learning_rate(η))`. With the decay before
    it, wide layers would decay less. `chain(adam(η), scale_by_mup(base))` is the same without decay.

    Args:
      base: the tree of the same model at another width, arrays or shapes: `jax.eval_shape(narrow.init, key, x)`.
      adaptive: whether the size of updates does not depend on that of the gradients: so for Adam, RMSProp, Adagrad,
        Lion, not so for SGD with or without momentum.
      axes: {path: Axes} for kernels whose reading does not follow from the tree; `read_axes` has it from the model.

    Returns:
      An optax gradient transformation without state. Its `update` needs `params`.

    Raises:
      TypeError: `axes` is not a dict.
      ValueError: (when used) `params` is None, or a weight is not in `base`, or has another rank or number of layers
        there.

    >>> import jax.numpy as jnp, optax
    >>> model = lambda width: {"body": jnp.ones((width, width)), "bias": jnp.ones(width)}
    >>> tx = optax.chain(optax.sign_sgd(1.0), scale_by_mup(model(64)))
    >>> updates, _ = tx.update(model(256), tx.init(model(256)), model(256))
    >>> print(updates["body"].mean(), updates["bias"].mean())
    -0.25 -1.0

    References: Yang et al., arXiv:2203.03466, 2022.
    """

    def init(params):
        mup_scales("scale_by_mup", params, base, axes)
        return optax.EmptyState()

    def update(updates, state, params=None):
        check_params("scale_by_mup", params)
        check_structure("scale_by_mup", "updates", updates, params)
        scales = mup_scales("scale_by_mup", params, base, axes)
        paths, leaves, treedef = flatten(updates)
        factor = lambda path: scales[path].adam if adaptive else scales[path].sgd
        new = [u * factor(p) if p in scales else u for p, u in zip(paths, leaves, strict=True)]
        return jax.tree_util.tree_unflatten(treedef, new), state

    return optax.GradientTransformation(init, update)
