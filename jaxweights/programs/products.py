"""The axes of a product of matrices and of a convolution, as plain data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

from jax.extend import core

from jaxweights.programs.interpreter import shape


@dataclasses.dataclass(frozen=True)
class Operand:
    """The axes of one operand of a `dot_general`.

    Attributes:
      batch: axes along which each entry has a product of its own.
      contracted: axes that are summed over.
      free: all other axes.
      partner: {batch or contracted axis: the axis of the other operand that it is matched with}.
      output: {batch or free axis: its place in the product}.
    """

    batch: tuple[int, ...]
    contracted: tuple[int, ...]
    free: tuple[int, ...]
    partner: Mapping[int, int]
    output: Mapping[int, int]


def dot_general(eqn: core.JaxprEqn) -> tuple[Operand, Operand]:
    """The axes of the left and of the right operand of a `dot_general`."""
    contracted, batch = eqn.params["dimension_numbers"]
    named = [(*b, *c) for b, c in zip(batch, contracted, strict=True)]
    # The product has the batch axes, then the free axes of the left operand, then those of the right.
    n_placed = len(batch[0])
    operands = []
    for side, variable in enumerate(eqn.invars):
        free = tuple(a for a in range(len(shape(variable))) if a not in named[side])
        output = {a: i for i, a in enumerate(batch[side])} | {a: n_placed + i for i, a in enumerate(free)}
        partner = dict(zip(named[side], named[1 - side], strict=True))
        operands.append(Operand(tuple(batch[side]), tuple(contracted[side]), free, partner, output))
        n_placed += len(free)
    left, right = operands
    return left, right


class Image(NamedTuple):
    """The axes of the input or output of a convolution: samples, channels, and those that the window moves along."""

    batch: int
    channels: int
    space: tuple[int, ...]


class Kernel(NamedTuple):
    """The axes of the kernel of a convolution: input channels (of one group), output channels (of all), the window."""

    input: int
    output: int
    window: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Convolution:
    """The axes of a `conv_general_dilated`, and how its window moves.

    Spatial axes come in the same order in the image, the kernel and the output, in strides, padding and dilations.

    Attributes:
      image: axes of the left operand.
      kernel: axes of the right operand.
      output: axes of the result.
      groups: of channels. Each run of input channels meets a run of output channels of its own.
      batch_groups: of samples, each with a run of output channels of its own. 1, but in gradients.
      strides: of the window, in entries of the dilated and padded image.
      padding: (low, high) of each spatial axis, after dilation; negative where it crops.
      image_dilation: distance between neighbours of the image, with zeros between.
      kernel_dilation: distance between neighbours of the window.
    """

    image: Image
    kernel: Kernel
    output: Image
    groups: int
    batch_groups: int
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    image_dilation: tuple[int, ...]
    kernel_dilation: tuple[int, ...]


def convolution(eqn: core.JaxprEqn) -> Convolution:
    """The axes of a `conv_general_dilated`, and how its window moves."""
    p = eqn.params
    (image_batch, image_channels, *image_space) = p["dimension_numbers"].lhs_spec
    (kernel_output, kernel_input, *window) = p["dimension_numbers"].rhs_spec
    (output_batch, output_channels, *output_space) = p["dimension_numbers"].out_spec
    return Convolution(
        Image(image_batch, image_channels, tuple(image_space)),
        Kernel(kernel_input, kernel_output, tuple(window)),
        Image(output_batch, output_channels, tuple(output_space)),
        p["feature_group_count"],
        p["batch_group_count"],
        tuple(p["window_strides"]),
        tuple(p["padding"]),
        tuple(p["lhs_dilation"]),
        tuple(p["rhs_dilation"]),
    )
