"""Structured sparsity: blocks, output units or input units, each kept or pruned as a whole."""

from __future__ import annotations

import dataclasses
from typing import Protocol

from jaxweights.core.axes import Reading
from jaxweights.core.checks import check_integer


class Structure(Protocol):
    """How a weight is cut into tiles that are kept or pruned as a whole."""

    def tile(self, r: Reading, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the length of a tile along each axis, a divisor of the length of the weight."""
        ...


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Blocks of `height` inputs by `width` output units, at each position of a convolution's window.

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
        """Returns `height` along the last input axis and `width` along the last output axis, 1 along the others."""
        tile = [1] * len(shape)
        for role, axes, length, n_groups in (
            ("input", r.input, self.height, 1),
            ("output", r.output, self.width, r.groups),
        ):
            n = shape[axes[-1]] // n_groups if axes else 1
            if n % length:
                raise ValueError(
                    f"{self} does not fit the {n} entries of the {role} axis of a weight of shape {shape}: "
                    f"choose a divisor of {n}"
                )
            if axes:
                tile[axes[-1]] = length
        return tuple(tile)


@dataclasses.dataclass(frozen=True)
class OutputUnits:
    """Whole output units: columns of the matrix, filters of a convolution.

    References: Li, Kadav, Durdanovic, Samet and Graf, Pruning Filters for Efficient ConvNets, arXiv:1608.08710, 2016.
    """

    def tile(self, r: Reading, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the full length along the contracted axes, 1 along the others."""
        return tuple(n if a in r.contracted else 1 for a, n in enumerate(shape))


@dataclasses.dataclass(frozen=True)
class InputUnits:
    """Whole input units: rows of the matrix, input channels of a convolution."""

    def tile(self, r: Reading, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the full length along the window and output axes, or one group of the output axis."""
        tile = [1] * len(shape)
        for a in r.window:
            tile[a] = shape[a]
        for a in r.output:
            tile[a] = shape[a] // r.groups
        return tuple(tile)


def check_tiling(structure) -> None:
    """Raises unless `structure` is None or has a method `tile`."""
    if isinstance(structure, type):
        raise TypeError(f"structure got the class {structure.__name__}: make an instance, {structure.__name__}(...)")
    if structure is not None and not callable(getattr(structure, "tile", None)):
        raise TypeError(f"structure must be Blocks, OutputUnits or InputUnits, got {structure!r}: make an instance")
