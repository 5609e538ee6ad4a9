"""Scales of a weight under the maximal update parametrization (muP)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from jaxweights.core.axes import Axes, Reading, fans
from jaxweights.core.checks import check_shape


class MupScales(NamedTuple):
    """Factors of one weight: 1 for all at the width of the base."""

    init: float
    """Of an initialization whose variance is proportional to 1/n_in."""
    adam: float
    """Of the learning rate, for updates whose size does not depend on that of the gradient."""
    sgd: float
    """Of the learning rate, for updates in proportion to the gradient."""


def mup(shape: Sequence[int], base_shape: Sequence[int], *, axes: Axes | None = None) -> MupScales:
    """The scales of a weight under muP, relative to a narrower network in which it has `base_shape`.

    With r_in and r_out the ratios of the weight's fans to those in the base, a weight is

    | | r_in | r_out | init | Adam | SGD |
    | --- | --- | --- | --- | --- | --- |
    | input, bias | 1 | grows | 1 | 1 | r_out |
    | hidden | grows | grows | 1 | 1/r_in | r_out/r_in |
    | output | grows | 1 | 1/√r_in | 1/r_in | 1/r_in |

    which is Adam: 1/r_in and SGD: r_out/r_in for all of them. Under these every activation keeps its size and moves by
    as much in a step at every width, and learning rates found in the base hold in the wide network. It is the paper's
    Table 3, which needs no multipliers in the forward pass.

    Args:
      shape: shape of the weight.
      base_shape: its shape in the base.
      axes: how both are read as a matrix; (..., in, out) by default. A bias or a scale of a norm is an output without
        input: `Axes(input=(), output=0)`.

    Returns:
      `MupScales(init, adam, sgd)`, numbers. `init` is on top of an initialization with variance c/n_in.

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
