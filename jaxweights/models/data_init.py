"""Data-dependent initialization: layers scaled by what they give on a batch, each fed by those scaled before it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jaxweights.core.axes import Axes, Reading
from jaxweights.levels.paths import Where, check_layout, flatten
from jaxweights.numerics.dtypes import accumulation_dtype
from jaxweights.numerics.moments import moments
from jaxweights.programs.contractions.contraction import Contraction
from jaxweights.programs.contractions.visit import check_found, visit_contractions


def data_dependent_init(
    f: Callable[..., Any],
    params: Any,
    batch: Any,
    where: Where | None = None,
    *,
    layout: Mapping[str, Axes] | None = None,
    per_unit: bool = True,
) -> Any:
    """Scales and shifts each layer so that every unit of its output has mean 0 and variance 1 on a batch.

    w' = w/σ and b' = −μ/σ, where μ and σ² are the mean and the variance of wᵀx for the unit, and x comes from layers
    that are already initialized so. Layers are found as in `capture`, in the order of use, in a single pass.

    Followed by `WeightNorm`, whose scale starts at ‖w'‖, this is the initialization of weight normalization. With
    orthogonal weights (`reinitialize` with `initializers.orthogonal`) and `per_unit=False` it is LSUV.

    Args:
      f: a function (params, *batch), as in training but without randomness.
      params: the tree of weights, freshly drawn.
      batch: a tuple of the arguments after `params`, or the one argument.
      where: the weights of the layers, as in `on_tree`; by default those with two or more axes that meet data in a
        product. The bias of a layer is the entry `bias` beside its weight. A layer without a bias is only scaled: its
        mean is then not 0.
      layout: the weights in it are the default `where`, and one of them that is not found is an error: see
        `jaxweights.layout`.
      per_unit: if False, scales each layer as a whole to variance 1 and leaves biases unchanged. Each layer of a stack
        is scaled separately.

    Returns:
      A tree like `params`, with its dtypes. A unit whose output is constant on the batch keeps its weights.

    Raises:
      TypeError: `f` is not callable.
      ValueError: `where` selects nothing, or a weight that is not multiplied by data; a weight is used more than once
        and so has no single scale (not detected under an outer `jit`); or a bias is not one per unit.

    >>> import jax, jax.numpy as jnp
    >>> params = {"kernel": jnp.array([[3.0, 0.1]]), "bias": jnp.zeros(2)}
    >>> dense = lambda params, x: x @ params["kernel"] + params["bias"]
    >>> x = jnp.array([[1.0], [3.0]])
    >>> print(dense(data_dependent_init(dense, params, x), x).round(3))
    [[-1. -1.]
     [ 1.  1.]]

    References: Salimans and Kingma, Weight Normalization, arXiv:1602.07868, 2016, section 3; Krähenbühl, Doersch,
    Donahue and Darrell, Data-dependent Initializations of Convolutional Neural Networks, arXiv:1511.06856, 2015;
    Mishkin and Matas, All you need is a good init, arXiv:1511.06422, 2015, for LSUV.
    """
    if not callable(f):
        raise TypeError(f"f must be a function (params, *batch), got {type(f).__name__}: wrap the model in one")
    check_layout(layout)
    if where is None and layout is not None:
        where = functools.partial(_is_in, layout)
    batch = batch if isinstance(batch, tuple) else (batch,)
    paths, leaves, treedef = flatten(params)
    position = {path: i for i, path in enumerate(paths)}

    def found(shifted, leaves):
        visit = functools.partial(_standardize, shifted=shifted, per_unit=per_unit)
        _, scalings = visit_contractions(f, treedef.unflatten(leaves), *batch, visit=visit, where=where)
        return scalings

    scalings = jax.eval_shape(lambda leaves: found({}, leaves), leaves)
    check_found("data_dependent_init", f, params, batch, where, scalings)
    biases = {}
    if per_unit:
        biases = {path: position[b] for path in scalings if (b := _bias(path)) in position}
    for path, i in biases.items():
        _check_bias(path, scalings[path].axes, leaves[position[path]].shape, paths[i], leaves[i].shape)
    start = [jnp.zeros_like(a) if i in biases.values() else a for i, a in enumerate(leaves)]
    for path, s in jax.jit(functools.partial(found, biases))(start).items():
        if not isinstance(s.uses, Tracer) and (s.uses > 1).any():
            raise ValueError(f"the weight {path!r} is used {s.uses.max()} times: leave it out of `where`")
        w = leaves[position[path]]
        r = Reading.of(s.axes, w.shape)
        leaves[position[path]] = (w.astype(accumulation_dtype(w.dtype)) * r.spread(s.factor)).astype(w.dtype)
        if path in biases:
            old = leaves[biases[path]]
            leaves[biases[path]] = jnp.squeeze(r.spread(s.shift), r.contracted).astype(old.dtype)
    return treedef.unflatten(leaves)


def _is_in(layout: Mapping[str, Axes], path: str, w: Any) -> bool:
    return path in layout


_ROUNDING = 16
"""A deviation of fewer units in the last place of the mean is that of rounding."""


@functools.partial(jax.tree_util.register_dataclass, data_fields=["factor", "shift", "uses"], meta_fields=["axes"])
@dataclasses.dataclass(frozen=True)
class _Scaling:
    """What standardizes the outputs of a layer: y·factor + shift, each of shape (*batch, *output) of the weight."""

    factor: jax.Array
    shift: jax.Array
    uses: jax.Array
    axes: Axes


def _standardize(product: Contraction, shifted: Mapping[str, Any], per_unit: bool) -> tuple[_Scaling, jax.Array]:
    """The scaling of one layer, and its product with that scaling."""
    if product.outputs is None:
        raise ValueError(f"each product with {product.path!r} has only some of its units: leave it out of `where`")
    outputs = product.outputs
    y = outputs(product.y)
    grouped = product.axes.groups > 1
    lead, units = ((), y.batch + y.features) if grouped else (y.batch, y.features)
    mean, var, _ = moments(y.array, y.samples if per_unit else y.samples + units)
    constant = var <= jnp.square(_ROUNDING * jnp.finfo(var.dtype).eps * mean)
    factor = jnp.where(constant, 1, jax.lax.rsqrt(jnp.where(constant, 1, var)))
    shift = -mean * factor if product.path in shifted else jnp.zeros_like(mean)
    # `outputs` only moves entries about, so its transpose moves them back.
    new = (y.array.astype(factor.dtype) * factor + shift).astype(product.y.dtype)
    (new,) = jax.linear_transpose(lambda a: outputs(a).array, product.y)(new)

    def each(value: jax.Array) -> jax.Array:
        """With the shape (*batch, *output) of the weight."""
        shape = [1 if a in y.samples else n for a, n in enumerate(y.array.shape)]
        value = jnp.transpose(jnp.broadcast_to(value, shape), (*lead, *units, *y.samples))
        value = value.reshape(value.shape[: len(lead + units)])
        return value.reshape(-1) if grouped else value

    return _Scaling(each(factor), each(shift), jnp.ones([y.array.shape[a] for a in lead], jnp.int32), product.axes), new


def _bias(weight: str) -> str:
    """The path of the bias beside a weight."""
    parent = weight.rpartition("/")[0]
    return f"{parent}/bias" if parent else "bias"


def _check_bias(path: str, axes: Axes, shape: tuple[int, ...], bias_path: str, bias: tuple[int, ...]) -> None:
    """Raises unless the bias has one entry per unit, in the order that the weight has them."""
    r = Reading.of(axes, shape)
    units = tuple(n for a, n in enumerate(shape) if a not in r.contracted)
    # A stack along an axis in the middle of the weight has it at another place in the bias.
    first, last = range(len(r.batch)), range(len(shape) - len(r.batch), len(shape))
    if bias != units or sorted(r.batch) not in (list(first), list(last)):
        raise ValueError(
            f"{bias_path!r} {bias} does not have the units of {path!r} {shape}, read as {axes}: leave it out of `where`"
        )
