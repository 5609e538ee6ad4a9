"""Where a function multiplies by its weights: every product of a weight and an activation, found in the traced program.

A layer is where a weight meets an activation, in a product of matrices or in a convolution. That is plain to see in the
program that JAX traces, whatever library the model is written in, and it says more than the weight's shape: which axes
are summed over. A loop over a stack of layers has what is found in each along a leading axis; what one weight meets
in several places, or in each step of a loop that shares it, is added.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxweights.core.axes import Axes
from jaxweights.levels.paths import Where, flatten, select
from jaxweights.programs.contractions.found import Found, Use
from jaxweights.programs.contractions.walk import ContractionWalk, Marked, Origin, Visit
from jaxweights.programs.contractions.weight import Weight


def visit_contractions(
    f: Callable[..., Any], params: Any, *args: Any, visit: Visit, where: Where | None = None
) -> tuple[Any, Found[str]]:
    """f(params, *args) with a visit to every product of a weight and what depends on `args`.

    Pure: it may be jitted, and differentiated where `visit` may. A weight that is cast, masked, scaled, quantized or
    transposed on the way is still that weight, and so is one whose window is flipped. Out of reach are weights that are
    reshaped or sliced before they are used, and those in a `while_loop`.

    Args:
      f: a function of a tree of weights and of arguments.
      params: the tree.
      *args: pytrees of arrays, the data.
      visit: contraction -> (value, y). The value is a pytree of arrays, whose leading axes are the batch axes of the
        weight, if any; y takes the place of the product in the rest of the computation.
      where: the weights to look for, as for `on_tree`.

    Returns:
      (f's value, {path: value}) in the order of use, which the dict keeps under `jit`. Values of one path are added.
      Weights that meet no data, such as embeddings that are looked up, are left out.

    Raises:
      ValueError: `where` selects nothing, or a weight is read in two ways, as in x·W and x·Wᵀ.
    """
    paths, leaves, _ = flatten(params)
    chosen = select(paths, leaves, [(None, True)], where)
    program, shape = jax.make_jaxpr(f, return_shape=True)(params, *args)

    def mark(i: int) -> Weight | Origin:
        return Weight(paths[i], tuple(range(jnp.ndim(leaves[i])))) if i in chosen else Origin.OTHER

    weights = [Marked(leaf, mark(i)) for i, leaf in enumerate(leaves)]
    data = [Marked(leaf, Origin.DATA) for leaf in jax.tree.leaves(args)]
    walk = ContractionWalk(visit)
    outs = [out.value for out in walk.run(program, [*weights, *data])]
    values = Found[str]()
    axes: dict[str, Axes] = {}
    for use, value in walk.found.items():
        if axes.setdefault(use.path, use.axes) != use.axes:
            raise ValueError(
                f"the weight {use.path!r} is read as {axes[use.path]} in one place and as {use.axes} in another: "
                f"leave it out of `where`"
            )
        values.add({use.path: _sorted(use, value)})
    return jax.tree.unflatten(jax.tree.structure(shape), outs), values


def check_found(name: str, params: Any, where: Where | None, found: Mapping[str, Any]) -> None:
    """Raises if a weight that was asked for is not multiplied by data."""
    paths, leaves, _ = flatten(params)
    selected = [paths[i] for i in select(paths, leaves, [(None, True)], where)]
    missed = [path for path in selected if path not in found]
    if missed and (where is not None or not found):
        raise ValueError(
            f"{name} found no product of data with {', '.join(map(repr, missed))}: leave out of `where` what is not "
            f"used, looked up, or reshaped or sliced before"
        )


def _sorted(use: Use, value: Any) -> Any:
    """The value with its leading axes in the order that they have in the weight."""
    order = sorted(range(len(use.lead)), key=use.lead.__getitem__)

    def transpose(a: jax.Array) -> jax.Array:
        return jnp.transpose(a, (*order, *range(len(order), jnp.ndim(a))))

    return jax.tree.map(transpose, value)
