"""How a model reads its weights, from the products that it makes with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from jaxweights.axes import Axes
from jaxweights.lifts.contractions import check_found, visit_contractions
from jaxweights.lifts.paths import Where


def read_axes(f: Callable[..., Any], params: Any, *args: Any, where: Where | None = None) -> dict[str, Axes]:
    """The axes by which a function multiplies with its weights, by path: certain where shapes alone leave it open.

    A kernel (3, 3, 1, 64) is depthwise or a convolution of a grey image, (12, 64, 64) is a stack or a convolution. The
    traced program tells. Nothing is computed, so arrays may be shapes (`jax.ShapeDtypeStruct`).

    Args:
      f: a function (params, *args) in any library, such as `lambda p, x: model.apply({"params": p}, x)`.
      params: the tree of weights.
      *args: the data.
      where: the weights to look for, as for `on_tree`; by default those of two or more axes, as far as they are
        multiplied by data.

    Returns:
      {path: Axes} in the order of use, which `reinitialize`, `mup_init` and `scale_by_mup` take as `axes`.

    Raises:
      TypeError: `f` is not callable.
      ValueError: `where` selects nothing, or a weight that is not multiplied by data: it is not used, or reshaped or
        sliced before; or no weight at all is; or one is read in two ways.

    >>> import flax.linen as nn, jax, jax.numpy as jnp
    >>> import jaxweights as jw
    >>> model, x = nn.Conv(64, (3, 3), feature_group_count=64), jnp.ones((1, 8, 8, 64))
    >>> params = model.init(jax.random.key(0), x)["params"]
    >>> axes = read_axes(lambda p, x: model.apply({"params": p}, x), params, x)
    >>> jw.fans(params["kernel"].shape), jw.fans(params["kernel"].shape, axes["kernel"])
    ((9, 576), (9, 9))
    """
    if not callable(f):
        raise TypeError(f"f must be a function (params, *args), got {type(f).__name__}: wrap the model in one")
    found: dict[str, Axes] = {}

    def visit(product):
        found[product.path] = product.axes
        return (), product.y

    jax.eval_shape(lambda params, *args: visit_contractions(f, params, *args, visit=visit, where=where), params, *args)
    check_found("read_axes", params, where, found)
    return found
