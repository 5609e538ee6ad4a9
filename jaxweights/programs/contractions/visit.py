"""Where a function multiplies by its weights: every product of a weight and an activation, found in the traced program.

A layer is where a weight meets an activation, in a product of matrices or in a convolution. That is plain to see in the
program that JAX traces, whatever library the model is written in, and it says more than the weight's shape: which axes
are summed over. A loop over a stack of layers has what is found in each along a leading axis; what one weight meets
in several places, or in each step of a loop that shares it, is added.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

from jaxweights.levels.paths import Where, flatten, select
from jaxweights.programs.contractions.found import Found, Use
from jaxweights.programs.contractions.walk import ContractionWalk, Marked, Origin, Visit
from jaxweights.programs.contractions.weight import Weight
from jaxweights.programs.layout import read as layout
from jaxweights.programs.trace import is_array, split_arrays
from jaxweights.programs.view import View


def visit_contractions(
    f: Callable[..., Any], params: Any, *args: Any, visit: Visit, where: Where | None = None
) -> tuple[Any, Found[str]]:
    """f(params, *args) with a visit to every product of a weight and what depends on `args`.

    Pure: it may be jitted, and differentiated where `visit` may. A weight that is cast, masked, scaled, quantized,
    transposed or reshaped on the way is still that weight, and so is one whose window is flipped. Out of reach are
    weights of which a product has only a part, those in a `while_loop`, and those read in two ways, as x·W and x·Wᵀ.

    Args:
      f: a function of a tree of weights and of arguments.
      params: the tree.
      *args: pytrees of arrays, the data.
      visit: contraction -> (value, y). The value is a pytree of arrays, whose leading axes are the batch axes of the
        weight, if any; y takes the place of the product in the rest of the computation.
      where: the weights to look for, as for `on_tree`.

    Returns:
      (f's value, {path: value}) in the order of use, which the dict keeps under `jit`. Values of one path are added.
      Weights that meet no data, such as embeddings that are looked up, are left out: see `check_found`.

    Raises:
      ValueError: `where` selects nothing.
    """
    traced = _trace(f, params, args, where)

    def mark(place: int) -> Weight | Origin:
        if place >= traced.n_params:
            return Origin.DATA
        path = traced.weights.get(place)
        return Origin.OTHER if path is None else Weight(View.whole(path, jnp.shape(traced.leaves[place])))

    walk = ContractionWalk(visit, {path: use.axes for path, use in traced.uses.items() if use.axes is not None})
    outs = walk.run(traced.program, [Marked(leaf, mark(place)) for place, leaf in enumerate(traced.leaves)])
    values = Found[str]()
    for use, value in walk.found.items():
        values.add({use.path: _sorted(use, value)})
    return jax.tree.unflatten(jax.tree.structure(traced.shape), [out.value for out in outs]), values


def check_found(
    name: str, f: Callable[..., Any], params: Any, args: Iterable[Any], where: Where | None, found: Mapping[str, Any]
) -> None:
    """Raises, or by default warns, if visits have missed a weight, and says why.

    Weights that meet data in no product, such as embeddings and biases, are missed only if `where` names them.
    """
    uses = _trace(f, params, args, where).uses
    asked = where is not None or not found
    partly = "each product has a part of it"
    missed = {
        path: use.why if use.axes is None else partly
        for path, use in uses.items()
        if path not in found and (asked or not use.elsewhere)
    }
    if missed:
        listing = ", ".join(f"{path!r} ({why})" for path, why in missed.items())
        if asked:
            raise ValueError(f"{name} found no product of data with all of {listing}: leave it out of `where`")
        warnings.warn(f"{name} leaves out {listing}", stacklevel=3)


class _Traced(NamedTuple):
    """A function's program, and what it does with the selected weights.

    Attributes:
      program: the program.
      leaves: its arguments.
      n_params: how many of them are parameters; the others are data.
      weights: {place among the arguments: path} of the selected weights.
      uses: {path: what the program does with the weight}.
      shape: of the function's value.
    """

    program: core.ClosedJaxpr
    leaves: list[Any]
    n_params: int
    weights: dict[int, str]
    uses: dict[str, layout.Use]
    shape: Any


def _trace(f: Callable[..., Any], params: Any, args: Iterable[Any], where: Where | None) -> _Traced:
    paths, weights, _ = flatten(params)
    chosen = select(paths, weights, [(_is_matrix if where is None else None, True)], where)
    arrays, rebuild = split_arrays((params, tuple(args)))

    def run(*arrays: jax.Array) -> Any:
        params, args = rebuild(arrays)
        return f(params, *args)

    program, shape = jax.make_jaxpr(run, return_shape=True)(*arrays)
    n_params, places = 0, {}
    for i, weight in enumerate(weights):
        if i in chosen:
            places[n_params] = paths[i]
        n_params += sum(map(is_array, jax.tree.leaves(weight)))
    uses = layout.read(program, places, range(n_params, len(arrays)))
    return _Traced(program, arrays, n_params, places, uses, shape)


def _is_matrix(path: str, w: Any) -> bool:
    """Two or more axes: what else a weight is, the program tells."""
    return jnp.ndim(w) >= 2


def _sorted(use: Use, value: Any) -> Any:
    """The value with its leading axes in the order that they have in the weight."""
    order = sorted(range(len(use.lead)), key=use.lead.__getitem__)

    def transpose(a: jax.Array) -> jax.Array:
        return jnp.transpose(a, (*order, *range(len(order), jnp.ndim(a))))

    return jax.tree.map(transpose, value)
