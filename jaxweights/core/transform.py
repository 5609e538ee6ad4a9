"""The protocol: a transform is a specification with three functions of one weight."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxweights.core.axes import Axes
from jaxweights.core.checks import check_scalar, check_state, naming

State = dict[str, jax.Array]
Weights = Mapping[str, jax.Array]
"""Weights, or what belongs to each, by path."""
Number = float | jax.Array
"""A number, or a scalar array, traced or not."""
Scalar = Number | Callable[[jax.Array], Any]
"""A number, or an optax schedule: step -> number."""


@dataclasses.dataclass(frozen=True)
class Transform:
    """A map `w -> w'` of weights of one shape, with optional state.

    A subclass is a frozen dataclass whose fields say what to do and whose `apply` does it. Two specs with
    equal fields are equal and hash alike, so passing a new one to a jitted function does not retrace.

    - `init(w, key)` makes the state: a flat dict of arrays, empty by default.
    - `update(w, state, grad)` moves it between steps. It is never differentiated.
    - `apply(w, state)` is the transformed weight: shape and dtype of `w`, differentiable in `w` and in the
      entries of the state that are named in `learned`.

    Training is `update`, then `apply`; evaluation is `apply` alone.

    A field that holds a callable is a schedule: a function of the step. Its current value lives in the state
    under the field's name, set by `update` (the first of which is step 0) and read through `value`.
    """

    learned: ClassVar[frozenset[str]] = frozenset()

    def init(self, w: jax.Array, key: jax.Array) -> State:
        """The state for the weight `w`; `key` is a `jax.random` key for those that draw."""
        names = self._schedules()
        return {n: self._evaluate(n, 0) for n in names} | ({"step": jnp.zeros((), jnp.int32)} if names else {})

    def update(self, w: jax.Array, state: State, grad: jax.Array | None = None) -> State:
        """The state for the next step."""
        names = self._schedules()
        if not names:
            return state
        check_state(state, step=())
        step = state["step"]
        return {**state, **{n: self._evaluate(n, step) for n in names}, "step": step + 1}

    def apply(self, w: jax.Array, state: State) -> jax.Array:
        """The transformed weight."""
        raise TypeError(f"{type(self).__name__} defines no apply: a transform is at least apply(w, state)")

    @property
    def joint(self) -> bool:
        """Whether the state of a weight depends on the other weights that a rule of `on_tree` selects.

        The tree then calls `init_all` and `update_all` on all of them at once. `apply` is always of one.
        """
        return False

    def init_all(self, ws: Weights, keys: Mapping[str, jax.Array], axes: Mapping[str, Axes]) -> dict[str, State]:
        """`init` of several weights by path; `axes` are those that the tree tells of them."""
        return self.each(ws, axes, lambda t, path: t.init(ws[path], keys[path]))

    def update_all(
        self, ws: Weights, states: Mapping[str, State], grads: Mapping[str, jax.Array | None], axes: Mapping[str, Axes]
    ) -> dict[str, State]:
        """`update` of several weights by path."""
        return self.each(ws, axes, lambda t, path: t.update(ws[path], states[path], grads[path]))

    def each(self, paths: Iterable[str], axes: Mapping[str, Axes], f: Callable[[Any, str], Any]) -> dict[str, Any]:
        """{path: f(this spec with the axes of the path, path)}, with the path named in errors."""
        results = {}
        for path in paths:
            with naming(type(self).__name__, path):
                results[path] = f(self.with_axes(axes[path]) if path in axes else self, path)
        return results

    def anchor(self, w: jax.Array, state: State) -> float | jax.Array:
        """The side to err on: where no update gives `apply(w)` bit for bit, `project` stops short of it towards here.

        0 suits a bound on magnitudes. For other constraints it is a point within them.
        """
        return 0.0

    def with_axes(self, axes: Axes) -> Transform:
        """This spec with `axes`, where it has a field for them that the user left open: what a tree tells of them."""
        if "axes" in (f.name for f in dataclasses.fields(self)) and getattr(self, "axes") is None:  # noqa: B009
            return dataclasses.replace(self, **{"axes": axes})
        return self

    def value(self, name: str, state: State) -> Any:
        """The field `name`, or, where it is a schedule, its value at the last update."""
        field = getattr(self, name)
        check_state(state, **{name: ()} if callable(field) else {})
        return state.get(name, field)

    def _evaluate(self, name: str, step) -> jax.Array:
        value = getattr(self, name)(jnp.asarray(step, jnp.int32))
        check_scalar(f"the value of the schedule {name}", value)
        return jnp.asarray(value, jnp.float32)

    def _schedules(self) -> tuple[str, ...]:
        return tuple(f.name for f in dataclasses.fields(self) if callable(getattr(self, f.name)))


@dataclasses.dataclass(frozen=True, init=False)
class Chain(Transform):
    """Transforms one after the other: `Chain(f, g)` is g(f(w)).

    The state of the i-th is kept under names that start with "i.".

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
        for t in transforms:
            check_transform("Chain", t)
        object.__setattr__(self, "transforms", transforms)
        learned = frozenset(f"{i}.{n}" for i, t in enumerate(transforms) for n in t.learned)
        object.__setattr__(self, "learned", learned)

    @property
    def joint(self) -> bool:
        """If one of them is."""
        return any(t.joint for t in self.transforms)

    def init(self, w, key):
        """The states of all, each made for the weight as the ones before it leave it."""
        return self.init_all({"": w}, {"": key}, {})[""]

    def update(self, w, state, grad=None):
        """Updates each on the weight as the ones before it leave it."""
        return self.update_all({"": w}, {"": state}, {"": grad}, {})[""]

    def init_all(self, ws, keys, axes):
        """The states of all for several weights by path."""
        make = lambda i, t, ws: t.init_all(ws, {p: jax.random.fold_in(k, i) for p, k in keys.items()}, axes)
        return self._all(ws, axes, make)

    def update_all(self, ws, states, grads, axes):
        """Updates each for several weights by path."""
        parts = lambda i: {p: self._part(i, s) for p, s in states.items()}
        return self._all(ws, axes, lambda i, t, ws: t.update_all(ws, parts(i), grads, axes))

    def apply(self, w, state):
        """Applies each in turn."""
        for i, t in enumerate(self.transforms):
            w = t.apply(w, self._part(i, state))
        return w

    def anchor(self, w, state):
        """That of the last."""
        last = len(self.transforms) - 1
        return self.transforms[last].anchor(w, self._part(last, state))

    def with_axes(self, axes):
        """The chain of the members with `axes`."""
        return Chain(*(t.with_axes(axes) for t in self.transforms))

    def _all(self, ws: Weights, axes: Mapping[str, Axes], f) -> dict[str, State]:
        """The states f(i, t, ws) of all, by path, each for the weights as the ones before it leave them."""
        states: dict[str, State] = {p: {} for p in ws}
        for i, t in enumerate(self.transforms):
            parts = f(i, t, ws)
            ws = t.each(ws, axes, lambda t, path, ws=ws, parts=parts: t.apply(ws[path], parts[path]))
            for path, part in parts.items():
                states[path] |= {f"{i}.{n}": a for n, a in part.items()}
        return states

    def _part(self, i: int, state: State) -> State:
        check_state(state)
        prefix = f"{i}."
        return {n.removeprefix(prefix): a for n, a in state.items() if n.startswith(prefix)}


def check_transform(where: str, t) -> None:
    """Raises unless `t` is a transform instance."""
    if isinstance(t, type) and issubclass(t, Transform):
        raise TypeError(f"{where} got the class {t.__name__}: make an instance, {t.__name__}(...)")
    if not isinstance(t, Transform):
        raise TypeError(f"{where} needs a jaxweights.Transform, got {type(t).__name__}: {t!r}")
