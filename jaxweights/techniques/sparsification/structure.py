"""Structured sparsity: blocks, output units or input units, each kept or pruned as a whole."""

from __future__ import annotations

import dataclasses
from typing import Literal, Protocol, get_args

from jaxweights.core.axes import Reading
from jaxweights.core.checks import check_choice, check_integer

Pool = Literal["l2", "l1", "mean", "max"]
"""How the scores in a tile make its score: √Σs², Σ|s|, their mean, or the largest."""


class Structure(Protocol):
    """How a weight is cut into tiles that are kept or pruned as a whole."""

    @property
    def pool(self) -> Pool:
        """How the scores in a tile make its score."""
        ...

    def tile(self, r: Reading, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the length of a tile along each axis. The last one along an axis may be shorter.

        Where a convolution has groups, they are a batch axis here, before that of the output units of one group.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Blocks of `height` inputs by `width` output units, at each position of a convolution's window.

    Where they do not divide the weight, the last blocks are smaller. Each counts as one block, and its score is that of
    the weights it has.

    Args:
      height: number of inputs of a block.
      width: number of output units of a block.
      pool: the score of a block: "l2" and "l1", the norms of the scores in it; "mean"; or "max".

    >>> import jax.numpy as jnp
    >>> import jaxweights as jw
    >>> w = jnp.array([[1.0, 2.0, 0.0, 9.0], [3.0, 4.0, 0.0, 0.0]])
    >>> print(jw.magnitude_mask(w, 0.5, structure=Blocks(2, 2)))
    [[False False  True  True]
     [False False  True  True]]
    >>> print(jw.magnitude_mask(w, 0.5, structure=Blocks(2, 2, pool="l1")))
    [[ True  True False False]
     [ True  True False False]]

    References: Gray, Radford and Kingma, GPU Kernels for Block-Sparse Weights, 2017.
    """

    height: int
    width: int
    _: dataclasses.KW_ONLY
    pool: Pool = "l2"

    def __post_init__(self):
        check_integer("height", self.height, 1)
        check_integer("width", self.width, 1)
        _check_pool(self.pool)

    def tile(self, r: Reading, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns `height` along the last input axis and `width` along the last output axis, 1 along the others."""
        tile = [1] * len(shape)
        for axes, length in ((r.input, self.height), (r.output, self.width)):
            if axes:
                tile[axes[-1]] = min(length, shape[axes[-1]])
        return tuple(tile)


@dataclasses.dataclass(frozen=True)
class OutputUnits:
    """Whole output units: columns of the matrix, filters of a convolution.

    Args:
      pool: the score of a unit: "l2" and "l1", the norms of the scores in it; "mean"; or "max".

    References: Li, Kadav, Durdanovic, Samet and Graf, Pruning Filters for Efficient ConvNets, arXiv:1608.08710, 2016
    (who use the L1 norm).
    """

    _: dataclasses.KW_ONLY
    pool: Pool = "l2"

    def __post_init__(self):
        _check_pool(self.pool)

    def tile(self, r: Reading, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the full length along the contracted axes, 1 along the others."""
        return tuple(n if a in r.contracted else 1 for a, n in enumerate(shape))


@dataclasses.dataclass(frozen=True)
class InputUnits:
    """Whole input units: rows of the matrix, input channels of a convolution.

    Args:
      pool: the score of a unit: "l2" and "l1", the norms of the scores in it; "mean"; or "max".
    """

    _: dataclasses.KW_ONLY
    pool: Pool = "l2"

    def __post_init__(self):
        _check_pool(self.pool)

    def tile(self, r: Reading, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the full length along the window and output axes, 1 along the others."""
        return tuple(n if a in r.window + r.output else 1 for a, n in enumerate(shape))


def _check_pool(pool) -> None:
    check_choice("pool", pool, get_args(Pool))


def check_tiling(structure) -> None:
    """Raises unless `structure` is None or has a method `tile`."""
    if isinstance(structure, type):
        raise TypeError(f"structure got the class {structure.__name__}: make an instance, {structure.__name__}(...)")
    if structure is not None and not callable(getattr(structure, "tile", None)):
        raise TypeError(f"structure must be Blocks, OutputUnits or InputUnits, got {structure!r}: make an instance")
