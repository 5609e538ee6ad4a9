"""Transforms made of others: one after the other, and of the distance from the initial weights."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterable, Mapping

import jax
import jax.numpy as jnp

from jaxweights.core.axes import Axes
from jaxweights.core.checks import check_state, check_weight
from jaxweights.core.joint import JointTransform, Weights, apply_each, for_each, init_each, is_joint, update_each
from jaxweights.core.transform import State, Transform, check_transform
from jaxweights.numerics.dtypes import accumulation_dtype
from jaxweights.numerics.rounding import sum_within
from jaxweights.numerics.straight_through import straight_through


@dataclasses.dataclass(frozen=True)
class Wrapper(JointTransform):
    """A transform made of parts, whose states it keeps in its own: the entry `n` of a part under "part.n"."""

    def __post_init__(self):
        for t in self.parts.values():
            check_transform(type(self).__name__, t)
        learned = frozenset(f"{part}.{n}" for part, t in self.parts.items() for n in t.learned)
        object.__setattr__(self, "learned", learned)

    @property
    def parts(self) -> Mapping[str, Transform]:
        """The parts by the names under which their states are kept."""
        raise TypeError(f"{type(self).__name__} defines no parts")

    def tells_apart(self, a, b):
        """Returns whether a part does."""
        return any(t.tells_apart(a, b) for t in self.parts.values())

    @property
    def joint(self) -> bool:
        """Whether a part is."""
        return any(map(is_joint, self.parts.values()))


@dataclasses.dataclass(frozen=True, init=False)
class Chain(Wrapper):
    """Transforms one after the other: `Chain(f, g)` is g(f(w)).

    State: that of the i-th transform, under names that start with "i.".

    Warns if a mask is followed by a transform that moves its zeros, as `Chain(Prune(0.9), FakeQuantize(8))` does.

    >>> import jax.numpy as jnp
    >>> import jaxweights as jw
    >>> chain = Chain(jw.ClipWeights(1.0), jw.Sparsify(0.5))
    >>> print(chain.apply(jnp.array([-3.0, 0.2, 0.7]), {}))
    [-1.   0.   0.7]
    """

    transforms: tuple[Transform, ...]

    def __init__(self, *transforms: Transform):
        if not transforms:
            raise ValueError("Chain needs at least one transform: Chain(t1, t2, ...)")
        object.__setattr__(self, "transforms", transforms)
        self.__post_init__()
        if any(t.makes_zeros for t in transforms) and self.moves_zeros:
            warnings.warn(
                f"Chain moves the zeros of a mask to other values: {self.moves_zeros}, or put the mask last",
                stacklevel=2,
            )

    def __post_init__(self):
        super().__post_init__()
        makers = [i for i, t in enumerate(self.transforms) if t.makes_zeros]
        remedies = [t.moves_zeros for t in self.transforms[makers[-1] if makers else 0 :] if t.moves_zeros]
        object.__setattr__(self, "moves_zeros", remedies[0] if remedies else "")
        object.__setattr__(self, "makes_zeros", bool(makers) and not remedies)

    @property
    def parts(self):
        """The transforms by their places."""
        return {str(i): t for i, t in enumerate(self.transforms)}

    def init_all(self, ws, keys, axes):
        """Makes the state of each transform for the weights as those before it leave them."""

        def make(i, t, ws):
            return init_each(t, ws, {path: jax.random.fold_in(key, i) for path, key in keys.items()}, axes)

        return self._in_turn(make, ws, axes)

    def update_all(self, ws, states, grads, axes):
        """Updates each transform on the weights as those before it leave them."""

        def move(i, t, ws):
            return update_each(t, ws, {path: state_of(str(i), state) for path, state in states.items()}, grads, axes)

        return self._in_turn(move, ws, axes)

    def apply(self, w, state):
        """Applies each transform in turn."""
        for part, t in self.parts.items():
            w = t.apply(w, state_of(part, state))
        return w

    def store(self, w, state):
        """Stores by the last transform what those before it make of the weight."""
        *before, (last, t) = self.parts.items()
        for part, of_part in before:
            w = of_part.apply(w, state_of(part, state))
        return t.store(w, state_of(last, state))

    def anchor(self, w, state):
        """Returns that of the last transform."""
        part, last = list(self.parts.items())[-1]
        return last.anchor(w, state_of(part, state))

    def with_axes(self, axes):
        """Returns the chain of the transforms with `axes`."""
        return self._of(t.with_axes(axes) for t in self.transforms)

    def with_convolution(self, convolution):
        """Returns the chain of the transforms for the layer with this geometry."""
        return self._of(t.with_convolution(convolution) for t in self.transforms)

    def _of(self, transforms: Iterable[Transform]) -> Chain:
        """The chain of these in place of its transforms, without a second warning."""
        chain = object.__new__(Chain)
        object.__setattr__(chain, "transforms", tuple(transforms))
        chain.__post_init__()
        return chain

    def _in_turn(
        self, f: Callable[[int, Transform, Weights], dict[str, State]], ws: Weights, axes: Mapping[str, Axes]
    ) -> dict[str, State]:
        """The states by path, where f(i, t, ws) makes those of the i-th transform for the weights that reach it."""
        new: dict[str, State] = {path: {} for path in ws}
        states: dict[str, State] = {}
        for i, t in enumerate(self.transforms):
            if i > 0:
                ws = apply_each(self.transforms[i - 1], ws, states, axes)
            states = f(i, t, ws)
            for path, state in states.items():
                new[path] |= named(str(i), state)
        return new


@dataclasses.dataclass(frozen=True)
class Around(Wrapper):
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

    @property
    def parts(self):
        """The transform of the distance."""
        return {"of": self.transform}

    def init_all(self, ws, keys, axes):
        """Copies the weights, and makes the states for distances of zero."""
        ws = for_each(self, ws, axes, lambda _, path: check_weight(ws[path]))
        zeros = {path: jnp.zeros_like(w, accumulation_dtype(w.dtype)) for path, w in ws.items()}
        inner = init_each(self.transform, zeros, keys, axes)
        return {path: {"center": jnp.copy(w)} | named("of", inner[path]) for path, w in ws.items()}

    def update_all(self, ws, states, grads, axes):
        """Updates the transform on the distances."""
        distances = for_each(self, ws, axes, lambda _, path: _distance(ws[path], states[path]))
        inner = {path: state_of("of", states[path]) for path in ws}
        inner = update_each(self.transform, distances, inner, grads, axes)
        return {path: {"center": states[path]["center"]} | named("of", inner[path]) for path in ws}

    def apply(self, w, state):
        """Returns the center plus the transformed distance."""
        w, distance = check_weight(w), _distance(w, state)
        center, new = state["center"].astype(distance.dtype), self.transform.apply(distance, state_of("of", state))
        moved = sum_within(center, new, w.dtype)
        return straight_through((center + new).astype(w.dtype), jnp.where(new == distance, w, moved))

    def with_axes(self, axes):
        """Returns the same around the transform with `axes`."""
        return Around(self.transform.with_axes(axes))

    def with_convolution(self, convolution):
        """Returns the same around the transform for the layer with this geometry."""
        return Around(self.transform.with_convolution(convolution))

    def anchor(self, w, state):
        """Returns the center."""
        return state["center"]


def named(part: str, state: State) -> State:
    """The state of a part under the names that it has in that of the whole."""
    return {f"{part}.{name}": entry for name, entry in state.items()}


def state_of(part: str, state: State) -> State:
    """The state of a part, out of that of the whole."""
    check_state(state)
    prefix = f"{part}."
    return {name.removeprefix(prefix): entry for name, entry in state.items() if name.startswith(prefix)}


def _distance(w: jax.Array, state: State) -> jax.Array:
    w = check_weight(w)
    check_state(state, center=w.shape)
    dtype = accumulation_dtype(w.dtype)
    return w.astype(dtype) - state["center"].astype(dtype)
