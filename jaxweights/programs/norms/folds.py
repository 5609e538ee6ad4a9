"""Where each batch norm of a program can be folded, or what stands in the way."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from jax.extend import core

from jaxweights.core.axes import Axes, Reading
from jaxweights.programs.interpreter import shape
from jaxweights.programs.norms.values import Product
from jaxweights.programs.norms.walk import Layer, Norm, NormWalk


class Fold(NamedTuple):
    """Where a batch norm is folded.

    Attributes:
      layer: path of the layer; None if there is none that it can be folded into.
      follows: whether the layer comes after the norm instead of before it. That is exact only for a layer that pads its
        input with no zeros.
      axes: how the layer's kernel is read; (..., in, out) if it is None.
      eps: the norm's ε; None leaves it to the function that folds.
      why: what stands in the way, if there is no layer.
    """

    layer: str | None
    follows: bool = False
    axes: Axes | None = None
    eps: float | None = None
    why: str = ""


def read_folds(program: core.ClosedJaxpr, norms: Mapping[str, Norm], layers: Mapping[str, Layer]) -> dict[str, Fold]:
    """{norm: where it can be folded}: into the layer before it if that can be, otherwise into the one after it.

    Args:
      program: an evaluation of the model.
      norms: {path: positions of its arrays among the inputs of the program}.
      layers: the same for layers.
    """
    walk = NormWalk(norms, layers)
    walk.read(program)
    shapes = list(map(shape, program.jaxpr.invars))
    return {norm: _fold(walk, norm, norms[norm], layers, shapes) for norm in norms}


def _fold(walk: NormWalk, norm: str, at: Norm, layers: Mapping[str, Layer], shapes: list[tuple[int, ...]]) -> Fold:
    eps = {applied.eps for applied in walk.applied[norm]}
    if len(eps) != 1 or not walk.elsewhere.isdisjoint(i for i in at if i is not None):
        return Fold(None, why="the program does not apply it with its running statistics, or uses its arrays otherwise")
    whys = []
    for follows in (False, True):
        found = _after(walk, norm) if follows else _before(walk, norm)
        if not isinstance(found, str):
            layer, axes = found
            found = _misfit(walk, layers[layer], axes, shapes, shapes[at.mean], follows)
            if found is None:
                return Fold(layer, follows, axes, eps.pop())
            found = f"{layer!r} {found}"
        whys.append(found)
    return Fold(None, why="before it, {}; after it, {}".format(*whys))


def _before(walk: NormWalk, norm: str) -> tuple[str, Axes] | str:
    """The layer whose output the norm is applied to, and how it is read; or why there is none."""
    sources = {applied.source for applied in walk.applied[norm]}
    if not all(isinstance(source, Product) for source in sources):
        return "there is no layer whose output alone it is applied to"
    readings = {(source.layer, source.axes) for source in sources if isinstance(source, Product)}
    found = _only(readings)
    if isinstance(found, str):
        return found
    layer = found[0]
    others = {use.by for use in walk.after_layer[layer]} - {norm}
    return f"the output of {layer!r} is used without it too" if others else found


def _after(walk: NormWalk, norm: str) -> tuple[str, Axes] | str:
    """The layer that reads the norm, and how it is read; or why there is none."""
    uses = walk.after_norm[norm]
    readings = {(use.by, use.axes) for use in uses if use.by is not None}
    if not readings or len({use.by for use in uses}) > len({layer for layer, _ in readings}):
        return "there is no layer that alone reads it"
    found = _only(readings)
    if not isinstance(found, str) and walk.before_layer[found[0]] != {norm}:
        return f"{found[0]!r} reads other data too"
    return found


def _only(readings: Iterable[tuple[str, Axes | str | None]]) -> tuple[str, Axes] | str:
    """The only one of these readings of layers; or why there is none."""
    layers = sorted({layer for layer, _ in readings})
    if len(layers) > 1:
        return f"there are several layers, {', '.join(layers)}"
    for layer, axes in readings:
        if not isinstance(axes, Axes):
            return f"{layer!r} {axes}"
    (first, *others) = readings
    layer, axes = first
    return f"{layer!r} is read in two ways" if others or not isinstance(axes, Axes) else (layer, axes)


def _misfit(
    walk: NormWalk, layer: Layer, axes: Axes, shapes: list[tuple[int, ...]], features: tuple[int, ...], follows: bool
) -> str | None:
    """Why a norm with so many features cannot be folded into this layer, if it cannot."""
    if not walk.elsewhere.isdisjoint(i for i in layer if i is not None):
        return "does not use its kernel and bias as they are, or is not alone in using them"
    kernel = shapes[layer.kernel]
    r = Reading.of(axes, kernel)
    side = r.input if follows else r.output
    width = math.prod(kernel[a] for a in side) * (r.groups if follows else 1)
    if len(r.output) != 1 or len(side) != 1 or (*(kernel[a] for a in r.batch), width) != features:
        return f"of shape {kernel}, read as {axes}, does not have the features of the norm, {features}"
    return None
