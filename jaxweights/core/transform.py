"""The protocol: a transform is a specification with three functions of one weight."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp

from jaxweights.core.axes import Axes, Reading
from jaxweights.core.checks import check_exact, check_scalar, check_state, is_floating
from jaxweights.core.convolution import Convolution
from jaxweights.core.stored import Stored
from jaxweights.core.tracing import is_hashable

State = dict[str, jax.Array]
Number = float | jax.Array
"""A number, or a scalar array, traced or not."""
Scalar = Number | Callable[[jax.Array], Any]
"""A number, or an optax schedule: step -> number."""


@dataclasses.dataclass(frozen=True)
class Transform:
    """A map `w -> w'` of weights of one shape, with optional state.

    A subclass is a frozen dataclass whose fields say what to do and whose `apply` does it. Two specs with equal
    fields are equal and hash alike, so passing a new one to a jitted function does not retrace.

    - `init(w, key)` makes the state: a flat dict of arrays, empty by default.
    - `update(w, state, grad)` moves it between steps. It is never differentiated.
    - `apply(w, state)` is the transformed weight. It has the shape and dtype of `w`, and is differentiable in `w` and
      in the learned entries of the state.
    - `store(w, state)` is the same weight as it is kept after training: by default an array, under `FakeQuantize` and
      `LSQ` a `QuantizedArray`, under `ShareWeights` a `ClusteredArray`.

    Training is `update`, then `apply`; evaluation is `apply` alone. A mean of the states of several steps is a state if
    all entries are floating-point; `update` it on the mean of the weights before evaluation. Masks, indices, seeds and
    steps have no mean: take those of the last step. A tree, and so every level, refuses an averaged one.

    A subclass declares what others need to know of it:

    - `learned`: the entries of its state that receive gradients.
    - `scheduled`: the fields that take an optax schedule in place of a number. The current value of a schedule is kept
      in the state under the field's name. `update` sets it, the first time for step 0; `value` reads it.
    - `takes_axes`: whether its field `axes` says how a weight is read. A tree fills in an `axes` of None with what it
      knows of the weight.
    - `unitwise`: whether the result for one output unit depends on its own weights alone, so that output and batch axes
      are alike to it.
    - `transposable`: whether a matrix and its transpose come out alike, as they do where singular values decide.
    - `makes_zeros`: whether it sets weights to zero that are to stay so.
    - `moves_zeros`: what to do so that zeros stay, if it gives them other values. `Chain` says so after a mask.

    See `jaxweights.JointTransform` for transforms that must see several weights at once.
    """

    learned: ClassVar[frozenset[str]] = frozenset()
    scheduled: ClassVar[frozenset[str]] = frozenset()
    takes_axes: ClassVar[bool] = False
    unitwise: ClassVar[bool] = False
    transposable: ClassVar[bool] = False
    makes_zeros: ClassVar[bool] = False
    moves_zeros: ClassVar[str] = ""

    def init(self, w: jax.Array, key: jax.Array) -> State:
        """Makes the state for the weight `w`, from a `jax.random` key if it draws."""
        return self.init_schedules()

    def update(self, w: jax.Array, state: State, grad: jax.Array | None = None) -> State:
        """Returns the state for the next step.

        `grad` is the gradient of the loss in the transformed weight, or None where the caller has none. It is never an
        optimizer's update.
        """
        return self.update_schedules(state)

    def apply(self, w: jax.Array, state: State) -> jax.Array:
        """Returns the transformed weight."""
        raise TypeError(f"{type(self).__name__} defines no apply: a transform is at least apply(w, state)")

    def store(self, w: jax.Array, state: State) -> jax.Array | Stored:
        """Returns the transformed weight as it is kept after training."""
        return self.apply(w, state)

    def anchor(self, w: jax.Array, state: State) -> float | jax.Array:
        """Returns the point towards which `project` rounds where no update gives `apply(w)` bit for bit.

        0 suits a bound on magnitudes. For other constraints, return a point that satisfies them.
        """
        return 0.0

    def with_axes(self, axes: Axes) -> Self:
        """Returns this spec with its `axes` set, if it takes axes and they are None."""
        if self.takes_axes and getattr(self, "axes") is None:  # noqa: B009, a declared field of the subclass
            return dataclasses.replace(self, axes=axes)  # type: ignore[call-arg]
        return self

    def tells_apart(self, a: Reading, b: Reading) -> bool:
        """Whether a weight comes out otherwise where its `axes` are filled in with one reading than with the other."""
        if self.with_axes(Axes()) is self:
            return False
        if self.unitwise:
            return a.contracted != b.contracted
        if self.transposable:
            return not a.same_matrices(b)
        return a != b

    def with_convolution(self, convolution: Convolution) -> Transform:
        """Returns this spec for the layer with this geometry. Most transforms depend on the weight alone."""
        return self

    def value(self, name: str, state: State) -> Any:
        """Returns the field `name`, or its value at the last update where it holds a schedule."""
        if name not in self._schedules():
            check_state(state)
            return getattr(self, name)
        check_state(state, **{name: ()})
        return state[name]

    def init_schedules(self) -> State:
        """Makes the part of the state that belongs to schedules: their values at step 0, and the `step`."""
        names = self._schedules()
        return {n: self._evaluate(n, 0) for n in names} | ({"step": jnp.zeros((), jnp.int32)} if names else {})

    def update_schedules(self, state: State) -> State:
        """Returns the state with all schedules at its `step`, and the step after it."""
        names = self._schedules()
        if not names:
            return state
        check_state(state, step=jax.ShapeDtypeStruct((), jnp.int32))
        step = state["step"]
        return {**state, **{n: self._evaluate(n, step) for n in names}, "step": step + 1}

    def _schedules(self) -> list[str]:
        """The fields that hold a schedule, in the order in which they are declared."""
        fields = [f.name for f in dataclasses.fields(self) if f.name in self.scheduled]
        return [name for name in fields if callable(getattr(self, name))]

    def _evaluate(self, name: str, step) -> jax.Array:
        value = getattr(self, name)(jnp.asarray(step, jnp.int32))
        check_scalar(f"the value of the schedule {name}", value)
        return jnp.asarray(value, jnp.float32)


def check_transform(where: str, t) -> None:
    """Raises unless `t` is a transform instance."""
    if isinstance(t, type) and issubclass(t, Transform):
        raise TypeError(f"{where} got the class {t.__name__}: make an instance, {t.__name__}(...)")
    if not isinstance(t, Transform):
        raise TypeError(f"{where} needs a jaxweights.Transform, got {type(t).__name__}: {t!r}")


def check_not_averaged(t: Transform, w: jax.Array, state: State) -> None:
    """Raises if an entry of the state is floating where `init` makes integers, booleans or packed words."""
    floating = [name for name, entry in state.items() if name not in t.learned and is_floating(entry)]
    if not floating:
        return
    dtypes = _state_dtypes if is_hashable(t) else _state_dtypes.__wrapped__
    expected = dtypes(t, jnp.shape(w), jnp.result_type(w))
    for name in floating:
        check_exact(name, state[name], expected.get(name, jnp.float32))


@functools.lru_cache(maxsize=1024)
def _state_dtypes(t: Transform, shape: tuple[int, ...], dtype: jnp.dtype) -> dict[str, jnp.dtype]:
    """The dtypes of the state that `init` makes for a weight."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    return {name: a.dtype for name, a in jax.eval_shape(t.init, jax.ShapeDtypeStruct(shape, dtype), key).items()}
