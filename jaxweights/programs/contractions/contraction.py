"""A product of an activation and a weight, in matrices or in a convolution: rows, columns and what meets them."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.extend import core

from jaxweights.core.axes import Axes, axis_tuple
from jaxweights.core.calibration import Samples
from jaxweights.programs.contractions.weight import Weight
from jaxweights.programs.products import Convolution, convolution, dot_general


@dataclasses.dataclass(frozen=True)
class Contraction:
    """A product of an activation `x` and a weight `w`.

    Attributes:
      path: of the weight.
      axes: how the product reads the weight, as it is in the tree: a stack of layers is `batch`.
      x: what is multiplied.
      w: what it is multiplied by. In a loop over a stack this is one layer, without the axis of the stack.
      y: the product, before any bias.
      inputs: `x`, or an array like it, as vectors that match the rows of the weight.
      outputs: `y`, or an array like it, as vectors that match the columns of the weight; None if it has only some.
    """

    path: str
    axes: Axes
    x: jax.Array
    w: jax.Array
    y: jax.Array
    inputs: Callable[[jax.Array], Samples]
    outputs: Callable[[jax.Array], Samples] | None


def _of_dot_general(
    eqn: core.JaxprEqn, weight: Weight, axes: Axes, position: int, ins: Sequence[jax.Array], y: jax.Array
) -> Contraction | None:
    operand, view = dot_general(eqn)[position], weight.view
    if view.flipped:
        return None
    # A stack under `vmap` that meets the same data: its axis is free in the product.
    stack = [a for a in operand.free if {span.axis for span in view.axes[a]} & set(axis_tuple("batch", axes.batch))]
    free = [a for a in operand.free if a not in stack]
    orders = [view.in_order(which) for which in (operand.contracted, free, (*stack, *operand.batch))]
    rows, columns, batch = orders
    if rows is None or batch is None:
        return None
    n = len(stack)
    place = {a: i for i, a in enumerate(stack)} | {a: n + b for a, b in operand.partner.items()}
    sizes = [ins[position].shape[a] for a in stack]
    x_features, x_batch = tuple(place[a] for a in rows), tuple(place[a] for a in batch)

    def inputs(x: jax.Array) -> Samples:
        return Samples(jnp.broadcast_to(x, (*sizes, *x.shape)), x_features, x_batch)

    outputs = None
    if columns is not None:
        y_features, y_batch = (tuple(operand.output[a] for a in which) for which in (columns, batch))
        outputs = functools.partial(Samples, features=y_features, batch=y_batch)
    return Contraction(weight.path, axes, ins[1 - position], ins[position], y, inputs, outputs)


def _of_convolution(
    eqn: core.JaxprEqn, weight: Weight, axes: Axes, position: int, ins: Sequence[jax.Array], y: jax.Array
) -> Contraction | None:
    conv, view = convolution(eqn), weight.view
    kernel, grouped = conv.kernel, conv.groups > 1
    of_window = {span.axis for a in kernel.window for span in view.axes[a]}
    features = view.in_order((kernel.input, *kernel.window))
    columns = view.in_order((kernel.output,))
    if position == 0 or conv.batch_groups > 1 or view.flipped - of_window or features is None or columns is None:
        return None
    if conv.groups != axes.groups or len(view.axes[kernel.output]) != 1:  # a stack in which the layers are groups
        return None
    x, w = ins
    backwards = [{span.axis for span in view.axes[a]} <= view.flipped for a in kernel.window]
    window = [range(w.shape[a])[:: -1 if back else 1] for a, back in zip(kernel.window, backwards, strict=True)]
    space = [y.shape[a] for a in conv.output.space]
    # Patches have the axes (*window, samples, [groups,] channels, *space).
    n = len(window)
    place = {a: i for i, a in enumerate(kernel.window)} | {kernel.input: n + 1 + grouped}
    places = tuple(place[a] for a in features)
    batch = (n + 1,) if grouped else ()

    def inputs(x: jax.Array) -> Samples:
        return Samples(_patches(conv, x, window, space), places, batch)

    def outputs(y: jax.Array) -> Samples:
        y = jnp.moveaxis(y, conv.output.channels, -1)
        if grouped:
            y = y.reshape(*y.shape[:-1], conv.groups, y.shape[-1] // conv.groups)
        return Samples(y, (y.ndim - 1,), (y.ndim - 2,) if grouped else ())

    return Contraction(weight.path, axes, x, w, y, inputs, outputs)


def _patches(conv: Convolution, x: jax.Array, window: Sequence[range], space: Sequence[int]) -> jax.Array:
    """What lies under each place of the window: (*window, samples, [groups,] channels, *space).

    Args:
      conv: the convolution.
      x: its image.
      window: the places along each axis of the window, in the order of the result.
      space: how many steps the window takes along each axis.
    """
    image = conv.image
    x = jnp.transpose(x, (image.batch, image.channels, *image.space))
    padding = [(low, high, d - 1) for (low, high), d in zip(conv.padding, conv.image_dilation, strict=True)]
    x = jax.lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), (0, 0, 0), *padding])
    groups = (conv.groups,) if conv.groups > 1 else ()
    x = x.reshape(x.shape[0], *groups, x.shape[1] // conv.groups, *x.shape[2:])
    whole = x.shape[: x.ndim - len(window)]
    strides = (*(1 for _ in whole), *conv.strides)
    spans = [stride * (n - 1) + 1 for stride, n in zip(conv.strides, space, strict=True)]

    def under(place: Sequence[int]) -> jax.Array:
        start = [i * d for i, d in zip(place, conv.kernel_dilation, strict=True)]
        stop = [i + n for i, n in zip(start, spans, strict=True)]
        return jax.lax.slice(x, (*(0 for _ in whole), *start), (*whole, *stop), strides)

    patches = jnp.stack([under(place) for place in itertools.product(*window)])
    return patches.reshape(*map(len, window), *patches.shape[1:])


PRODUCTS = {"dot_general": _of_dot_general, "conv_general_dilated": _of_convolution}
"""{name of a primitive: (equation, weight, its axes, its position, operands, product) -> the contraction, or None}"""
