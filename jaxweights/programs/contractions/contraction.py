"""A product of an activation and a weight, in matrices or in a convolution: rows, columns and what meets them."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.extend import core

from jaxweights.core.axes import Axes
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
      outputs: `y`, or an array like it, as vectors that match the columns of the weight.
    """

    path: str
    axes: Axes
    x: jax.Array
    w: jax.Array
    y: jax.Array
    inputs: Callable[[jax.Array], Samples]
    outputs: Callable[[jax.Array], Samples]


def _of_dot_general(
    eqn: core.JaxprEqn, weight: Weight, position: int, ins: Sequence[jax.Array], y: jax.Array
) -> Contraction | None:
    operand = dot_general(eqn)[position]
    if not operand.contracted or weight.flipped:
        return None
    rows, columns, batch = map(weight.sort, (operand.contracted, operand.free, operand.batch))
    x_features, x_batch = (tuple(operand.partner[a] for a in which) for which in (rows, batch))
    y_features, y_batch = (tuple(operand.output[a] for a in which) for which in (columns, batch))

    def inputs(x: jax.Array) -> Samples:
        return Samples(x, x_features, x_batch)

    def outputs(y: jax.Array) -> Samples:
        return Samples(y, y_features, y_batch)

    axes = weight.reading(rows, columns, batch)
    return Contraction(weight.path, axes, ins[1 - position], ins[position], y, inputs, outputs)


def _of_convolution(
    eqn: core.JaxprEqn, weight: Weight, position: int, ins: Sequence[jax.Array], y: jax.Array
) -> Contraction | None:
    conv = convolution(eqn)
    kernel, grouped = conv.kernel, conv.groups > 1
    if position == 0 or conv.batch_groups > 1 or weight.flipped - {weight.axes[a] for a in kernel.window}:
        return None
    x, w = ins
    window = [range(w.shape[a])[:: -1 if weight.axes[a] in weight.flipped else 1] for a in kernel.window]
    space = [y.shape[a] for a in conv.output.space]
    # Patches have the axes (*window, samples, [groups,] channels, *space).
    n = len(window)
    place = {a: i for i, a in enumerate(kernel.window)} | {kernel.input: n + 1 + grouped}
    features = tuple(place[a] for a in weight.sort((kernel.input, *kernel.window)))
    batch = (n + 1,) if grouped else ()

    def inputs(x: jax.Array) -> Samples:
        return Samples(_patches(conv, x, window, space), features, batch)

    def outputs(y: jax.Array) -> Samples:
        y = jnp.moveaxis(y, conv.output.channels, -1)
        if grouped:
            y = y.reshape(*y.shape[:-1], conv.groups, y.shape[-1] // conv.groups)
        return Samples(y, (y.ndim - 1,), (y.ndim - 2,) if grouped else ())

    axes = weight.reading((kernel.input,), (kernel.output,), (), conv.groups)
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
"""{name of a primitive: (equation, weight, its position, operands, product) -> the contraction, if it is one}"""
