"""Packed N:M storage as a one-shot method."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from jaxweights.core.method import Method
from jaxweights.techniques.sparsification.storage.packed import check_packing, pack


@dataclasses.dataclass(frozen=True)
class Pack(Method):
    """Stores an N:M sparse weight as a `PackedArray`, after a method that prunes: `(Wanda((2, 4)), Pack())`.

    Args:
      sparsity: (n, m): at most n of every m consecutive inputs are not 0.

    >>> import jax.numpy as jnp
    >>> import jaxweights as jw
    >>> packed = Pack().fit(jnp.array([[0.0], [2.0], [0.0], [-1.0]]), jw.calibration.InputStats())
    >>> print(packed.values.ravel(), packed.nbytes)
    [ 2. -1.] 9
    """

    sparsity: tuple[int, int] = (2, 4)
    traceable: ClassVar[bool] = False

    def __post_init__(self):
        check_packing(self.sparsity)

    def fit(self, w, stats):
        """`pack(w)`; raises if a group has more than n."""
        return pack(w, sparsity=self.sparsity, axes=stats.axes)
