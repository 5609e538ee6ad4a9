"""The protocol: a transform is a specification with three functions of one weight."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxweights.axes import Axes
from jaxweights.checks import check_scalar, check_state, naming

State = dict[str, jax.Array]
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

    @property
    def joint(self) -> bool:
        """Whether it sees several weights at once: its verbs then take and return dicts by path.

        `init({path: w}, {path: key})`, `update({path: w}, {path: state}, {path: grad})`,
        `apply({path: w}, {path: state})`, `anchor` and `with_axes({path: axes})` alike. All weights that a rule of
        `on_tree` selects come together.
        """
        return False

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

    def init(self, w: Any, key: Any) -> Any:
        """The states of all, each made for the weight as the ones before it leave it."""
        state: State = {}
        for i, t in enumerate(self._members):
            part = t.init(w, jax.tree.map(lambda k, i=i: jax.random.fold_in(k, i), key))
            w = t.apply(w, part)
            state = self._with(i, part, state)
        return state

    def update(self, w: Any, state: Any, grad: Any = None) -> Any:
        """Updates each on the weight as the ones before it leave it."""
        new: State = {}
        for i, t in enumerate(self._members):
            part = t.update(w, self._part(i, state), grad)
            w = t.apply(w, part)
            new = self._with(i, part, new)
        return new

    def apply(self, w: Any, state: Any) -> Any:
        """Applies each in turn."""
        for i, t in enumerate(self._members):
            w = t.apply(w, self._part(i, state))
        return w

    def anchor(self, w: Any, state: Any) -> Any:
        """That of the last."""
        last = len(self.transforms) - 1
        return self._members[last].anchor(w, self._part(last, state))

    def with_axes(self, axes: Any) -> Transform:
        """The chain of the members with `axes`."""
        return Chain(*(t.with_axes(axes) for t in self._members))

    @property
    def _members(self) -> tuple[Transform, ...]:
        """All joint if one of them is."""
        return tuple(Each(t) if self.joint and not t.joint else t for t in self.transforms)

    def _with(self, i: int, part: State, state: State) -> State:
        """`state` and the part of the i-th."""
        if self.joint:
            return {p: _named(i, s, state.get(p, {})) for p, s in part.items()}  # type: ignore
        return _named(i, part, state)

    def _part(self, i: int, state: State) -> State:
        check_state(state)
        if self.joint:
            return {p: _own(i, s) for p, s in state.items()}  # type: ignore
        return _own(i, state)


def _named(i: int, part: State, state: State) -> State:
    return state | {f"{i}.{n}": a for n, a in part.items()}


def _own(i: int, state: State) -> State:
    prefix = f"{i}."
    return {n.removeprefix(prefix): a for n, a in state.items() if n.startswith(prefix)}


@dataclasses.dataclass(frozen=True)
class Each(Transform):
    """A transform of one weight as a joint one, that treats each by itself: a member of a joint `Chain`."""

    transform: Transform
    axes: tuple[tuple[str, Axes], ...] = ()

    def __post_init__(self):
        object.__setattr__(self, "learned", self.transform.learned)

    @property
    def joint(self) -> bool:
        """Yes."""
        return True

    def init(self, w: Any, key: Any) -> Any:
        """The state of each."""
        return self._each(w, lambda t, p: t.init(w[p], key[p]))

    def update(self, w: Any, state: Any, grad: Any = None) -> Any:
        """Updates each."""
        return self._each(w, lambda t, p: t.update(w[p], state.get(p, {}), (grad or {}).get(p)))

    def apply(self, w: Any, state: Any) -> Any:
        """Applies it to each."""
        return self._each(w, lambda t, p: t.apply(w[p], state.get(p, {})))

    def anchor(self, w: Any, state: Any) -> Any:
        """That of each."""
        return self._each(w, lambda t, p: t.anchor(w[p], state.get(p, {})))

    def with_axes(self, axes: Any) -> Transform:
        """With the axes of each path."""
        return dataclasses.replace(self, axes=tuple(sorted(axes.items())))

    def _each(self, w, f) -> dict[str, Any]:
        axes, results = dict(self.axes), {}
        for path in w:
            t = self.transform.with_axes(axes[path]) if path in axes else self.transform
            with naming(type(t).__name__, path):
                results[path] = f(t, path)
        return results


def check_transform(where: str, t) -> None:
    """Raises unless `t` is a transform instance."""
    if isinstance(t, type) and issubclass(t, Transform):
        raise TypeError(f"{where} got the class {t.__name__}: make an instance, {t.__name__}(...)")
    if not isinstance(t, Transform):
        raise TypeError(f"{where} needs a jaxweights.Transform, got {type(t).__name__}: {t!r}")
