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
from jaxweights.core.checks import check_weight, naming
from jaxweights.core.transform import Number
from jaxweights.numerics.batching import grouped, likeness, unstacked
from jaxweights.numerics.counts import Count, count, fraction_of, round_half_up, scaled, select, smaller
from jaxweights.numerics.selection import Entries, by_value, count_true, smallest_mask, smallest_masks
from jaxweights.techniques.sparsification.masks import check_boolean
from jaxweights.techniques.sparsification.pattern import check_fraction
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

    A layer of small weights may lose all of them. With a cap it does not: what it would lose beyond is pruned from
    the other weights, so the total stays exact. The cap holds for each matrix, such as a layer of a stack.

    Args:
      max_sparsity: the largest fraction of zeros of a weight, a Python number in [0, 1]; at most
        ⌊max_sparsity·n⌋ of n are pruned. Where the caps leave no room for as many zeros as `sparsity` asks for, it is
        an error; if `sparsity` is traced (a schedule), every weight is then pruned up to its cap.

    >>> import jax.numpy as jnp
    >>> scores = {"a": jnp.array([1.0, 2.0]), "b": jnp.array([3.0, 4.0])}
    >>> masks = Global().masks(scores, 0.5)
    >>> print(masks["a"], masks["b"])
    [False False] [ True  True]
    >>> masks = Global(max_sparsity=0.5).masks(scores, 0.5)
    >>> print(masks["a"], masks["b"])
    [False  True] [False  True]
    """

    max_sparsity: float = 1.0

    def __post_init__(self):
        if isinstance(self.max_sparsity, jax.Array):
            raise TypeError("max_sparsity must be a Python number, got a JAX array: it decides counts, so write 0.9")
        check_fraction("max_sparsity", self.max_sparsity)

    def masks(self, scores, sparsity, *, structure=None, axes=None, within=None):
        """Returns the masks by path."""
        tiles, entries = _tiled(type(self).__name__, scores, sparsity, structure, axes, within)
        n_tiles = sum(t.n_matrices * t.n_tiles for t in tiles.values())
        n_pruned = fraction_of(sparsity, n_tiles)
        if self.max_sparsity < 1:
            room = sum(t.n_matrices * self._cap(t) for t in tiles.values())
            if not isinstance(sparsity, jax.Array) and round_half_up(float(sparsity), n_tiles) > room:
                raise ValueError(
                    f"{self} leaves room for {room} zeros among {n_tiles}, too few for sparsity={sparsity}: raise "
                    f"max_sparsity or lower sparsity"
                )
            n_pruned = smaller(n_pruned, count(room))
            caps = {path: t.per_matrix(_counts([self._cap(t)] * t.n_matrices)) for path, t in tiles.items()}
            within_cap = _smallest_of_each(tiles, entries, caps)
            entries = {path: e._replace(last=~within_cap[path]) for path, e in entries.items()}
        paths = sorted(scores)
        alike = [likeness(path, entries[path].x) for path in paths]
        masks = smallest_masks([entries[path] for path in paths], n_pruned, rank=by_value, alike=alike)
        pruned = dict(zip(paths, masks, strict=True))
        return {path: tiles[path].expand(~pruned[path], like=scores[path]) for path in scores}

    def capped(self, masks, *, structure=None, axes=None) -> dict[str, jax.Array]:
        """Returns by path whether a weight is at the cap: whether any of its matrices can lose nothing more.

        Args:
          masks: {path: boolean array}, true where a weight is kept, such as {path: w != 0}.
          structure: the structure that was pruned.
          axes: {path: Axes}.

        >>> import jax.numpy as jnp
        >>> weights = {"small": jnp.array([0.0, 2.0]), "large": jnp.array([3.0, 4.0])}
        >>> at_cap = Global(max_sparsity=0.5).capped({path: w != 0 for path, w in weights.items()})
        >>> [path for path, yes in at_cap.items() if yes]
        ['small']
        """
        _check_by_path("masks", masks)
        at_cap = {}
        for path, mask in masks.items():
            with naming(type(self).__name__, path):
                t = Tiles(jnp.shape(mask), structure, (axes or {}).get(path))
                kept = t.any(check_boolean("masks", mask, t.shape))
                at_cap[path] = jnp.any(count_true(kept, t.axis) <= count(t.n_tiles - self._cap(t)))
        return at_cap

    def _cap(self, tiles: Tiles) -> int:
        """The largest number of tiles to prune in one matrix. The fraction is taken as written: 0.29 of 100 is 29."""
        return math.floor(Fraction(str(float(self.max_sparsity))) * tiles.n_tiles)


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
        tiles, entries = _tiled(type(self).__name__, scores, sparsity, structure, axes, within)
        pruned = _smallest_of_each(tiles, entries, _count_pruned(tiles, sparsity))
        return {path: t.expand(~pruned[path], like=scores[path]) for path, t in tiles.items()}


def _tiled(name: str, scores, sparsity, structure, axes, within) -> tuple[dict[str, Tiles], dict[str, Entries]]:
    """The tiles of each weight and their scores, by path."""
    if isinstance(sparsity, tuple):
        raise ValueError(f"sparsity={sparsity} is the same in all weights, but {name} distributes a fraction: give one")
    check_fraction("sparsity", sparsity)
    _check_by_path("scores", scores)
    tiles, entries = {}, {}
    for path, s in scores.items():
        with naming(name, path):
            s = check_weight(s, "scores")
            t = tiles[path] = Tiles(s.shape, structure, (axes or {}).get(path))
            first = None if within is None else ~t.any(check_boolean("within", within[path], s.shape))
            entries[path] = Entries(t.scores(s), first)
    return tiles, entries


def _check_by_path(name: str, arrays) -> None:
    if not isinstance(arrays, Mapping):
        kind = type(arrays).__name__
        raise TypeError(f"{name} must be a dict {{path: array}}, got {kind}: for one weight use keep_largest")


def _smallest_of_each(
    tiles: Mapping[str, Tiles], entries: Mapping[str, Entries], n: Mapping[str, Count]
) -> dict[str, jax.Array]:
    """The masks of the n smallest tiles of each matrix, by path. Weights that are alike are stacked."""
    paths, masks = list(tiles), {}
    for group in grouped((likeness(path, entries[path].x), tiles[path].axis) for path in paths):
        members = [paths[i] for i in group]
        stacked, k = jax.tree.map(lambda *arrays: jnp.stack(arrays), *((entries[p], n[p]) for p in members))
        axis = [a + 1 for a in tiles[members[0]].axis]
        masks |= zip(members, unstacked(smallest_mask(stacked, k, axis=axis, rank=by_value)), strict=True)
    return masks


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
    return Fraction((dims + sum(shape[a] for a in roles.window)) * tiles.n_tiles, max(tiles.matrix_size, 1))


def _sums_after(values: Sequence) -> list:
    """For each value the sum of those after it."""
    sums = list(itertools.accumulate(reversed(values), initial=0))
    return sums[-2::-1]


def _words(ns: Sequence[int]) -> jax.Array:
    return jnp.asarray(np.array(ns, np.uint32))


def _counts(ns: Sequence[int]) -> Count:
    """Integers of any size as one array of counts."""
    return Count(_words([n >> 32 for n in ns]), _words([n & 0xFFFFFFFF for n in ns]))
