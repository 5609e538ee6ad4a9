"""A transform of the distance from the initial weights."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxweights.core.checks import check_state, check_weight
from jaxweights.core.transform import Transform, check_transform
from jaxweights.numerics.dtypes import accumulation_dtype
from jaxweights.numerics.rounding import sum_within
from jaxweights.numerics.straight_through import straight_through


@dataclasses.dataclass(frozen=True, init=False)
class Around(Transform):
    """A transform of the distance from the initial weights: w' = w₀ + t(w − w₀).

    `Around(ClipWeights(0.1))` keeps every weight within 0.1 of where it started, `Around(ClipNorm(1.0))` each unit's
    weight vector within 1, and `Around(Sparsify(0.01))` puts back what has hardly moved.

    State: `center`, the weight w₀ that `init` was given, and the state of the transform, under names that start with
    "of.". A weight whose distance t leaves as it is stays bit for bit; the others are rounded towards w₀. So a bound
    on every distance holds bit for bit as computed in float32, after `project` too.

    >>> import jax, jax.numpy as jnp
    >>> import jaxweights as jw
    >>> near = Around(jw.ClipWeights(0.5))
    >>> state = near.init(jnp.array([1.0, 2.0]), jax.random.key(0))
    >>> print(near.apply(jnp.array([1.25, 4.0]), state))
    [1.25 2.5 ]

    References: Li, Grandvalet and Davoine, Explicit Inductive Bias for Transfer Learning with Convolutional Networks,
    arXiv:1802.01483, 2018; Gouk, Hospedales and Pontil, Distance-Based Regularisation of Deep Networks for
    Fine-Tuning, arXiv:2002.08253, 2020.
    """

    transform: Transform

    def __init__(self, transform: Transform):
        check_transform("Around", transform)
        if transform.joint:
            raise ValueError(
                f"Around takes each weight by itself, {transform} takes all at once: leave out distribution"
            )
        object.__setattr__(self, "transform", transform)
        object.__setattr__(self, "learned", frozenset(f"of.{n}" for n in transform.learned))

    def init(self, w, key):
        """A copy of `w`, and the state for a distance of zero."""
        w = check_weight(w)
        inner = self.transform.init(jnp.zeros_like(w, accumulation_dtype(w.dtype)), key)
        return {"center": jnp.copy(w)} | {f"of.{n}": a for n, a in inner.items()}

    def update(self, w, state, grad=None):
        """Updates the transform on the distance."""
        inner = self.transform.update(self._distance(w, state), self._inner(state), grad)
        return {"center": state["center"]} | {f"of.{n}": a for n, a in inner.items()}

    def apply(self, w, state):
        """The centre plus the transformed distance."""
        w, distance = check_weight(w), self._distance(w, state)
        center, new = state["center"].astype(distance.dtype), self.transform.apply(distance, self._inner(state))
        moved = sum_within(center, new, w.dtype)
        return straight_through((center + new).astype(w.dtype), jnp.where(new == distance, w, moved))

    def with_axes(self, axes):
        """Around the transform with `axes`."""
        return Around(self.transform.with_axes(axes))

    def anchor(self, w, state):
        """The centre."""
        return state["center"]

    def _distance(self, w: jax.Array, state) -> jax.Array:
        w = check_weight(w)
        check_state(state, center=w.shape)
        dtype = accumulation_dtype(w.dtype)
        return w.astype(dtype) - state["center"].astype(dtype)

    def _inner(self, state):
        return {n.removeprefix("of."): a for n, a in state.items() if n.startswith("of.")}
