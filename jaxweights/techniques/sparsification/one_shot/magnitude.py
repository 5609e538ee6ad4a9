"""Magnitude pruning as a one-shot method."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from jaxweights.core.method import Method
from jaxweights.techniques.sparsification.masks import magnitude_mask
from jaxweights.techniques.sparsification.pattern import Sparsity, check_sparsity


@dataclasses.dataclass(frozen=True)
class Magnitude(Method):
    """Sets the weights of smallest magnitude to 0: what `magnitude_mask` does not keep. It needs no data.

    Args:
      sparsity: fraction of zeros in [0, 1]; or (n, m), to keep n of every m consecutive inputs.

    >>> import jax.numpy as jnp
    >>> import jaxweights as jw
    >>> print(Magnitude(0.5).fit(jnp.array([0.3, -2.0, 0.1, 1.0]), jw.calibration.InputStats()))
    [ 0. -2.  0.  1.]

    References: Han, Pool, Tran and Dally, Learning both Weights and Connections for Efficient Neural Networks,
    arXiv:1506.02626, 2015.
    """

    sparsity: Sparsity

    def __post_init__(self):
        check_sparsity(self.sparsity, 0)

    def fit(self, w, stats):
        """Returns `w` where it is large, else 0."""
        return jnp.where(magnitude_mask(w, self.sparsity, axes=stats.axes), w, 0)

    def tells_apart(self, one, other):
        """A fraction is one of each matrix, whichever are its rows. (n, m) runs along the inputs."""
        return one != other if isinstance(self.sparsity, tuple) else not one.same_matrices(other)
