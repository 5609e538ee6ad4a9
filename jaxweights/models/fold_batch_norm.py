"""Folding all batch norms of a model into the layers before them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jax

from jaxweights.core.axes import Axes
from jaxweights.core.checks import naming
from jaxweights.levels.paths import flatten
from jaxweights.techniques.batch_norm import fold_batch_norm


def fold_batch_norms(
    params: Any,
    batch_stats: Any,
    layers: Mapping[str, str],
    *,
    eps: float = 1e-5,
    axes: Mapping[str, Axes] | None = None,
) -> dict[str, Any]:
    """Folds every batch norm of a model into the kernel and bias of the layer before it, as `fold_batch_norm` does.

    The result has the parameters of the same model built without batch norms and with a bias in these layers. That
    model computes what the original one computes in evaluation.

    Args:
      params: nested dict of parameters, as "params" of Linen variables.
      batch_stats: nested dict of running statistics, "mean" and "var" of each batch norm.
      layers: {path of the batch norm: path of the layer whose output it normalises}, for every batch norm.
      eps: ε of the batch norms, 1e-5 by default as in Flax and torch.
      axes: {path of the layer: Axes} for kernels that are not (..., in, out). Where the statistics have shape
        (layers, features), the kernel is a stack.

    Returns:
      A nested dict like `params` without the entries of batch norms and with a bias in every layer of `layers`.

    Raises:
      TypeError: `layers` or `axes` is not a dict, or an array is not of a floating dtype.
      ValueError: a path is not in the tree, `layers` leaves out a batch norm, two batch norms share a layer, or the
        numbers of features differ.

    >>> import jax.numpy as jnp
    >>> params = {"conv": {"kernel": jnp.array([[6.0]])}, "norm": {"scale": jnp.ones(1), "bias": jnp.ones(1)}}
    >>> stats = {"norm": {"mean": jnp.array([1.0]), "var": jnp.array([4.0])}}
    >>> print(fold_batch_norms(params, stats, {"norm": "conv"}, eps=0.0))
    {'conv': {'kernel': Array([[3.]], dtype=float32), 'bias': Array([0.5], dtype=float32)}}
    """
    weights, stats = _by_parent(params), _by_parent(batch_stats)
    norms = [path for path, entry in stats.items() if {"mean", "var"} <= set(entry)]
    kernels = [path for path, entry in weights.items() if "kernel" in entry]
    check_layers(layers, axes or {}, norms, kernels)
    for norm, layer in layers.items():
        affine = weights.pop(norm, {})
        with naming("fold_batch_norms", norm):
            weights[layer] |= fold_layer(weights[layer], affine, stats[norm], eps, (axes or {}).get(layer))
    return _nested(weights)


def fold_layer(layer: Mapping, affine: Mapping, stats: Mapping, eps, axes: Axes | None) -> dict[str, jax.Array]:
    """{"kernel", "bias"} of a layer with its batch norm folded in; each argument is {name: array}."""
    kernel, bias = fold_batch_norm(
        layer["kernel"],
        layer.get("bias"),
        mean=stats["mean"],
        var=stats["var"],
        scale=affine.get("scale"),
        offset=affine.get("bias"),
        eps=eps,
        axes=axes or Axes(batch=tuple(range(stats["mean"].ndim - 1))),
    )
    return {"kernel": kernel, "bias": bias}


def check_layers(layers: Any, axes: Any, norms: Iterable[str], kernels: Iterable[str]) -> None:
    """Raises unless `layers` pairs every batch norm with a layer of its own."""
    for name, value, form in (("layers", layers, "{batch norm: layer}"), ("axes", axes, "{layer: Axes}")):
        if not isinstance(value, Mapping):
            raise TypeError(f"{name} must be a dict {form} of paths, got {type(value).__name__}")
    norms, kernels = list(norms), list(kernels)
    seen: dict[str, str] = {}
    for norm, layer in layers.items():
        if norm not in norms:
            raise ValueError(f"layers names {norm!r}, which is not a batch norm. There are: {', '.join(norms)}")
        if layer not in kernels:
            raise ValueError(
                f"layers folds {norm!r} into {layer!r}, which has no kernel. Kernels are at: {', '.join(kernels)}"
            )
        if layer in seen:
            raise ValueError(
                f"layers folds both {seen[layer]!r} and {norm!r} into {layer!r}: name the layer right before each"
            )
        seen[layer] = norm
    left = [norm for norm in norms if norm not in layers]
    if left:
        raise ValueError(f"layers leaves out the batch norms {', '.join(left)}: name the layer before each")
    for layer in axes:
        if layer not in seen:
            raise ValueError(f"axes names {layer!r}, but layers does not. It folds into: {', '.join(seen)}")


def _by_parent(tree: Any) -> dict[str, dict[str, Any]]:
    """{path of a module: {name: leaf}}."""
    modules: dict[str, dict[str, Any]] = {}
    for path, leaf in flatten(tree).by_path.items():
        parent, _, name = path.rpartition("/")
        modules.setdefault(parent, {})[name] = leaf
    return modules


def _nested(by_parent: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The nested dict that `_by_parent` flattened."""
    tree: dict[str, Any] = {}
    for parent, entry in by_parent.items():
        module = tree
        for name in filter(None, parent.split("/")):
            module = module.setdefault(name, {})
        module |= entry
    return tree
