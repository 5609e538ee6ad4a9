"""How zeros are shared out among several weights: one threshold for all, or by their shapes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
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
from jaxweights.techniques.sparsification.masks import Tiles, check_within
from jaxweights.techniques.sparsification.structure import Structure


class Distribution(Protocol):
    """Masks of several weights that together have a given fraction of zeros."""

    def masks(
        self,
        scores: Mapping[str, jax.Array],
        sparsity: Number,
        *,
        structure: Structure | None = None,
        axes: Mapping[str, Axes] | None = None,
        within: Mapping[str, jax.Array] | None = None,
    ) -> dict[str, jax.Array]:
        """The masks of the weights, by path, as `keep_largest` has it for one."""
        ...


@dataclasses.dataclass(frozen=True)
class Global:
    """One threshold for all weights: the largest scores are kept, wherever they are.

    round(sparsity·n) of the n weights of all arrays are pruned, exactly; of equal scores those of the lower path, then
    of the lower flat index, go first. With a structure, its units are counted, whatever their sizes.

    >>> import jax.numpy as jnp
    >>> masks = Global().masks({"a": jnp.array([1.0, 2.0]), "b": jnp.array([3.0, 4.0])}, 0.5)
    >>> print(masks["a"], masks["b"])
    [False False] [ True  True]
    """

    def masks(self, scores, sparsity, *, structure=None, axes=None, within=None):
        """The masks by path."""
        tiles, units = _tiled(type(self).__name__, scores, sparsity, structure, axes, within)
        paths = sorted(units)
        n = sum(math.prod(tiles[p].units) for p in paths)
        pruned = smallest_masks([units[p] for p in paths], fraction_of(sparsity, n), rank=by_value)
        masks = {p: tiles[p].spread(~mask, scores[p]) for p, mask in zip(paths, pruned, strict=True)}
        return {p: masks[p] for p in scores}


@dataclasses.dataclass(frozen=True)
class ErdosRenyi:
    """Erdős–Rényi-kernel densities: proportional to Σ(dims)/Π(dims) of each matrix, at most 1.

    The dims are the inputs, the output units and each axis of a convolution's window. A matrix whose density would
    exceed 1 is kept dense, and the rest is rescaled. Of the n weights of all arrays round(sparsity·n) are pruned,
    exactly, and in each matrix those of smallest score.

    >>> import jax.numpy as jnp
    >>> masks = ErdosRenyi().masks({"small": jnp.ones((2, 2)), "large": jnp.ones((20, 20))}, 0.8)
    >>> print(masks["small"].sum(), masks["large"].sum())
    4 77

    References: Mocanu et al., Scalable Training of Artificial Neural Networks with Adaptive Sparse Connectivity
    inspired by Network Science, arXiv:1707.04780, 2017; Evci, Gale, Menick, Castro and Elsen, Rigging the Lottery:
    Making All Tickets Winners, arXiv:1911.11134, 2019.
    """

    def masks(self, scores, sparsity, *, structure=None, axes=None, within=None):
        """The masks by path."""
        tiles, units = _tiled(type(self).__name__, scores, sparsity, structure, axes, within)
        pruned = _pruned(tiles, sparsity)
        return {
            p: tiles[p].spread(~smallest_mask(units[p], pruned[p], axis=tiles[p].axis, rank=by_value), scores[p])
            for p in scores
        }


def _tiled(name, scores, sparsity, structure, axes, within):
    """The tiles and their scores, by path."""
    if isinstance(sparsity, tuple):
        raise ValueError(f"sparsity={sparsity} is the same in all weights, {name} shares out a fraction: give a number")
    check_scalar("sparsity", sparsity, 0, 1)
    if not isinstance(scores, Mapping):
        raise TypeError(f"scores must be a dict {{path: array}}, got {type(scores).__name__}: for one use keep_largest")
    tiles, units = {}, {}
    for path, s in scores.items():
        with naming(name, path):
            s = check_weight(s, "scores")
            tiles[path] = Tiles(s.shape, structure, (axes or {}).get(path))
            inside = None if within is None else check_within(within[path], s.shape)
            units[path] = tiles[path].scores(s, inside)
    return tiles, units


def _pruned(tiles: Mapping[str, Tiles], sparsity: Number) -> dict[str, Count]:
    """How many tiles to prune in each matrix, by path, shaped for `smallest_mask`.

    The matrices are gone through in order of their densities, the densest first. Each gets its part, ε·Σ(dims), of
    what is left to keep, but no more than it holds; so the rest is rescaled, and the total is exact.
    """
    matrices = []  # (density, path, index in the batch, tiles, Σ(dims) in tiles)
    for path in sorted(tiles):
        t = tiles[path]
        size = lambda axes, t=t: math.prod(t.shape[a] for a in axes)
        dims = size(t.reading.input) + size(t.reading.output) + sum(t.shape[a] for a in t.reading.window)
        part = Fraction(dims, max(t.weights, 1))
        matrices += [(part / max(t.size, 1), path, i, t.size, part) for i in range(size(t.reading.batch))]
    matrices.sort(key=lambda m: (-m[0], m[1], m[2]))
    sizes, parts = [m[3] for m in matrices], [m[4] for m in matrices]
    after = lambda values: [sum(values[i + 1 :]) for i in range(len(values))]
    # Their ratios to what is left, in units of 2⁻³². The last gets all of it, as the bound from below has it.
    ratios = [min(int(2**32 * p / (p + rest or 1)), 2**32 - 1) for p, rest in zip(parts, after(parts), strict=True)]

    def step(left, matrix):
        ratio, n, rest = matrix
        kept = smaller(smaller(scaled(left, ratio), n), left)
        kept = select(left <= kept + rest, kept, left - smaller(rest, left))
        return left - kept, n - kept

    total = sum(sizes)
    words = lambda ns: jnp.asarray(np.array(ns, np.uint32))
    counts = lambda ns: Count(words([n >> 32 for n in ns]), words([n & 0xFFFFFFFF for n in ns]))
    columns = (words(ratios), counts(sizes), counts(after(sizes)))
    _, pruned = jax.lax.scan(step, count(total) - fraction_of(sparsity, total), columns)
    places: dict[str, list[int]] = {path: [] for path in tiles}
    order = sorted(range(len(matrices)), key=lambda i: (matrices[i][1], matrices[i][2]))
    for i in order:
        places[matrices[i][1]].append(i)
    return {p: tiles[p].batch(Count(*(limb[np.array(at, int)] for limb in pruned))) for p, at in places.items()}
