"""One-shot methods on a tree of weights, with statistics at hand."""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

from jaxweights.core.axes import Axes
from jaxweights.core.calibration import InputStats
from jaxweights.core.guesses import warn
from jaxweights.core.inference import infer_axes
from jaxweights.core.method import Method, method_rules
from jaxweights.levels.paths import FlatTree, Where, check_layout, flatten, is_weight, select
from jaxweights.models.one_shot.fit import fit
from jaxweights.models.progress import shown

Methods = Method | Sequence[Method]
"""A method, or several that are applied one after the other."""


def one_shot(
    params: Any,
    method: Methods | Mapping[str, Methods],
    stats: Mapping[str, InputStats] | None = None,
    *,
    where: Where | None = None,
    layout: Mapping[str, Axes] | None = None,
    progress: bool = False,
) -> Any:
    """Prunes or stores the weights of a tree, each once and on its own, with statistics of what it is multiplied by.

    w' = method.fit(w, stats of w). One weight is worked on at a time, so beside the two trees there is memory for one
    weight and its statistics; weights of one shape and reading share one compiled program. `compress` captures the
    statistics too.

    Args:
      params: the tree of weights.
      method: one of `jaxweights.methods`; several, to be applied in order, as in (Wanda((2, 4)), Pack()); or rules
        {glob: method}. The first rule that matches a path applies.
      stats: {path: InputStats} that `capture` returned. Methods such as `Magnitude` do without. Each weight's are read
        when its turn comes, so the mapping may load them.
      where: the weights to take, as in `on_tree`. By default those with statistics, else those in the layout; with
        rules, those that they match.
      layout: how a program reads the weights, from `jaxweights.layout`, or a dict {path: Axes}: for weights without
        statistics. Without it, their axes follow from names and shapes.
      progress: whether to show a bar.

    Returns:
      The tree with the new weights. All other leaves are those of `params`.

    Raises:
      AxesWarning: once a weight, if names and shapes do not tell its axes and the method depends on them.
      TypeError: `method` is not a method, or `layout` not a mapping of `Axes`.
      ValueError: a glob or `where` selects nothing, `stats` has a path that the tree does not have, or a method lacks
        the statistics that it needs. The error names the path.

    >>> import jax.numpy as jnp
    >>> import jaxweights as jw
    >>> params = {"kernel": jnp.array([[3.0], [2.0], [1.0], [4.0]]), "bias": jnp.zeros(1)}
    >>> dense = lambda params, x: x @ params["kernel"] + params["bias"]
    >>> stats = jw.capture(dense, params, [jnp.array([[1.0, 5.0, 9.0, 1.0]])])
    >>> print(one_shot(params, jw.methods.Wanda((2, 4)), stats)["kernel"].ravel())
    [0. 2. 1. 0.]
    >>> print(one_shot(params, (jw.methods.Magnitude((2, 4)), jw.methods.Pack()))["kernel"].values.ravel())
    [3. 4.]
    """
    check_layout(layout)
    tree = flatten(params)
    by_path = tree.by_path
    if stats is not None and (strange := [path for path in stats if path not in by_path]):
        raise ValueError(f"stats has {strange[0]!r}, which params does not: capture them with this tree")
    chosen = chosen_methods(tree, method, where, layout if stats is None else stats)
    shapes = {path: tuple(a.shape) for path, a in by_path.items() if is_weight(a)}
    known = {*(stats or ()), *(layout or ())}
    guessed = {path: methods for path, methods in chosen.items() if path not in known}
    warn({path: methods[0].tells_apart for path, methods in guessed.items()}, shapes)
    axes = infer_axes(shapes) | dict(layout or {})
    return tree.replaced(fit_each(by_path, chosen, stats or {}, axes, progress=progress))


def chosen_methods(
    tree: FlatTree,
    method: Methods | Mapping[str, Methods],
    where: Where | None,
    layout: Container[str] | None,
) -> dict[str, tuple[Method, ...]]:
    """The methods of each selected weight, by path. `layout` has the weights that a lone method takes by default."""
    if isinstance(where, Iterable) and not isinstance(where, str):
        where = tuple(where)
    chosen = select(tree.paths, tree.leaves, method_rules(method), where, layout)
    return {tree.paths[i]: chosen[i] for i in sorted(chosen)}


def fit_each(
    weights: Mapping[str, Any],
    methods: Mapping[str, Sequence[Method]],
    stats: Mapping[str, InputStats],
    axes: Mapping[str, Axes],
    *,
    progress: bool,
) -> dict[str, Any]:
    """The new weights by path. Where statistics have no axes, `axes` has them."""
    new = {}
    for path, of_path in shown(methods.items(), "fit", progress):
        known = stats[path] if path in stats else InputStats()
        if known.axes is None:
            known = dataclasses.replace(known, axes=axes.get(path))
        new[path] = fit(of_path, path, weights[path], known)
    return new
