"""Shared weights: a look-up in a codebook, and a transform that makes the positions of each group equal."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxweights.core.axes import Axes, axes_or_default
from jaxweights.core.checks import check_choice, check_integer, check_state, check_weight
from jaxweights.core.transform import Transform
from jaxweights.numerics.sharding import auto_sharded
from jaxweights.techniques.weight_sharing.clustered import MOST_VALUES, store_clusters
from jaxweights.techniques.weight_sharing.clustering import Start, as_layers, check_start, cluster, stack_shape
from jaxweights.techniques.weight_sharing.convolution import Convolution
from jaxweights.techniques.weight_sharing.groups import average, group_means, inside
from jaxweights.techniques.weight_sharing.indices import index_dtype
from jaxweights.techniques.weight_sharing.patterns import Pattern, values_of
from jaxweights.techniques.weight_sharing.vectors import ProductQuantized


def share(codebook: jax.Array, index: jax.Array | Pattern, *, axes: Axes | None = None) -> jax.Array:
    """Builds a weight by looking up its entries in a codebook.

    w'[i] = codebook[index[i]], and 0 where index[i] is −1. The gradient of a codebook entry is the sum of the
    gradients of all positions that share it.

    Args:
      codebook: float array, shape (n,); (units, n) with `axes`; of any shape with the right size for a pattern.
      index: integer array of any shape, with entries from −1 to n − 1. Others give NaN, since they are only known at
        run time. Or a pattern of `jaxweights.sharing`, which says by place which positions share a value.
      axes: how the weight is read as a matrix, if each output unit has a codebook of its own, as `cluster` with `axes`
        returns them.

    Returns:
      Array of the shape of `index` and the dtype of `codebook`.

    Raises:
      TypeError: `codebook` is not a float array, or `index` neither an integer array nor a pattern.
      ValueError: the shape of `codebook` does not fit, or it is empty.

    >>> import jax.numpy as jnp
    >>> import jaxweights as jw
    >>> print(share(jnp.array([0.5, 2.0]), jnp.array([[0, 1], [1, -1]])))
    [[0.5 2. ]
     [2.  0. ]]
    >>> print(share(jnp.array([0.5, 2.0]), jw.sharing.Circulant(shape=(2, 2))))
    [[0.5 2. ]
     [2.  0.5]]

    References: Nowlan and Hinton, Simplifying Neural Networks by Soft Weight-Sharing, Neural Computation 1992.
    """
    if isinstance(index, Pattern):
        return index.weight(values_of(codebook, index))
    codebook = check_weight(codebook, "codebook")
    if codebook.size == 0 or (codebook.ndim != 1 and axes is None):
        raise ValueError(
            f"codebook must be one-dimensional and not empty, got shape {codebook.shape}: ravel it, or give the axes "
            f"if it has a row for each output unit"
        )
    kind = jnp.result_type(index) if isinstance(index, jax.Array | np.ndarray | np.generic | int) else type(index)
    if not jnp.issubdtype(kind, jnp.integer):
        raise TypeError(f"index must be an integer array, got {kind}: use cluster or conv_index, or a pattern")
    index = jnp.asarray(index, jnp.int32)  # in a narrow or unsigned dtype the comparisons below would wrap around
    n = codebook.shape[-1]
    place = index if axes is None else _first_of_unit(codebook, index, axes) + index
    # A gather reads −1 as the last entry, so −1 is handled separately.
    place = jnp.where((index < 0) | (index >= n), codebook.size, place)
    looked_up = codebook.ravel().at[place].get(mode="fill", fill_value=jnp.nan)
    return jnp.where(index == -1, jnp.zeros((), codebook.dtype), looked_up)


def _first_of_unit(codebook: jax.Array, index: jax.Array, axes: Axes) -> jax.Array:
    """Where the values of its output unit start in the codebook, for each position."""
    *lead, rows, columns = jax.eval_shape(axes_or_default(axes, index.ndim).matrix, index).shape
    n_units, n = math.prod(lead) * columns, codebook.shape[-1]
    if codebook.size != n_units * n or codebook.ndim < 2:
        raise ValueError(
            f"codebook must have shape ({n_units}, n), a row for each output unit, got {codebook.shape}: pass what "
            f"cluster returned for these axes"
        )
    first = jnp.arange(0, n_units * n, n, jnp.int32).reshape(*lead, 1, columns)
    return axes.weight(jnp.broadcast_to(first, (*lead, rows, columns)), index.shape)


@dataclasses.dataclass(frozen=True)
class ShareWeights(Transform):
    """Restricts a weight to few distinct values: the positions of a group share one.

    `init` fixes the groups. These are by value, if `groups` is their number (k-means, `cluster`, whose `start` and
    `keep_zeros` these are); or by place, if it is a pattern, such as `jw.sharing.Hashed(256)` or
    `jw.sharing.Circulant()`; or of sub-vectors, with `jw.sharing.ProductQuantized(256, length=4)`. Zeros that are kept
    stay zeros, besides the values of the groups. Each layer of a stack, along the batch axes of `axes`, has groups of
    its own, but for a pattern of the whole weight.

    The value of a group is the mean of its weights: w'[i] is the mean of the group of i, the orthogonal projection onto
    the subspace of shared weights. The members of a group therefore stay equal after `optax` updates, and each receives
    the mean gradient of its group.

    With a `codebook_gradient`, the value is learned instead: w'[i] = codebook[index[i]]. The codebook starts at the
    means, and the weight itself has no more effect and a gradient of zero. The gradient of an entry is the "sum" of the
    gradients of its group, as in Deep Compression, or their "mean". This is for training with the state in the
    optimizer: under `project`, which keeps what is learned at its initial value, weights would stay as they are.

    `store` gives a `ClusteredArray` of up to 256 values; weights of more stay arrays.

    State: `index`, shape of `w`, of the smallest integer dtype that holds it: the group of each weight, and
    −1 for a zero that is kept. With a learned codebook: `codebook`, shape (n,), float32 or wider, and for its mean
    gradient `size`, int32 (n,), the number of weights in each group.

    >>> import jax, jax.numpy as jnp
    >>> w, t = jnp.array([0.0, 0.25, 1.0, 1.25]), ShareWeights(2)
    >>> print(t.apply(w, t.init(w, jax.random.key(0))))
    [0.125 0.125 1.125 1.125]

    References: Han, Mao and Dally, arXiv:1510.00149, 2015; Chen et al., arXiv:1504.04788, 2015.
    """

    groups: int | Pattern | ProductQuantized
    start: Start = "optimal"
    keep_zeros: bool = False
    codebook_gradient: Literal["sum", "mean"] | None = None
    axes: Axes | None = None
    takes_axes: ClassVar[bool] = True

    def __post_init__(self):
        check_start(self.start, self.keep_zeros)
        if not isinstance(self.groups, Pattern | ProductQuantized):
            check_integer("groups", self.groups, 1, 2**31 - 1)
            object.__setattr__(self, "groups", int(self.groups))
        elif self.keep_zeros or self.start != "optimal":
            raise ValueError(f"start and keep_zeros are for groups by value: leave them out with {self.groups}")
        if self.codebook_gradient is not None:
            check_choice("codebook_gradient", self.codebook_gradient, ("sum", "mean"))
            object.__setattr__(self, "learned", frozenset({"codebook"}))

    def tells_apart(self, a, b):
        """Returns whether the groups depend on how the weight is read. Otherwise only how it is stored does."""
        if isinstance(self.groups, int):
            return sorted(a.batch) != sorted(b.batch) and super().tells_apart(a, b)
        return (not isinstance(self.groups, Pattern) or self.groups.reads_matrix) and super().tells_apart(a, b)

    def init(self, w, key):
        """The group of each weight, and the learned codebook."""
        w = check_weight(w)
        state = {"index": self._index(w, key)}
        if self.codebook_gradient is None:
            return state
        mean, size = self._means(w, state)
        return state | {"codebook": mean} | ({"size": size} if self.codebook_gradient == "mean" else {})

    def apply(self, w, state):
        """The value of its group at each position."""
        w, n = self._checked(w, state)
        index = state["index"]
        if self.codebook_gradient is None:
            return auto_sharded(lambda w, index: average(w, index, n), w, index, like=w)

        def look_up(w, index, codebook):
            return codebook.at[inside(index, n)].get(mode="fill", fill_value=0).astype(w.dtype)

        return auto_sharded(look_up, w, index, self._codebook(state), like=w)

    def store(self, w, state):
        """The weight as a `ClusteredArray`, or an array if it has more than 256 values."""
        w, n = self._checked(w, state)
        has_zeros = self.keep_zeros or isinstance(self.groups, Convolution)
        if (self.groups if isinstance(self.groups, int) else n) + has_zeros > MOST_VALUES:
            return self.apply(w, state)
        codebook = self._means(w, state)[0] if self.codebook_gradient is None else jnp.asarray(state["codebook"])
        index = state["index"]
        if isinstance(self.groups, int) and (layers := as_layers(self.axes, w.shape)) is not None:
            codebook = codebook.reshape(*stack_shape(self.axes, w.shape), self.groups)
            index = jnp.where(index < 0, index, index - _first_of_layer(layers, w.shape, self.groups))
        return store_clusters(codebook.astype(w.dtype), index, axes=self.axes, has_zeros=has_zeros)

    def _index(self, w: jax.Array, key: jax.Array) -> jax.Array:
        if isinstance(self.groups, int):
            draws, layers = key if self.start == "k-means++" else None, as_layers(self.axes, w.shape)
            _, index = cluster(w, self.groups, start=self.start, keep_zeros=self.keep_zeros, axes=layers, key=draws)
            if layers is None:
                return index
            index = index.astype(index_dtype(self._n(w.shape)))
            first = _first_of_layer(layers, w.shape, self.groups).astype(index.dtype)
            return jnp.where(index < 0, index, index + first)
        axes, shape = axes_or_default(self.axes, w.ndim), self._read(w.shape)
        if isinstance(self.groups, ProductQuantized):
            index = self.groups.positions(axes.matrix(w), key)
            return axes.weight(index, w.shape).astype(index_dtype(self._n(w.shape)))
        if not self.groups.reads_matrix:
            return jnp.asarray(self.groups.of(shape).index())
        *lead, rows, columns = shape
        pattern = self.groups.of((rows, columns))
        one = pattern.index().astype(index_dtype(self._n(w.shape)))
        first = np.arange(math.prod(lead), dtype=one.dtype).reshape(*lead, 1, 1) * one.dtype.type(pattern.n_values)
        return axes.weight(jnp.asarray(np.where(one < 0, one, one + first)), w.shape)

    def _read(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape in which the groups are laid out: of the weight, or of the matrices as which it is read."""
        if isinstance(self.groups, Pattern) and not self.groups.reads_matrix:
            return shape
        return jax.eval_shape(
            axes_or_default(self.axes, len(shape)).matrix, jax.ShapeDtypeStruct(shape, jnp.int32)
        ).shape

    def _n(self, shape: tuple[int, ...]) -> int:
        """The number of groups of a weight of this shape."""
        if isinstance(self.groups, int):
            return self.groups * math.prod(stack_shape(self.axes, shape))
        shape = self._read(shape)
        if isinstance(self.groups, ProductQuantized):
            return self.groups.n_values(shape)
        if not self.groups.reads_matrix:
            return self.groups.of(shape).n_values
        return math.prod(shape[:-2]) * self.groups.of(shape[-2:]).n_values

    def _checked(self, w, state):
        """The weight and the number of its groups. Raises if the state is not that of this weight."""
        w = check_weight(w)
        check_state(state, index=jax.ShapeDtypeStruct(w.shape, jnp.int32))
        n = self._n(w.shape)
        if self.codebook_gradient is not None:
            check_state(state, codebook=(n,))
        if self.codebook_gradient == "mean":
            check_state(state, size=jax.ShapeDtypeStruct((n,), jnp.int32))
        return w, n

    def _means(self, w, state):
        n = self._n(w.shape)
        return auto_sharded(lambda w, index: group_means(w, index, n), w, state["index"])

    def _codebook(self, state):
        codebook = jnp.asarray(state["codebook"])
        return codebook if self.codebook_gradient == "sum" else _with_mean_gradient(codebook, state["size"])


def _first_of_layer(layers: Axes, shape: tuple[int, ...], groups: int) -> jax.Array:
    """The number of the first group of its layer, for each position of a stack."""
    *lead, rows, _ = jax.eval_shape(layers.matrix, jax.ShapeDtypeStruct(shape, jnp.int32)).shape
    first = jnp.arange(0, math.prod(lead) * groups, groups, jnp.int32).reshape(*lead, 1, 1)
    return layers.weight(jnp.broadcast_to(first, (*lead, rows, 1)), shape)


@jax.custom_jvp
def _with_mean_gradient(codebook: jax.Array, size: jax.Array) -> jax.Array:
    """The codebook, with gradients divided by the number of members."""
    return codebook


@_with_mean_gradient.defjvp
def _divide(primals, tangents):
    (codebook, size), (change, _) = primals, tangents
    return codebook, change / jnp.maximum(size, 1).astype(change.dtype)
