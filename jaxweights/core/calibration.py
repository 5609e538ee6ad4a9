"""Statistics of a layer's inputs, with which one-shot pruning and quantization are calibrated."""

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
    """An array of vectors. Some of its axes number features, some number separate weights, the rest number samples.

    Attributes:
      array: the vectors.
      features: the axes that number features, in the order of the rows of the weight.
      batch: the axes along which each index has a weight of its own.
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
    """Sums over the inputs x of a layer, in float32 or wider. `a + b` adds what two of them have seen.

    A feature is a row of the weight as `axes.matrix` reads it. Each layer of a stack, and each group of a grouped
    convolution, has its own statistics along leading axes. Without data there are only axes: `InputStats(axes=axes)`.

    Attributes:
      count: number of inputs, int32, shape (*batch, [groups]), or None without data.
      absolute: Σ|x|, shape (*batch, [groups,] rows), or None without data.
      squares: Σx², shape (*batch, [groups,] rows), or None without data.
      products: Σxxᵀ, shape (*batch, [groups,] rows, rows), or None if it was not captured.
      axes: how the layer reads its weight.
    """

    count: jax.Array | None = None
    absolute: jax.Array | None = None
    squares: jax.Array | None = None
    products: jax.Array | None = None
    axes: Axes | None = None

    @property
    def norm(self) -> jax.Array:
        """‖x‖₂ of each feature over all inputs."""
        return jnp.sqrt(_captured(self.squares))

    @property
    def mean_abs(self) -> jax.Array:
        """Mean |x| of each feature; 0 without inputs."""
        absolute = _captured(self.absolute)
        return safe_divide(absolute, _captured(self.count)[..., None].astype(absolute.dtype))

    @property
    def second_moment(self) -> jax.Array:
        """E[xxᵀ], the mean over all inputs; 0 without inputs."""
        count = _captured(self.count)
        if self.products is None:
            raise ValueError("the statistics have no second moment: capture them with second_moment=True")
        return safe_divide(self.products, count[..., None, None].astype(self.products.dtype))

    def __add__(self, other: InputStats) -> InputStats:
        return jax.tree.map(jnp.add, self, other)


def _captured(total: jax.Array | None) -> jax.Array:
    if total is None:
        raise ValueError("there are no statistics of the inputs: pass stats=capture(f, params, batches)")
    return total


def input_stats(x: Samples, axes: Axes | None = None, *, second_moment: bool = True) -> InputStats:
    """Computes the statistics of inputs.

    >>> import jax.numpy as jnp
    >>> stats = input_stats(Samples(jnp.array([[3.0, 1.0], [-4.0, 0.0]]), features=(1,)))
    >>> print(stats.count, stats.norm, stats.mean_abs)
    2 [5. 1.] [3.5 0.5]
    >>> print(stats.second_moment)
    [[12.5  1.5]
     [ 1.5  0.5]]
    """
    a = x.array.astype(accumulation_dtype(x.array.dtype))
    batch = tuple(a.shape[i] for i in x.batch)
    rows = math.prod(a.shape[i] for i in x.features)

    letters = string.ascii_letters[: a.ndim]
    features = "".join(letters[i] for i in x.features)
    per_feature = "".join(letters[i] for i in x.batch) + features

    def total(values):
        return jnp.einsum(f"{letters}->{per_feature}", values).reshape(*batch, rows)

    products = None
    if second_moment:
        other = "".join(c.upper() if c in features else c for c in letters)
        spec = f"{letters},{other}->{per_feature}{features.upper()}"
        products = jnp.einsum(spec, a, a, precision="highest").reshape(*batch, rows, rows)
    count = jnp.full(batch, math.prod(a.shape[i] for i in x.samples), jnp.int32)
    return InputStats(count, total(jnp.abs(a)), total(jnp.square(a)), products, axes)
