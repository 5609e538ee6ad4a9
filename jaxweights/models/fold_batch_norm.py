"""Folding all batch norms of a model into the layers around them."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple, overload

import jax
import jax.numpy as jnp

from jaxweights.core.axes import Axes
from jaxweights.core.checks import naming
from jaxweights.core.guesses import AxesWarning
from jaxweights.levels.paths import check_layout, flatten
from jaxweights.programs.norms.folds import Fold
from jaxweights.techniques.batch_norm import fold_batch_norm

Arrays = Mapping[str, jax.Array]
"""{name: array} of a module."""


@overload
def fold_batch_norms(
    params: Any,
    batch_stats: Any,
    layers: Mapping[str, str | Fold],
    *,
    eps: float | Mapping[str, float] = ...,
    axes: Mapping[str, Axes] | None = ...,
    layout: Mapping[str, Axes] | None = ...,
    keep_norms: Literal[False] = ...,
) -> dict[str, Any]: ...
@overload
def fold_batch_norms(
    params: Any,
    batch_stats: Any,
    layers: Mapping[str, str | Fold],
    *,
    eps: float | Mapping[str, float] = ...,
    axes: Mapping[str, Axes] | None = ...,
    layout: Mapping[str, Axes] | None = ...,
    keep_norms: bool,
) -> Any: ...
def fold_batch_norms(
    params: Any,
    batch_stats: Any,
    layers: Mapping[str, str | Fold],
    *,
    eps: float | Mapping[str, float] = 1e-5,
    axes: Mapping[str, Axes] | None = None,
    layout: Mapping[str, Axes] | None = None,
    keep_norms: bool = False,
) -> Any:
    """Folds every batch norm of a model into the kernel and bias of a layer next to it, as `fold_batch_norm` does.

    The result has the parameters of the same model built without batch norms and with a bias in these layers. That
    model computes what the original one computes in evaluation. With `keep_norms` the original model itself does, on
    new parameters and new statistics.

    Args:
      params: nested dict of parameters, as "params" of Linen variables.
      batch_stats: nested dict of running statistics, "mean" and "var" of each batch norm.
      layers: {path of the batch norm: where it is folded}, for every batch norm: what `norm_folds` reads off the model;
        or, where nothing lies between, the path of the layer whose output it normalises; or a `Fold`.
      eps: ε of the batch norms, 1e-5 by default as in Flax and torch; or {path of the batch norm: ε}. A `Fold` may have
        one of its own.
      axes: {path of the layer: Axes} for kernels that are not (..., in, out). Where the statistics have shape
        (layers, features), the kernel is a stack.
      layout: the same as {path of the kernel: Axes}, as `layout` reads them off the model.
      keep_norms: whether batch norms stay, with mean 0, variance 1 - ε, scale 1 and bias 0, which change nothing: then
        nothing is added to the parameters. A norm behind a layer without a bias keeps what is added. A norm that
        `layers` leaves out stays as it is.

    Returns:
      A nested dict like `params` without the entries of batch norms and with a bias in every layer of `layers`; with
      `keep_norms`, the pair of dicts (params, batch_stats).

    Raises:
      TypeError: `layers`, `axes` or `layout` is not a dict, or an array is not of a floating dtype.
      ValueError: a path is not in the tree, `layers` leaves out a batch norm or has no layer for it, two batch norms
        are folded into a layer from one side, the numbers of features differ, or a batch norm that is kept is to be
        folded into a layer after it that has no bias.

    Warns:
      AxesWarning: a square convolution kernel may be of (*window, in, out) or, as that of
        `ConvTranspose(transpose_kernel=True)`, (*window, out, in), and nothing says which.

    >>> import jax.numpy as jnp
    >>> params = {"conv": {"kernel": jnp.array([[6.0]])}, "norm": {"scale": jnp.ones(1), "bias": jnp.ones(1)}}
    >>> stats = {"norm": {"mean": jnp.array([1.0]), "var": jnp.array([4.0])}}
    >>> print(fold_batch_norms(params, stats, {"norm": "conv"}, eps=0.0))
    {'conv': {'kernel': Array([[3.]], dtype=float32), 'bias': Array([0.5], dtype=float32)}}
    """
    weights, stats = by_parent(params), by_parent(batch_stats)
    norms = [path for path, entry in stats.items() if {"mean", "var"} <= set(entry)]
    kernels = [path for path, entry in weights.items() if "kernel" in entry]
    check_layout(layout)
    folds = check_folds(layers, axes or {}, norms, kernels, keep_norms)
    unsure = []
    for norm, fold in folds.items():
        path = str(fold.layer)
        layer, kernel = weights[path], f"{path}/kernel".removeprefix("/")
        own = fold.axes or (axes or {}).get(path) or (layout or {}).get(kernel)
        if own is None and is_unsure(layer["kernel"], stats[norm]["mean"]):
            unsure.append(path)
        with naming("fold_batch_norms", norm):
            one = _eps(fold, eps, norm)
            folded = fold_layer(layer, weights.get(norm, {}), stats[norm], fold._replace(axes=own), one, keep_norms)
        weights[path] = folded.layer
        weights[norm], stats[norm] = folded.affine, stats[norm] | folded.stats
    if unsure:
        warnings.warn(
            f"fold_batch_norms reads the kernels of {', '.join(unsure)} as (*window, in, out), which is wrong for "
            f"ConvTranspose(transpose_kernel=True): pass what norm_folds reads off the model, or "
            f"axes={{layer: jaxweights.axes.CONV}}, or CONV_TRANSPOSE_KERNEL",
            AxesWarning,
            stacklevel=2,
        )
    return (nested(weights), nested(stats)) if keep_norms else nested(weights)


class Folded(NamedTuple):
    """The arrays of a layer, and those of its batch norm if it stays."""

    layer: dict[str, jax.Array]
    affine: dict[str, jax.Array]
    stats: dict[str, jax.Array]


def fold_layer(layer: Arrays, affine: Arrays, stats: Arrays, fold: Fold, eps: float, keep_norm: bool) -> Folded:
    """A layer with its batch norm folded in, from the arrays of both by name."""
    mean, var = stats["mean"], stats["var"]
    kernel, bias = fold_batch_norm(
        layer["kernel"],
        layer.get("bias"),
        mean=mean,
        var=var,
        scale=affine.get("scale"),
        offset=affine.get("bias"),
        eps=eps,
        axes=fold.axes or Axes(batch=tuple(range(mean.ndim - 1))),
        follows=fold.follows,
    )
    if not keep_norm:
        return Folded({**layer, "kernel": kernel, "bias": bias}, {}, {})
    new = {name: jnp.ones_like(a) if name == "scale" else jnp.zeros_like(a) for name, a in affine.items()}
    # Rounded once, so that adding ε gives exactly 1.
    identity = {"mean": jnp.zeros_like(mean), "var": jnp.ones_like(var) - jnp.asarray(eps, var.dtype)}
    if "bias" in layer:
        return Folded({**layer, "kernel": kernel, "bias": bias}, new, identity)
    if fold.follows:
        raise ValueError(
            f"{fold.layer!r}, the layer after it, has no bias to take the shift: leave it out of layers, or fold "
            f"without keep_norms, which gives it one"
        )
    if "bias" in affine:
        new["bias"] = bias.astype(affine["bias"].dtype)
    else:
        identity["mean"] = -bias.astype(mean.dtype)
    return Folded({**layer, "kernel": kernel}, new, identity)


def is_unsure(kernel: jax.Array, mean: jax.Array) -> bool:
    """Whether a convolution kernel, to be folded with this mean, may be (..., in, out) or (..., out, in)."""
    *window, n_in, n_out = jnp.shape(kernel)
    return len(window) > jnp.ndim(mean) - 1 and n_in == n_out > 1


def check_folds(
    layers: Any, axes: Any, norms: Iterable[str], kernels: Iterable[str], keep_norms: bool
) -> dict[str, Fold]:
    """{norm: fold} of all that are folded; raises unless each has a layer, and a side of it, of its own."""
    for name, value, form in (("layers", layers, "{batch norm: layer}"), ("axes", axes, "{layer: Axes}")):
        if not isinstance(value, Mapping):
            raise TypeError(f"{name} must be a dict {form} of paths, got {type(value).__name__}")
    norms, kernels = list(norms), list(kernels)
    folds: dict[str, Fold] = {}
    seen: dict[tuple[str, bool], str] = {}
    for norm, where in layers.items():
        if not isinstance(where, str | Fold):
            raise TypeError(f"layers must be a dict of paths or Folds, got {where!r} for {norm!r}: see norm_folds")
        fold = Fold(where) if isinstance(where, str) else where
        if norm not in norms:
            raise ValueError(f"layers names {norm!r}, which is not a batch norm. There are: {', '.join(norms)}")
        if fold.layer is None:
            if keep_norms:
                continue
            raise ValueError(
                f"layers has no layer to fold {norm!r} into: {fold.why}. keep_norms=True leaves it in place"
            )
        if fold.layer not in kernels:
            raise ValueError(
                f"layers folds {norm!r} into {fold.layer!r}, which has no kernel. Kernels are at: {', '.join(kernels)}"
            )
        side = fold.layer, fold.follows
        if side in seen:
            raise ValueError(
                f"layers folds both {seen[side]!r} and {norm!r} into {fold.layer!r}: name the layer right before each"
            )
        seen[side], folds[norm] = norm, fold
    left = [norm for norm in norms if norm not in layers]
    if left and not keep_norms:
        raise ValueError(f"layers leaves out the batch norms {', '.join(left)}: name the layer before each")
    for layer in axes:
        if layer not in {fold.layer for fold in folds.values()}:
            into = ", ".join(str(fold.layer) for fold in folds.values())
            raise ValueError(f"axes names {layer!r}, but layers does not. It folds into: {into}")
    return folds


def _eps(fold: Fold, eps: float | Mapping[str, float], norm: str) -> float:
    """The ε of a batch norm."""
    if fold.eps is not None:
        return fold.eps
    if not isinstance(eps, Mapping):
        return eps
    if norm not in eps:
        raise ValueError(f"eps has no entry for it, but for {', '.join(eps)}: give one ε for all, or one for each")
    return eps[norm]


def by_parent(tree: Any) -> dict[str, dict[str, Any]]:
    """{path of a module: {name: leaf}}."""
    modules: dict[str, dict[str, Any]] = {}
    for path, leaf in flatten(tree).by_path.items():
        parent, _, name = path.rpartition("/")
        modules.setdefault(parent, {})[name] = leaf
    return modules


def nested(by_parent: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The nested dict that `by_parent` flattened, without empty modules."""
    tree: dict[str, Any] = {}
    for parent, entry in by_parent.items():
        module = tree
        for name in filter(None, parent.split("/")) if entry else ():
            module = module.setdefault(name, {})
        module |= entry
    return tree
