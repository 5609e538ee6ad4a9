"""What is pruned as one: blocks of the matrix, output units, input units."""

from __future__ import annotations

import dataclasses
from typing import Protocol

from jaxweights.core.axes import Reading
from jaxweights.core.checks import check_integer


class Structure(Protocol):
    """How a weight is cut into tiles that are kept or pruned as a whole."""

    def tile(self, r: Reading, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The length of a tile along each axis, a divisor of that of the weight."""
        ...


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Blocks of so many inputs by so many output units of the matrix, at each position of a convolution's window.

    >>> import jax.numpy as jnp
    >>> import jaxweights as jw
    >>> w = jnp.array([[1.0, 2.0, 0.0, 9.0], [3.0, 4.0, 0.0, 0.0]])
    >>> print(jw.magnitude_mask(w, 0.5, structure=Blocks(2, 2)))
    [[False False  True  True]
     [False False  True  True]]

    References: Gray, Radford and Kingma, GPU Kernels for Block-Sparse Weights, 2017.
    """

    height: int
    width: int

    def __post_init__(self):
        check_integer("height", self.height, 1)
        check_integer("width", self.width, 1)

    def tile(self, r: Reading, shape: tuple[int, ...]) -> tuple[int, ...]:
        """`height` along the last input axis, `width` along the last output axis."""
        sizes = [1] * len(shape)
        for what, axes, size, groups in (
            ("input", r.input, self.height, 1),
            ("output", r.output, self.width, r.groups),
        ):
            n = shape[axes[-1]] // groups if axes else 1
            if n % size:
                raise ValueError(
                    f"{self} does not fit the {n} entries of the {what} axis of a weight of shape {shape}: "
                    f"choose a divisor of {n}"
                )
            if axes:
                sizes[axes[-1]] = size
        return tuple(sizes)


@dataclasses.dataclass(frozen=True)
class OutputUnits:
    """Whole output units: columns of the matrix, channels that a convolution makes.

    References: Li, Kadav, Durdanovic, Samet and Graf, Pruning Filters for Efficient ConvNets, arXiv:1608.08710, 2016.
    """

    def tile(self, r: Reading, shape: tuple[int, ...]) -> tuple[int, ...]:
        """All of the contracted axes."""
        return tuple(n if a in r.contracted else 1 for a, n in enumerate(shape))


@dataclasses.dataclass(frozen=True)
class InputUnits:
    """Whole input units: rows of the matrix, channels that a convolution reads."""

    def tile(self, r: Reading, shape: tuple[int, ...]) -> tuple[int, ...]:
        """All of the window and output axes, of the latter the run that belongs to one group."""
        full = lambda a: shape[a] // r.groups if a in r.output else shape[a]
        return tuple(full(a) if a in (*r.window, *r.output) else 1 for a in range(len(shape)))
