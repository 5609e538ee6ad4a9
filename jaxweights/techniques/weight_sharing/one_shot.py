"""Clustering as a one-shot method."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxweights.core.axes import Axes, Reading, axes_or_default
from jaxweights.core.checks import check_integer, check_weight
from jaxweights.core.method import Method
from jaxweights.numerics.norms import safe_divide
from jaxweights.techniques.weight_sharing.clustered import store_clusters
from jaxweights.techniques.weight_sharing.clustering import as_layers, cluster, stack_shape


@dataclasses.dataclass(frozen=True)
class Cluster(Method):
    """Stores each weight as the nearest of `n` values, those of the least square error: k-means by `cluster`.

    Each layer of a stack has a codebook of its own.

    Args:
      n: number of values, at most 256. Codes take ⌈log2 n⌉ bits.
      per_unit: whether each output unit has a codebook of its own, which takes n values for each.
      keep_zeros: whether zeros stay zeros. 0 is then one of the `n` values.
      weighted: whether an entry counts with Σx² of the input that it is multiplied by, as in the square error of the
        outputs. It needs data.

    >>> import jax.numpy as jnp
    >>> import jaxweights as jw
    >>> params = {"kernel": jnp.array([[0.0, 0.25], [1.0, 1.25]])}
    >>> print(jw.one_shot(params, Cluster(2))["kernel"].todense())
    [[0.125 0.125]
     [1.125 1.125]]

    References: Han, Mao and Dally, Deep Compression: Compressing Deep Neural Networks with Pruning, Trained
    Quantization and Huffman Coding, arXiv:1510.00149, 2015; Choi, El-Khamy and Lee, Towards the Limit of Network
    Quantization, arXiv:1612.01543, 2016.
    """

    n: int
    _: dataclasses.KW_ONLY
    per_unit: bool = False
    keep_zeros: bool = False
    weighted: bool = False

    def __post_init__(self):
        for name in ("per_unit", "keep_zeros", "weighted"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise TypeError(f"{name} must be True or False, got {value!r}: pass a bool")
        check_integer("n", self.n, 1 + self.keep_zeros, 256)

    @property
    def needs(self):  # type: ignore[override]
        """The norms of the inputs, if it is weighted."""
        return frozenset({"norm"} if self.weighted else ())

    def tells_apart(self, one: Reading, other: Reading) -> bool:
        """Whether the readings differ in what has a codebook of its own, or in the inputs that weigh the entries."""
        return one != other if self.per_unit or self.weighted else sorted(one.batch) != sorted(other.batch)

    def fit(self, w, stats):
        """`cluster` of each layer or output unit, stored by `store_clusters`."""
        w = check_weight(w)
        axes = axes_or_default(stats.axes, w.ndim)
        layers, stack = as_layers(axes, w.shape), stack_shape(axes, w.shape)
        importance = _importance(w, stats.norm, axes) if self.weighted else None
        n_others = self.n - self.keep_zeros
        codebook, index = cluster(
            w, n_others, keep_zeros=self.keep_zeros, importance=importance, axes=axes if self.per_unit else layers
        )
        if stack and not self.per_unit:
            codebook = codebook.reshape(*stack, n_others)
        return store_clusters(codebook, index, axes=axes, has_zeros=self.keep_zeros)


def _importance(w: jax.Array, norm: jax.Array, axes: Axes) -> jax.Array:
    """Σx² of the input that each entry is multiplied by, over the largest."""
    largest = jnp.max(norm, initial=0)
    squares = jnp.square(safe_divide(norm, jnp.broadcast_to(largest, norm.shape)))
    matrix = jax.eval_shape(axes.matrix, w)
    return axes.weight(jnp.broadcast_to(squares[..., None], matrix.shape), w.shape)
