"""How zeros are distributed over several weights: by one threshold for all, or by the shapes of the weights."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxweights.core.axes import Axes
from jaxweights.core.checks import check_scalar, check_weight, naming
from jaxweights.core.transform import Number
from jaxweights.numerics.counts import Count, count, fraction_of, scaled, select, smaller
from jaxweights.numerics.selection import by_value, smallest_mask, smallest_masks
from jaxweights.techniques.sparsification.masks import check_boolean
from jaxweights.techniques.sparsification.structure import Structure
from jaxweights.techniques.sparsification.tiles import Tiles


class Distribution(Protocol):
    """Makes masks of several weights that together have a given fraction of zeros."""

    def masks(
        self,
        scores: Mapping[str, jax.Array],
        sparsity: Number,
        *,
        structure: Structure | None = None,
        axes: Mapping[str, Axes] | None = None,
        within: Mapping[str, jax.Array] | None = None,
    ) -> dict[str, jax.Array]:
        """Returns the masks by path; the arguments are those of `keep_largest`, by path too."""
        ...


@dataclasses.dataclass(frozen=True)
class Global:
    """One threshold for all weights: the largest scores are kept, wherever they are.

    Of the n weights of all arrays exactly round(sparsity·n) are pruned. Of equal scores, the one with the lower path is
    pruned first, then the one with the lower flat index. With a structure, blocks or units are counted, whatever their
    size.

    >>> import jax.numpy as jnp
    >>> masks = Global().masks({"a": jnp.array([1.0, 2.0]), "b": jnp.array([3.0, 4.0])}, 0.5)
    >>> print(masks["a"], masks["b"])
    [False False] [ True  True]
    """

    def masks(self, scores, sparsity, *, structure=None, axes=None, within=None):
        """Returns the masks by path."""
        tiles, tile_scores = _tiled(type(self).__name__, scores, sparsity, structure, axes, within)
        paths = sorted(scores)
        n_tiles = sum(tiles[p].n_matrices * tiles[p].n_tiles for p in paths)
        masks = smallest_masks([tile_scores[p] for p in paths], fraction_of(sparsity, n_tiles), rank=by_value)
        pruned = dict(zip(paths, masks, strict=True))
        return {p: tiles[p].expand(~pruned[p], like=scores[p]) for p in scores}


@dataclasses.dataclass(frozen=True)
class ErdosRenyi:
    """Erdős–Rényi-kernel densities: proportional to Σ(dims)/Π(dims) of each matrix, at most 1.

    The dims are the numbers of inputs and of output units and the sides of a convolution's window. A matrix whose
    density would exceed 1 stays dense, and the densities of the others are rescaled. Of the n weights of all arrays
    exactly round(sparsity·n) are pruned: in each matrix, those of smallest score.

    >>> import jax.numpy as jnp
    >>> masks = ErdosRenyi().masks({"small": jnp.ones((2, 2)), "large": jnp.ones((20, 20))}, 0.8)
    >>> print(masks["small"].sum(), masks["large"].sum())
    4 77

    References: Mocanu et al., Scalable Training of Artificial Neural Networks with Adaptive Sparse Connectivity
    inspired by Network Science, arXiv:1707.04780, 2017; Evci, Gale, Menick, Castro and Elsen, Rigging the Lottery:
    Making All Tickets Winners, arXiv:1911.11134, 2019 (with the window).
    """

    def masks(self, scores, sparsity, *, structure=None, axes=None, within=None):
        """Returns the masks by path."""
        tiles, tile_scores = _tiled(type(self).__name__, scores, sparsity, structure, axes, within)
        n_pruned = _count_pruned(tiles, sparsity)
        masks = {}
        for path, t in tiles.items():
            pruned = smallest_mask(tile_scores[path], n_pruned[path], axis=t.axis, rank=by_value)
            masks[path] = t.expand(~pruned, like=scores[path])
        return masks


def _tiled(name: str, scores, sparsity, structure, axes, within) -> tuple[dict[str, Tiles], dict[str, jax.Array]]:
    """The tiles of each weight and their scores, by path."""
    if isinstance(sparsity, tuple):
        raise ValueError(f"sparsity={sparsity} is the same in all weights, but {name} distributes a fraction: give one")
    check_scalar("sparsity", sparsity, 0, 1)
    if not isinstance(scores, Mapping):
        kind = type(scores).__name__
        raise TypeError(f"scores must be a dict {{path: array}}, got {kind}: for one weight use keep_largest")
    tiles, tile_scores = {}, {}
    for path, s in scores.items():
        with naming(name, path):
            s = check_weight(s, "scores")
            mask = None if within is None else check_boolean("within", within[path], s.shape)
            tiles[path] = Tiles(s.shape, structure, (axes or {}).get(path))
            tile_scores[path] = tiles[path].scores(s, mask)
    return tiles, tile_scores


def _count_pruned(tiles: Mapping[str, Tiles], sparsity: Number) -> dict[str, Count]:
    """The number of tiles to prune in each matrix, by path, shaped for `smallest_mask`.

    Matrices are visited in order of density, the densest first. Each keeps its share, ε·Σ(dims), of the tiles that are
    still to be kept, but no more than it has. So the excess goes to the matrices after it, and the total is exact.
    """
    order = sorted(tiles, key=lambda path: (-_share(tiles[path]) / max(tiles[path].n_tiles, 1), path))
    matrices = [tiles[path] for path in order for _ in range(tiles[path].n_matrices)]
    sizes, shares = [t.n_tiles for t in matrices], [_share(t) for t in matrices]
    # The share of each matrix in the total of those not yet visited, in units of 2⁻³². The last matrix gets all that is
    # left, although its ratio is below 1: `step` leaves no more than the later matrices can hold.
    ratios = [
        min(int(2**32 * share / (share + later or 1)), 2**32 - 1)
        for share, later in zip(shares, _sums_after(shares), strict=True)
    ]

    def step(left, matrix):
        ratio, size, later = matrix
        kept = smaller(smaller(scaled(left, ratio), size), left)
        kept = select(left <= kept + later, kept, left - smaller(later, left))
        return left - kept, size - kept

    total = sum(sizes)
    columns = (_words(ratios), _counts(sizes), _counts(_sums_after(sizes)))
    _, pruned = jax.lax.scan(step, count(total) - fraction_of(sparsity, total), columns)
    by_path, start = {}, 0
    for path in order:
        stop = start + tiles[path].n_matrices
        by_path[path] = tiles[path].per_matrix(Count(pruned.hi[start:stop], pruned.lo[start:stop]))
        start = stop
    return by_path


def _share(tiles: Tiles) -> Fraction:
    """Σ(dims) of one matrix, in tiles: how many it keeps for ε = 1."""
    roles, shape = tiles.reading, tiles.shape
    dims = math.prod(shape[a] for a in roles.input) + math.prod(shape[a] for a in roles.output)
    return Fraction(dims + sum(shape[a] for a in roles.window), max(tiles.tile_size, 1))


def _sums_after(values: Sequence) -> list:
    """For each value the sum of those after it."""
    sums = list(itertools.accumulate(reversed(values), initial=0))
    return sums[-2::-1]


def _words(ns: Sequence[int]) -> jax.Array:
    return jnp.asarray(np.array(ns, np.uint32))


def _counts(ns: Sequence[int]) -> Count:
    """Integers of any size as one array of counts."""
    return Count(_words([n >> 32 for n in ns]), _words([n & 0xFFFFFFFF for n in ns]))
