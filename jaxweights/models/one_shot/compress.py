"""One-shot methods on a model: capture and fit in one call."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from jaxweights.levels.paths import Where, flatten
from jaxweights.models.capture import capture
from jaxweights.models.layout import layout
from jaxweights.models.one_shot.one_shot import Methods, chosen_methods, fit_each
from jaxweights.models.one_shot.sequential import fit_in_sequence
from jaxweights.models.stored import densify
from jaxweights.programs.contractions.visit import check_found


def compress(
    f: Callable[..., Any],
    params: Any,
    batches: Iterable[Any],
    method: Methods | Mapping[str, Methods],
    where: Where | None = None,
    *,
    sequential: bool = False,
    progress: bool = False,
) -> Any:
    """Prunes or stores the weights of a model, with statistics of what they are multiplied by on batches of data.

    It is `capture`, then `one_shot`: all statistics are those of the model as it is. With `sequential=True`, layer
    after layer is fitted to what the new layers before it feed it, as the authors of SparseGPT and GPTQ do.

    Beside the methods, it costs one run of the model over the data, which `sequential=True` does part by part: the
    activations between two parts are in memory for all batches, a loop over a stack of layers is written out, and each
    part is compiled twice, but once for all layers that are alike.

    Args:
      f: a function (params, *batch), as in evaluation.
      params: the tree of weights.
      batches: an iterable of batches: a tuple of the arguments after `params`, or the one argument.
      method: one of `jaxweights.methods`; several, to be applied in order, as in (SparseGPT((2, 4)), Pack()); or rules
        {glob: method}. The first rule that matches a path applies.
      where: the weights to take, as in `on_tree`. By default those of two or more axes that meet data in a product;
        with rules, those that they match.
      sequential: whether to calibrate each layer on the outputs of the layers already done. Weights that meet the same
        stage of the data, such as query, key and value, are fitted together. A weight that is used several times is
        fitted where it is used last.
      progress: whether to show a bar.

    Returns:
      The tree with the new weights. All other leaves are those of `params`.

    Raises:
      TypeError: `f` is not callable, `batches` not iterable, or `method` not a method.
      ValueError: there are no batches, a glob or `where` selects nothing, or a method needs statistics of a weight that
        is not multiplied by data.

    >>> import jax.numpy as jnp
    >>> import jaxweights as jw
    >>> params = {"up": jnp.array([[1.0, 2.0], [3.0, 4.0]]), "down": jnp.array([[1.0], [2.0]])}
    >>> mlp = lambda params, x: jnp.maximum(x @ params["up"], 0) @ params["down"]
    >>> new = compress(mlp, params, [jnp.array([[1.0, 0.2], [2.0, 0.1]])], jw.methods.Wanda(0.5))
    >>> print(new["up"], new["down"].ravel())
    [[1. 2.]
     [0. 0.]] [0. 2.]

    References: Frantar and Alistarh, SparseGPT, arXiv:2301.00774, 2023; Frantar, Ashkboos, Hoefler and Alistarh, GPTQ,
    arXiv:2210.17323, 2022.
    """
    if not isinstance(batches, Iterable) or isinstance(batches, jax.Array | np.ndarray | str | dict):
        raise TypeError(f"batches must be an iterable of batches, got {type(batches).__name__}: write [batch]")
    given = (batch if isinstance(batch, tuple) else (batch,) for batch in batches)
    first = next(given, None)
    if first is None:
        raise ValueError("batches is empty: give at least one batch")
    axes, tree = layout(f, params, *first), flatten(params)
    by_path = tree.by_path
    matrices = [path for path in axes if len(by_path[path].shape) >= 2]
    chosen = chosen_methods(tree, method, where, matrices)
    needs = {path: frozenset().union(*(m.needs for m in methods)) for path, methods in chosen.items()}
    second_moment = any("second_moment" in names for names in needs.values())
    fed = {path: methods for path, methods in chosen.items() if needs[path]}
    new = fit_each(by_path, {path: m for path, m in chosen.items() if path not in fed}, {}, axes, progress=progress)
    if not fed:
        return tree.replaced(new)

    def wanted(path: str, w: jax.Array) -> bool:
        return path in fed

    rest, asked = itertools.chain([first], given), where is not None or isinstance(method, Mapping)
    if sequential:
        check_found("compress", f, params, first, wanted if asked else None, axes)
        before = tree.replaced(densify(new))
        options = {"second_moment": second_moment, "asked": asked, "progress": progress}
        return tree.replaced(new | fit_in_sequence(f, before, rest, fed, **options))
    stats = capture(f, params, rest, wanted if asked else None, second_moment=second_moment, progress=progress)
    if asked and (missed := [path for path in fed if path not in stats]):
        raise ValueError(f"compress has no statistics of {missed[0]!r}: it is not multiplied by data, so leave it out")
    fed = {path: methods for path, methods in fed.items() if path in stats}
    return tree.replaced(new | fit_each(by_path, fed, stats, axes, progress=progress))
