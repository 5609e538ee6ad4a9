"""muP (maximal update parametrization) on a tree: initial weights and learning rates relative to a base width."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import optax

from jaxweights.core.axes import Axes
from jaxweights.core.checks import naming
from jaxweights.core.inference import infer_axes
from jaxweights.levels.paths import check_layout, check_params, check_structure, flatten, is_weight, select
from jaxweights.techniques.initialization import MupScales, mup


def mup_init(params: Any, base: Any, *, layout: Mapping[str, Axes] | None = None) -> Any:
    """Scales initial weights in the standard parametrization to muP: those of output layers become smaller.

    The other half of muP is the learning rates: see `scale_by_mup`. Whether a weight is an input, hidden or output
    weight follows from comparing its fans with those in a base network of another width and the same depth:

    | | n_in | n_out | initial std | Adam's learning rate | SGD's learning rate |
    | --- | --- | --- | --- | --- | --- |
    | input, embedding, bias, scale | stays | grows | σ | η | η·r_out |
    | hidden | grows | grows | σ/√n_in | η/r_in | η·r_out/r_in |
    | output | grows | stays | σ/√(n_in·r_in) | η/r_in | η/r_in |

    where r = n/n_base, so nothing changes at the width of the base. The variances of `params` must be proportional to
    1/n_in, as for LeCun's and He's initializers and Flax's default for kernels. Xavier's are not, nor is the 1/features
    of `nn.Embed`: pass it `embedding_init=jaxweights.initializers.normal`. Output layers and queries may start at 0.

    Two things are left to the module. Attention must divide q·k by head_dim instead of its square root, unless head_dim
    is fixed and the number of heads grows. An embedding tied to the output layer would have to be input and output at
    once: untie it.

    Args:
      params: any pytree of weights, as returned by the model's `init`.
      base: the tree of the same model at another width, of arrays or shapes: `jax.eval_shape(narrow.init, key, x)`.
      layout: how a program reads the weights of `params`, from `jaxweights.layout`, or {path: Axes} for those whose
        axes do not follow from names and shapes.

    Returns:
      A tree like `params`.

    Raises:
      TypeError: `layout` is not a mapping of `Axes`.
      ValueError: a weight of `params` is not in `base`, or has another rank or number of layers there; or `layout`
        names a path that is not in the tree.

    >>> import jax.numpy as jnp
    >>> def model(width):
    ...     return {"body": jnp.ones((width, width)), "head": jnp.ones((width, 10))}
    >>> new = mup_init(model(256), model(64))
    >>> print(new["body"].mean(), new["head"].mean())
    1.0 0.5

    References: Yang et al., Tensor Programs V: Tuning Large Neural Networks via Zero-Shot Hyperparameter Transfer,
    arXiv:2203.03466, 2022.
    """
    scales = mup_scales("mup_init", params, base, layout)
    tree = flatten(params)
    weights = tree.by_path
    return tree.replaced({path: weights[path] * s.init for path, s in scales.items() if s.init != 1})


def scale_by_mup(
    base: Any, *, adaptive: bool = True, layout: Mapping[str, Axes] | None = None
) -> optax.GradientTransformation:
    """Scales the learning rate of every weight by muP, so that one learning rate fits all widths.

    Multiplies updates by 1/r_in, or with `adaptive=False` by r_out/r_in, where r_in and r_out are the ratios of the
    fans of a weight to its fans in `base`. `mup_init` has the table and makes the initial weights that go with it.

    Put it after the optimizer's own scaling and before weight decay, or wide layers decay less:
    `chain(scale_by_adam(), scale_by_mup(base), add_weight_decay(λ), scale_by_learning_rate(η))`. Without decay,
    `chain(adam(η), scale_by_mup(base))` is enough.

    Args:
      base: the tree of the same model at another width, of arrays or shapes: `jax.eval_shape(narrow.init, key, x)`.
      adaptive: whether the optimizer's updates are invariant to the scale of the gradients. True for Adam, RMSProp,
        Adagrad and Lion, False for SGD with or without momentum.
      layout: how a program reads the weights of `params`, from `jaxweights.layout`, or {path: Axes} for those whose
        axes do not follow from names and shapes.

    Returns:
      An optax gradient transformation without state. Its `update` needs `params`.

    Raises:
      TypeError: `layout` is not a mapping of `Axes`.
      ValueError: (when used) `params` is None, or a weight is not in `base`, or has another rank or number of layers
        there.

    >>> import jax.numpy as jnp, optax
    >>> def model(width):
    ...     return {"body": jnp.ones((width, width)), "bias": jnp.ones(width)}
    >>> tx = optax.chain(optax.sign_sgd(1.0), scale_by_mup(model(64)))
    >>> updates, _ = tx.update(model(256), tx.init(model(256)), model(256))
    >>> print(updates["body"].mean(), updates["bias"].mean())
    -0.25 -1.0

    References: Yang et al., arXiv:2203.03466, 2022.
    """

    def init(params):
        mup_scales("scale_by_mup", params, base, layout)
        return optax.EmptyState()

    def update(updates, state, params=None):
        check_params("scale_by_mup", params)
        updates = flatten(updates)
        check_structure("scale_by_mup", "updates", updates, flatten(params))
        scales = mup_scales("scale_by_mup", params, base, layout)
        given = updates.by_path
        new = {p: given[p] * (s.adam if adaptive else s.sgd) for p, s in scales.items() if p in given}
        return updates.replaced(new), state

    return optax.GradientTransformation(init, update)


def mup_scales(name: str, params: Any, base: Any, layout: Mapping[str, Axes] | None) -> dict[str, MupScales]:
    """The scales of every weight, by path. Errors name the caller, `name`."""
    tree = flatten(params)
    shapes = {path: jnp.shape(a) for path, a in tree.by_path.items() if is_weight(a)}
    base_shapes = {path: tuple(a.shape) for path, a in flatten(base).by_path.items() if hasattr(a, "shape")}
    check_layout(layout)
    layout = {} if layout is None else layout
    for path in layout:
        if path not in shapes:
            raise ValueError(f"layout names {path!r}, which is not in the tree. It has: {', '.join(shapes)}")
    # What a program looks up, adds or scales with is no matrix, whatever its shape.
    vectors = getattr(layout, "skipped", {})
    matrices = {tree.paths[i] for i in select(tree.paths, tree.leaves, [(None, None)])} - vectors.keys()
    inferred = {path: axes for path, axes in (infer_axes(base_shapes) | infer_axes(shapes)).items() if path in matrices}
    readings = inferred | dict(layout)
    scales = {}
    for path, shape in shapes.items():
        if path not in base_shapes:
            raise ValueError(f"{name} at {path!r}: base has no such weight, it has {', '.join(base_shapes) or 'none'}")
        # Biases and scales have outputs but no input.
        default = None if path in matrices else Axes(input=(), output=tuple(range(len(shape))))
        with naming(name, path):
            scales[path] = mup(shape, base_shapes[path], axes=readings.get(path, default))
    return scales
