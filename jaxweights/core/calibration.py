"""What a layer's inputs are like: statistics that one-shot pruning and quantization calibrate with."""

from __future__ import annotations

import dataclasses
import functools
import math
import string
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxweights.core.axes import Axes
from jaxweights.numerics.dtypes import accumulation_dtype
from jaxweights.numerics.norms import safe_divide


class Samples(NamedTuple):
    """An array of vectors: which of its axes number features, and which weights of their own.

    The features are in the order of `features`; all axes that are not named number samples.
    """

    array: jax.Array
    features: tuple[int, ...]
    batch: tuple[int, ...] = ()

    @property
    def samples(self) -> tuple[int, ...]:
        """The axes that number samples."""
        return tuple(a for a in range(self.array.ndim) if a not in self.features + self.batch)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["count", "absolute", "squares", "products"],
    meta_fields=["axes"],
)
@dataclasses.dataclass(frozen=True)
class InputStats:
    """Sums over the inputs x of a layer, in float32 or wider; `a + b` is what both have seen.

    A feature is a row of the weight as `axes.matrix` reads it. A stack of layers, or the groups of a grouped
    convolution, have statistics of their own along leading axes.

    Attributes:
      count: number of inputs, int32, shape (*batch, [groups]).
      absolute: Σ|x|, shape (*batch, [groups,] rows).
      squares: Σx², shape (*batch, [groups,] rows).
      products: Σxxᵀ, shape (*batch, [groups,] rows, rows), or None if it was not asked for.
      axes: how the layer reads its weight.
    """

    count: jax.Array
    absolute: jax.Array
    squares: jax.Array
    products: jax.Array | None
    axes: Axes | None = None

    @property
    def norm(self) -> jax.Array:
        """‖x‖₂ of each feature over all inputs."""
        return jnp.sqrt(self.squares)

    @property
    def mean_abs(self) -> jax.Array:
        """Mean |x| of each feature; 0 without inputs."""
        return safe_divide(self.absolute, self.count[..., None].astype(self.absolute.dtype))

    @property
    def second_moment(self) -> jax.Array:
        """E[xxᵀ], the mean over all inputs; 0 without inputs."""
        if self.products is None:
            raise ValueError("the statistics have no second moment: capture them with second_moment=True")
        return safe_divide(self.products, self.count[..., None, None].astype(self.products.dtype))

    def __add__(self, other: InputStats) -> InputStats:
        return jax.tree.map(jnp.add, self, other)


def input_stats(x: Samples, axes: Axes | None = None, *, second_moment: bool = True) -> InputStats:
    """The statistics of these inputs.

    >>> import jax.numpy as jnp
    >>> stats = input_stats(Samples(jnp.array([[3.0, 1.0], [-4.0, 0.0]]), features=(1,)))
    >>> print(stats.count, stats.norm, stats.mean_abs)
    2 [5. 1.] [3.5 0.5]
    >>> print(stats.second_moment)
    [[12.5  1.5]
     [ 1.5  0.5]]
    """
    w = x.array.astype(accumulation_dtype(x.array.dtype))
    letters = string.ascii_letters[: w.ndim]
    pick = lambda which: "".join(letters[a] for a in which)
    sizes = lambda which: tuple(w.shape[a] for a in which)
    batch, rows = sizes(x.batch), math.prod(sizes(x.features))

    per_feature = pick(x.batch + x.features)
    total = lambda y: jnp.einsum(f"{letters}->{per_feature}", y).reshape(*batch, rows)
    products = None
    if second_moment:
        other = "".join(c.upper() if a in x.features else c for a, c in enumerate(letters))
        spec = f"{letters},{other}->{per_feature}{pick(x.features).upper()}"
        products = jnp.einsum(spec, w, w, precision="highest").reshape(*batch, rows, rows)
    count = jnp.full(batch, math.prod(sizes(x.samples)), jnp.int32)
    return InputStats(count, total(jnp.abs(w)), total(jnp.square(w)), products, axes)
