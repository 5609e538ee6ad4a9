"""Shared weights: lookup in a codebook, and a transform that averages the weights of each group."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxweights.core.checks import check_integer, check_state, check_weight
from jaxweights.core.transform import Transform
from jaxweights.numerics.sharding import auto_sharded
from jaxweights.techniques.weight_sharing.clustering import Start, check_start, cluster
from jaxweights.techniques.weight_sharing.groups import average
from jaxweights.techniques.weight_sharing.indices import hash_index


def share(codebook: jax.Array, index: jax.Array) -> jax.Array:
    """Builds a weight by looking up its entries in a codebook.

    w'[i] = codebook[index[i]], and 0 where index[i] is −1. The gradient of a codebook entry is the sum of the
    gradients of all positions that share it.

    Args:
      codebook: float array, shape (n,).
      index: integer array of any shape, with entries from −1 to n − 1. Others give NaN, since they are only known at
        run time.

    Returns:
      Array of the shape of `index` and the dtype of `codebook`.

    Raises:
      TypeError: `codebook` is not a float array or `index` is not an integer array.
      ValueError: `codebook` is not one-dimensional, or empty.

    >>> import jax.numpy as jnp
    >>> print(share(jnp.array([0.5, 2.0]), jnp.array([[0, 1], [1, -1]])))
    [[0.5 2. ]
     [2.  0. ]]

    References: Nowlan and Hinton, Simplifying Neural Networks by Soft Weight-Sharing, Neural Computation 1992.
    """
    codebook = check_weight(codebook, "codebook")
    if codebook.ndim != 1 or codebook.size == 0:
        raise ValueError(f"codebook must be one-dimensional and not empty, got shape {codebook.shape}: ravel it")
    kind = jnp.result_type(index) if isinstance(index, jax.Array | np.ndarray | np.generic | int) else type(index)
    if not jnp.issubdtype(kind, jnp.integer):
        raise TypeError(f"index must be an integer array, got {kind}: use cluster or conv_index")
    index = jnp.asarray(index, jnp.int32)  # in a narrow or unsigned dtype the comparisons below would wrap around
    # A gather reads −1 as the last entry, so −1 is handled separately.
    looked_up = codebook.at[jnp.where(index < -1, codebook.size, index)].get(mode="fill", fill_value=jnp.nan)
    return jnp.where(index == -1, jnp.zeros((), codebook.dtype), looked_up)


@dataclasses.dataclass(frozen=True)
class ShareWeights(Transform):
    """Restricts a weight to at most `n` distinct values: w'[i] is the mean of the weights in the group of i.

    `init` fixes the groups: by value (k-means, `cluster`, whose `start` and `keep_zeros` these are), or at random by a
    hash of the position if `seed` is given (`hash_index`). Zeros that are kept stay zeros, besides the `n` values. The
    mean is the orthogonal projection onto the subspace of shared weights. The members of a group therefore stay equal
    after `optax` updates, and each receives the mean gradient of its group.

    State: `index`, shape of `w`, of the smallest integer dtype that holds it: the group of each weight, and
    −1 for a zero that is kept.

    >>> import jax, jax.numpy as jnp
    >>> w, t = jnp.array([0.0, 0.25, 1.0, 1.25]), ShareWeights(2)
    >>> print(t.apply(w, t.init(w, jax.random.key(0))))
    [0.125 0.125 1.125 1.125]

    References: Han, Mao and Dally, arXiv:1510.00149, 2015; Chen et al., arXiv:1504.04788, 2015.
    """

    n: int
    seed: int | None = None
    start: Start = "linear"
    keep_zeros: bool = False

    def __post_init__(self):
        check_integer("n", self.n, 1, 2**31 - 1)
        if self.seed is not None:
            check_integer("seed", self.seed, 0)
            if self.keep_zeros or self.start != "linear":
                raise ValueError("start and keep_zeros are for groups by value: leave them out with a seed")
        check_start(self.start, self.keep_zeros)

    def init(self, w, key):
        """The group of each weight."""
        w = check_weight(w)
        if self.seed is None:
            _, index = cluster(w, self.n, start=self.start, keep_zeros=self.keep_zeros)
        else:
            index = jnp.asarray(hash_index(w.shape, self.n, self.seed))
        return {"index": index}

    def apply(self, w, state):
        """The mean of each group, at each of its positions."""
        w = check_weight(w)
        check_state(state, index=jax.ShapeDtypeStruct(w.shape, jnp.int32))

        return auto_sharded(lambda w, index: average(w, index, self.n), w, state["index"], like=w)
