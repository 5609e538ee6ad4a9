"""Zeros that stay zeros: the mask that a weight already has, held."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from jaxweights.core.checks import check_state, check_weight
from jaxweights.core.transform import Transform
from jaxweights.techniques.sparsification.packed import masked, pack_mask, packed_shape


@dataclasses.dataclass(frozen=True)
class KeepZeros(Transform):
    """Keeps at zero what is zero in the weight that `init` is given: the masks of `one_shot` or of another tool.

    w' = w where the mask is true, else 0; the mask is w₀ ≠ 0 for the first weight w₀. `Prune` would choose a mask of
    its own. `confine(optimizer, KeepZeros())` trains a pruned model further. For a mask that was not applied yet, begin
    with jnp.where(mask, w, 0). A weight that is all zero when it starts stays so: leave it out with `where`.

    State: `mask`, packed by `pack_mask`, true where a weight is kept.

    >>> import jax, jax.numpy as jnp
    >>> w, t = jnp.array([0.0, -2.0, 0.0, 1.0]), KeepZeros()
    >>> state = t.init(w, jax.random.key(0))
    >>> print(t.apply(w + 1, state))
    [ 0. -1.  0.  2.]
    """

    makes_zeros: ClassVar[bool] = True

    def init(self, w, key):
        """Makes the mask: where `w` is not 0. NaN is kept."""
        return {"mask": pack_mask(check_weight(w) != 0)}

    def apply(self, w, state):
        """Returns `w` where the mask is true, else 0."""
        w = check_weight(w)
        check_state(state, mask=packed_shape(w.shape))
        return masked(w, state["mask"])
