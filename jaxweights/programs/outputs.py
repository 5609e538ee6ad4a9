"""The product of a weight and data, as a view of the weight: which of its axes are which outputs."""

from __future__ import annotations

import dataclasses

from jax.extend import core

from jaxweights.programs.interpreter import shape
from jaxweights.programs.products import convolution, dot_general
from jaxweights.programs.view import View, repeated


def output_view(eqn: core.JaxprEqn, position: int, view: View) -> View | None:
    """What the result of a product is of the weight: along its outputs the weight's axes, repeated along all else.

    Args:
      eqn: a `dot_general` or a `conv_general_dilated`.
      position: which operand the weight is.
      view: the weight there.
    """
    axes = list(map(repeated, shape(eqn.outvars[0])))
    if eqn.primitive.name == "dot_general":
        for a, place in dot_general(eqn)[position].output.items():
            axes[place] = view.axes[a]
    else:
        conv = convolution(eqn)
        if position == 0 or conv.batch_groups > 1:
            return None
        axes[conv.output.channels] = view.axes[conv.kernel.output]
    return dataclasses.replace(view, axes=tuple(axes))
