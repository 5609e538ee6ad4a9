"""Scale factors of a weight under the maximal update parametrization (muP)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from jaxweights.core.axes import Axes, Reading, fans
from jaxweights.core.checks import check_shape


class MupScales(NamedTuple):
    """Factors for one weight, all 1 at the width of the base."""

    init: float
    """Factor of the initial weights, if their variance is proportional to 1/n_in."""
    adam: float
    """Factor of the learning rate, if the size of updates does not depend on the size of the gradient."""
    sgd: float
    """Factor of the learning rate, if updates are proportional to the gradient."""


def mup(shape: Sequence[int], base_shape: Sequence[int], *, axes: Axes | None = None) -> MupScales:
    """The scale factors of a weight under muP, relative to a narrower network in which it has `base_shape`.

    Let r_in and r_out be the ratios of the weight's fans to those in the base. Then

    | | r_in | r_out | init | Adam | SGD |
    | --- | --- | --- | --- | --- | --- |
    | input, bias | 1 | grows | 1 | 1 | r_out |
    | hidden | grows | grows | 1 | 1/r_in | r_out/r_in |
    | output | grows | 1 | 1/√r_in | 1/r_in | 1/r_in |

    In every row Adam is 1/r_in and SGD is r_out/r_in. With these factors, activations have the same size and change by
    the same amount per step at every width, so learning rates tuned on the base carry over to the wide network. This is
    Table 3 of the paper, which needs no multipliers in the forward pass.

    Args:
      shape: shape of the weight.
      base_shape: its shape in the base.
      axes: how both are read as a matrix; (..., in, out) by default. A bias or the scale of a norm has an output but no
        input: `Axes(input=(), output=0)`.

    Returns:
      `MupScales(init, adam, sgd)`, numbers. `init` multiplies weights drawn with variance c/n_in.

    Raises:
      ValueError: the shapes differ in rank or in their batch axes, or a fan is zero.

    >>> mup((1024, 1024), (256, 256))
    MupScales(init=1.0, adam=0.25, sgd=1.0)
    >>> mup((1024, 10), (256, 10))
    MupScales(init=0.5, adam=0.25, sgd=0.25)

    References: Yang et al., Tensor Programs V: Tuning Large Neural Networks via Zero-Shot Hyperparameter Transfer,
    arXiv:2203.03466, 2022.
    """
    shape, base_shape = check_shape("shape", shape), check_shape("base_shape", base_shape)
    both = f"shape {shape} and base_shape {base_shape}"
    if len(shape) != len(base_shape):
        raise ValueError(f"{both} differ in rank: give the base of the same model at another width")
    if any(shape[a] != base_shape[a] for a in Reading.of(axes, shape).batch):
        raise ValueError(f"{both} differ in a batch axis: muP scales widths, so give the base as many layers")
    (n_in, n_out), (base_in, base_out) = fans(shape, axes), fans(base_shape, axes)
    if 0 in (n_in, n_out, base_in, base_out):
        raise ValueError(f"{both}: a weight without inputs or outputs has no scale")
    r_in, r_out = n_in / base_in, n_out / base_out
    return MupScales(init=r_in**-0.5 if n_out == base_out else 1.0, adam=1 / r_in, sgd=r_out / r_in)
