"""Kernels of convolutions that are equivariant to rotations by 90 degrees and to flips."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar, Literal

import numpy as np

from jaxweights.core.checks import check_choice
from jaxweights.techniques.weight_sharing.patterns import Pattern

Element = tuple[int, int]
"""A symmetry of the square: a flip of the columns, once or not at all, then quarter turns as `numpy.rot90` does."""


@dataclasses.dataclass(frozen=True)
class GroupConvolution(Pattern):
    """The kernel of a convolution that is equivariant to rotations by 90° ("p4"), or to these and flips ("p4m").

    If the image is turned, so are the feature maps, and the group axis of their channels is permuted. The output has
    |G| · C channels, the group axis first: a map of each of C filters in each of the |G| = 4 or 8 poses. So has the
    input, or plain channels in the first layer, which `lifts`. The maximum over the group axis is equivariant as an
    image is; its sum over all positions is invariant.

        w[x, (h, i), (g, o)] = codebook[g⁻¹x, g⁻¹h, i, o], or if it lifts
        w[x, i, (g, o)] = codebook[g⁻¹x, i, o].

    The codebook has shape (*window, |G|, in, out), or (*window, in, out) if it lifts. Any convolution layer makes use
    of the kernel: its window must be square, its stride must leave the grid as it is when turned, and its padding must
    be even, as "SAME" is with an odd window and stride 1.

    Args:
      group: "p4" or "p4m".
      lifts: whether the input has plain channels.
      shape: shape of the kernel, (size, size, [|G| ·] in, |G| · out).

    >>> import jax.numpy as jnp
    >>> import jaxweights as jw
    >>> kernel = jw.share(jnp.arange(4.0), GroupConvolution("p4", lifts=True, shape=(2, 2, 1, 4)))
    >>> print(kernel[:, :, 0, 0], kernel[:, :, 0, 1])      # a filter, and turned
    [[0. 1.]
     [2. 3.]] [[1. 3.]
     [0. 2.]]

    References: Cohen and Welling, Group Equivariant Convolutional Networks, arXiv:1602.07576, 2016.
    """

    group: Literal["p4", "p4m"] = "p4"
    lifts: bool = False
    reads_matrix: ClassVar[bool] = False

    def __post_init__(self):
        super().__post_init__()
        check_choice("group", self.group, ("p4", "p4m"))
        if not isinstance(self.lifts, bool):
            raise TypeError(f"lifts must be True or False, got {self.lifts!r}: pass a bool")
        if self.shape is None:
            return
        order = len(self.elements)
        if (
            len(self.shape) != 4
            or self.shape[0] != self.shape[1]
            or self.shape[3] % order
            or (not self.lifts and self.shape[2] % order)
        ):
            channels = f"in, {order} * out" if self.lifts else f"{order} * in, {order} * out"
            raise ValueError(f"shape must be (size, size, {channels}) for {self.group}, got {self.shape}")

    @property
    def elements(self) -> list[Element]:
        """The symmetries, in the order of the group axis."""
        return [(flip, turns) for flip in range(2 if self.group == "p4m" else 1) for turns in range(4)]

    @property
    def n_values(self):
        """The size of the kernel without its poses."""
        return math.prod(self.sizes) // len(self.elements)

    def positions(self, xp):
        """The entry of the filter that each pose of it has at each position."""
        size, _, n_in, n_out = self.sizes
        order = len(self.elements)
        shape = (size, size, 1, n_in) if self.lifts else (size, size, order, n_in // order)
        filters = np.arange(self.n_values).reshape(*shape, n_out // order)
        poses = [_act(g, filters if self.lifts else filters[:, :, self._moved(g)]) for g in self.elements]
        return np.stack(poses, -2).reshape(self.sizes)

    def _moved(self, g: Element) -> list[int]:
        """g⁻¹h for each element h, by number."""
        corners = np.arange(4).reshape(2, 2)  # no two symmetries move them alike
        of = {_act(g, _act(h, corners)).tobytes(): i for i, h in enumerate(self.elements)}
        return [of[_act(h, corners).tobytes()] for h in self.elements]


def _act(g: Element, a: np.ndarray) -> np.ndarray:
    """The array, flipped and turned along its first two axes."""
    flip, turns = g
    return np.rot90(np.flip(a, 1) if flip else a, turns)
