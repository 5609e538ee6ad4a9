"""Folding all batch norms of an NNX model into the layers before them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import jax
from flax import nnx

from jaxweights.core.axes import Axes
from jaxweights.core.checks import naming
from jaxweights.levels.nnx.batch_norm import BatchNorm
from jaxweights.models.fold_batch_norm import check_layers, fold_layer

M = TypeVar("M", bound=nnx.Module)


class Identity(nnx.Module):
    """Takes the place of a batch norm that was folded into another layer."""

    def __call__(self, x: jax.Array, *args, **kwargs) -> jax.Array:
        """Returns `x`."""
        return x


def fold_batch_norms(model: M, layers: Mapping[str, str], *, axes: Mapping[str, Axes] | None = None) -> M:
    """Folds every batch norm of a model into the layer before it; the result computes what `model` does in evaluation.

    Args:
      model: an NNX module with batch norms, Flax's or ours. It is not modified.
      layers: {path of the batch norm: path of the layer whose output it normalises}, for every batch norm.
      axes: {path of the layer: Axes} for kernels that are not (..., in, out).

    Returns:
      A copy of `model` with `Identity` in place of the batch norms and a bias in every layer of `layers`.

    Raises:
      TypeError: `layers` or `axes` is not a dict.
      ValueError: a path is not in the model, `layers` leaves out a batch norm, two batch norms share a layer, or the
        numbers of features differ.

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
    check_layers(layers, axes or {}, norms, kernels)
    for norm, path in layers.items():
        layer, old = modules[path], norms[norm]
        arrays = _arrays(layer, "kernel", "bias"), _arrays(old, "scale", "bias"), _arrays(old, "mean", "var")
        with naming("fold_batch_norms", norm):
            folded = fold_layer(*arrays, old.epsilon, (axes or {}).get(path))
        layer.kernel[...] = folded["kernel"]
        layer.bias = nnx.Param(folded["bias"])
        if hasattr(layer, "use_bias"):
            layer.use_bias = True
        parent_path, _, name = norm.rpartition("/")
        parent = modules[parent_path]
        if isinstance(parent, nnx.List):
            parent[int(name)] = Identity()
        else:
            setattr(parent, name, Identity())
    return model


def _arrays(module: nnx.Module, *names: str) -> dict[str, jax.Array]:
    """The arrays of the named parameters, without those that the module does not have."""
    return {name: getattr(module, name)[...] for name in names if getattr(module, name, None) is not None}
