"""Folding all batch norms of an NNX model into the layers around them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from flax import nnx

from jaxweights.core.axes import CONV_TRANSPOSE_KERNEL, Axes
from jaxweights.core.checks import naming
from jaxweights.levels.nnx.batch_norm import BatchNorm
from jaxweights.levels.paths import check_layout
from jaxweights.models.fold_batch_norm import check_folds, fold_layer
from jaxweights.models.norm_folds import norm_folds as norm_folds_of_function
from jaxweights.programs.norms.folds import Fold

M = TypeVar("M", bound=nnx.Module)


class Identity(nnx.Module):
    """Takes the place of a batch norm that was folded into another layer."""

    def __call__(self, x: jax.Array, *args, **kwargs) -> jax.Array:
        """Returns `x`."""
        return x


def norm_folds(model: nnx.Module, *args: Any, call: Callable[..., Any] | None = None, **kwargs: Any) -> dict[str, Fold]:
    """Reads off an NNX model which layer each of its batch norms can be folded into: `jaxweights.norm_folds` of it.

    Args:
      model: an NNX module. It stays as it is, and is read as it evaluates, also in training mode.
      *args: the data: arguments of the call, arrays or `jax.ShapeDtypeStruct`.
      call: what to run, (model, *args, **kwargs); by default the model's own call.
      **kwargs: keyword arguments of the call.

    Returns:
      {path of the batch norm: `Fold`}.

    Raises:
      TypeError: `model` is not an NNX module.

    >>> from flax import nnx
    >>> import jax.numpy as jnp
    >>> rngs = nnx.Rngs(0)
    >>> model = nnx.Sequential(nnx.Linear(3, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs), nnx.relu)
    >>> print({norm: fold.layer for norm, fold in norm_folds(model, jnp.ones((5, 3))).items()})
    {'layers/1': 'layers/0'}
    """
    if not isinstance(model, nnx.Module):
        raise TypeError(f"model must be an nnx.Module, got {model!r}: Linen has linen.norm_folds")
    graph, params, stats, rest = nnx.split(_evaluating(model), nnx.Param, nnx.BatchStat, ...)

    def apply(params: Any, stats: Any, rest: Any, *args: Any, **kwargs: Any) -> Any:
        merged = nnx.merge(graph, params, stats, rest, copy=True)
        return call(merged, *args, **kwargs) if call else merged(*args, **kwargs)

    return norm_folds_of_function(apply, params, stats, rest, *args, **kwargs)


def _evaluating(model: M) -> M:
    """A copy in evaluation mode."""
    model = nnx.clone(model)
    model.eval()
    return model


def fold_batch_norms(
    model: M,
    layers: Mapping[str, str | Fold],
    *,
    axes: Mapping[str, Axes] | None = None,
    layout: Mapping[str, Axes] | None = None,
    keep_norms: bool = False,
) -> M:
    """Folds every batch norm of a model into a layer next to it; the result computes what `model` does in evaluation.

    Args:
      model: an NNX module with batch norms, Flax's or ours. It is not modified.
      layers: {path of the batch norm: where it is folded}, for every batch norm: what `norm_folds` reads off the model;
        or, where nothing lies between, the path of the layer whose output it normalises; or a `Fold`.
      axes: {path of the layer: Axes} for kernels that are not (..., in, out), other than those of a `ConvTranspose`.
      layout: the same as {path of the kernel: Axes}, as `layout` reads them off the model.
      keep_norms: whether batch norms stay, with mean 0, variance 1 - ε, scale 1 and bias 0, which change nothing. A
        norm that `layers` leaves out stays as it is.

    Returns:
      A copy of `model` with `Identity` in place of the batch norms and a bias in every layer of `layers`.

    Raises:
      TypeError: `layers`, `axes` or `layout` is not a dict.
      ValueError: a path is not in the model, `layers` leaves out a batch norm or has no layer for it, two batch norms
        are folded into a layer from one side, the numbers of features differ, or a norm is to be folded into a
        convolution after it that pads its input with zeros.

    >>> from flax import nnx
    >>> model = nnx.Sequential(nnx.Linear(3, 4, use_bias=False, rngs=nnx.Rngs(0)), nnx.BatchNorm(4, rngs=nnx.Rngs(0)))
    >>> print(fold_batch_norms(model, {"layers/1": "layers/0"}).layers[0].bias.shape)
    (4,)
    """
    model = nnx.clone(model)
    nodes = nnx.iter_graph(model)
    modules: dict[str, Any] = {"/".join(map(str, path)): m for path, m in nodes if isinstance(m, nnx.Module)}
    norms = {path: m for path, m in modules.items() if isinstance(m, BatchNorm | nnx.BatchNorm)}
    kernels = [path for path, m in modules.items() if isinstance(getattr(m, "kernel", None), nnx.Variable)]
    check_layout(layout)
    for norm, fold in check_folds(layers, axes or {}, norms, kernels, keep_norms).items():
        path = str(fold.layer)
        layer, old = modules[path], norms[norm]
        own = (
            fold.axes
            or (axes or {}).get(path)
            or (layout or {}).get(f"{path}/kernel")
            or _axes(layer, old.mean.ndim - 1)
        )
        arrays = _arrays(layer, "kernel", "bias"), _arrays(old, "scale", "bias"), _arrays(old, "mean", "var")
        with naming("fold_batch_norms", norm):
            if fold.follows and _pads(layer):
                raise ValueError(f"{path!r}, the layer after it, pads its input with zeros: leave the norm in place")
            folded = fold_layer(*arrays, fold._replace(axes=own), old.epsilon, keep_norms)
        if "bias" in folded.layer and layer.bias is None:
            layer.bias = nnx.Param(folded.layer["bias"])
        _set(layer, folded.layer)
        if hasattr(layer, "use_bias"):
            layer.use_bias = layer.bias is not None
        if keep_norms:
            _set(old, folded.affine | folded.stats)
        else:
            _replace(modules, norm, Identity())
    return model


def _arrays(module: nnx.Module, *names: str) -> dict[str, jax.Array]:
    """The arrays of the named parameters, without those that the module does not have."""
    return {name: getattr(module, name)[...] for name in names if getattr(module, name, None) is not None}


def _set(module: nnx.Module, arrays: Mapping[str, jax.Array]) -> None:
    """New arrays in the parameters of these names."""
    for name, array in arrays.items():
        getattr(module, name)[...] = array


def _replace(modules: Mapping[str, Any], path: str, new: nnx.Module) -> None:
    """Puts another module in the place of the one at this path."""
    parent, _, name = path.rpartition("/")
    if isinstance(modules[parent], nnx.List):
        modules[parent][int(name)] = new
    else:
        setattr(modules[parent], name, new)


def _axes(layer: Any, n_batch: int) -> Axes:
    """How the module reads its kernel, or a stack of modules reads theirs."""
    batch = tuple(range(n_batch))
    if isinstance(layer, nnx.ConvTranspose) and layer.transpose_kernel:
        return dataclasses.replace(CONV_TRANSPOSE_KERNEL, batch=batch)
    return Axes(batch=batch, groups=getattr(layer, "feature_group_count", 1))


def _pads(layer: Any) -> bool:
    """Whether the module puts zeros around its input, or between the entries."""
    padding, sizes = getattr(layer, "padding", "VALID"), getattr(layer, "kernel_size", ())
    if isinstance(layer, nnx.ConvTranspose):
        return max(sizes) > 1 or bool(np.max(layer.strides or 1) > 1)
    if isinstance(padding, str):
        return padding.upper() not in ("VALID", "CIRCULAR", "REFLECT") and max(sizes) > 1
    return bool(np.any(padding))
