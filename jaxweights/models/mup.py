"""muP on a tree: initial weights, and the learning rate of every weight, from those of a narrower model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxweights.core.axes import Axes, infer_axes
from jaxweights.core.checks import naming
from jaxweights.levels.paths import check_params, check_structure, flatten, is_weight, select
from jaxweights.techniques.initialization import MupScales, mup


def mup_init(params: Any, base: Any, *, axes: Mapping[str, Axes] | None = None) -> Any:
    """Initial weights under muP, from those of the standard parametrization: output layers become smaller.

    The other half of muP are the learning rates, `scale_by_mup`. What a weight is follows from its fans against those
    in a narrower network of as many layers:

    | | n_in | n_out | initial std | Adam's learning rate | SGD's learning rate |
    | --- | --- | --- | --- | --- | --- |
    | input, embedding, bias, scale | stays | grows | σ | η | η·r_out |
    | hidden | grows | grows | σ/√n_in | η/r_in | η·r_out/r_in |
    | output | grows | stays | σ/√(n_in·r_in) | η/r_in | η/r_in |

    where r = n/n_base: at the width of the base all is as it was. The variances of `params` must be in proportion to
    1/n_in, as LeCun's, He's and Flax's own for kernels are. Not so are Xavier's and that of `nn.Embed`, 1/features:
    give it `embedding_init=jaxweights.initializers.normal`. Output layers and queries may also start at 0.

    Two things are the module's to do. Attention must divide q·k by head_dim, not by its root, unless head_dim stays and
    the number of heads grows. An embedding that is tied to the output layer cannot be both input and output: untie it.

    Args:
      params: any pytree of weights, as the model's `init` gives it.
      base: the tree of the same model at another width, arrays or shapes: `jax.eval_shape(narrow.init, key, x)`.
      axes: {path: Axes} for kernels whose reading does not follow from the tree.

    Returns:
      A tree like `params`.

    Raises:
      TypeError: `axes` is not a dict.
      ValueError: a weight of `params` is not in `base`, or has another rank or number of layers there; or `axes` names
        a path that is not in the tree.

    >>> import jax.numpy as jnp
    >>> model = lambda width: {"body": jnp.ones((width, width)), "head": jnp.ones((width, 10))}
    >>> new = mup_init(model(256), model(64))
    >>> print(new["body"].mean(), new["head"].mean())
    1.0 0.5

    References: Yang et al., Tensor Programs V: Tuning Large Neural Networks via Zero-Shot Hyperparameter Transfer,
    arXiv:2203.03466, 2022.
    """
    scales = mup_scales("mup_init", params, base, axes)
    paths, leaves, treedef = flatten(params)
    new = [
        a if p not in scales or scales[p].init == 1 else a * scales[p].init for p, a in zip(paths, leaves, strict=True)
    ]
    return jax.tree_util.tree_unflatten(treedef, new)


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
      axes: {path: Axes} for kernels whose reading does not follow from the tree.

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


def mup_scales(name: str, params: Any, base: Any, axes: Mapping[str, Axes] | None) -> dict[str, MupScales]:
    """The scales of every weight, by path; `name` is that of the function that asks, for errors."""
    paths, leaves, _ = flatten(params)
    weights = {p: jnp.shape(a) for p, a in zip(paths, leaves, strict=True) if is_weight(a)}
    base_shapes = {p: tuple(a.shape) for p, a in zip(*flatten(base)[:2], strict=True) if hasattr(a, "shape")}
    given = {} if axes is None else axes
    if not isinstance(given, Mapping):
        raise TypeError(f"axes must be a dict {{path: Axes}}, got {given!r}")
    for path in given:
        if path not in weights:
            raise ValueError(f"axes names {path!r}, which is not in the tree. It has: {', '.join(weights)}")
    matrices = {paths[i] for i in select(paths, leaves, [(None, None)])}
    inferred = infer_axes(base_shapes) | infer_axes(weights) | dict(given)
    scales = {}
    for path, shape in weights.items():
        if path not in base_shapes:
            raise ValueError(f"{name} at {path!r}: base has no such weight, it has {', '.join(base_shapes) or 'none'}")
        # A bias or a scale: outputs without input.
        vector = Axes(input=(), output=tuple(range(len(shape))))
        with naming(name, path):
            scales[path] = mup(shape, base_shapes[path], axes=inferred.get(path, None if path in matrices else vector))
    return scales
