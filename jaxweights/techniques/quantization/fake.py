"""Fake quantization: weights rounded to a grid and kept in their dtype, for training."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxweights.core.axes import WHOLE, Axes, Reading, axes_or_default
from jaxweights.core.checks import check_integer, check_scalar, check_state, check_weight
from jaxweights.core.transform import Scalar, State, Transform
from jaxweights.numerics.dtypes import accumulation_dtype
from jaxweights.numerics.straight_through import straight_through
from jaxweights.techniques.quantization.array import QuantizedArray
from jaxweights.techniques.quantization.blocking import Blocking, tells_apart
from jaxweights.techniques.quantization.blocks import Parts, bounded
from jaxweights.techniques.quantization.formats import Format, format_of, integers
from jaxweights.techniques.quantization.grids import Integers
from jaxweights.techniques.quantization.min_max import min_max
from jaxweights.techniques.quantization.quantize import check_range, store
from jaxweights.techniques.quantization.ranges import HQQ, AbsMax, Range

_MAX_BITS = 16  # with more, float32 does not distinguish the levels
_FORMAT_BITS = (2, 8)


def fake_quantize(
    w: jax.Array,
    bits: int | str | Format,
    *,
    axes: Axes | None = None,
    block: int | None = None,
    range: Range | None = None,
    keep_zeros: bool = False,
) -> jax.Array:
    """Rounds a weight to few values, in its own dtype: 2^bits from its minimum to its maximum, or those of a format.

    With a number of bits, w_q = round((w − w_min)/(w_max − w_min)·(2^b − 1))·(w_max − w_min)/(2^b − 1) + w_min, rounded
    half to even. 0 is in general not one of these values: what was pruned becomes ±Δ/2 at most. With `keep_zeros` it is
    one: the range is widened to hold 0, and the values shifted so that one of them is 0. With a format,
    w_q = dequantize(quantize(w, format)), bit for bit.

    The gradient is passed straight through, ∂w_q/∂w = 1, to weights that a range clips too.

    Args:
      w: float array of any shape.
      bits: b, from 1 to 16, or a format as in `quantize`: a name such as "int4" or "nf4", or a
        `jaxweights.formats.Format`.
      axes: how `w` is read as a matrix. With a number of bits each output unit then has its own range; by default there
        is one for the whole tensor. A format has (..., in, out) by default.
      block: number of consecutive inputs that share a scale, in place of that of the format.
      range: how the scales of a format are chosen, one of `jaxweights.ranges`.
      keep_zeros: whether 0 stays 0 with a number of bits, which is then from 2 to 8. It is so in every format whose
        grid has a 0: all but "binary", if the range is not `HQQ`.

    Returns:
      Array of the shape and dtype of `w`, computed in float32 or wider. With a number of bits, equal weights stay
      unchanged, and a NaN or infinite weight makes everything that shares its range NaN. Under a format, weights must
      be finite.

    Raises:
      TypeError: `w` is not a float array, `bits` is neither an integer nor a format, or `range` not one of
        `jaxweights.ranges`.
      ValueError: `bits` or `block` is out of range, an argument belongs to formats only, or `axes` does not fit `w`.

    >>> import jax.numpy as jnp
    >>> w = jnp.array([-0.75, 0.0, 0.25, 2.25])
    >>> print(fake_quantize(w, 2), fake_quantize(w, 2, keep_zeros=True), fake_quantize(w, "int3"))
    [-0.75  0.25  0.25  2.25] [-1.  0.  0.  2.] [-0.75  0.    0.    2.25]

    References: Jacob et al., Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
    Inference, arXiv:1712.05877, 2017; Bengio, Léonard and Courville, Estimating or Propagating Gradients Through
    Stochastic Neurons for Conditional Computation, arXiv:1308.3432, 2013.
    """
    if callable(bits):
        raise TypeError(f"bits must be a number here, got the callable {bits!r}: evaluate it at the step first")
    per_unit = axes is not None and not isinstance(bits, str | Format)
    return FakeQuantize(bits, per_unit, axes, block=block, range=range, keep_zeros=keep_zeros).apply(w, {})


@dataclasses.dataclass(frozen=True)
class FakeQuantize(Transform):
    """Quantization-aware training: weights on the grid of `fake_quantize`, gradients straight through.

    `FakeQuantize("int4")` trains what `quantize(w, "int4")` stores: `store(w, state)` is the `QuantizedArray` of
    exactly the weights that `apply(w, state)` returns, bit for bit.

    A number of bits is the min-max formula: its grid has in general no 0, so it loses the zeros of a mask before it.
    Give `keep_zeros=True`, or a format, in `Chain(Prune(0.9), FakeQuantize(8, keep_zeros=True))`.

    State: with a `decay`, the moving averages of the range: `high`, and `low` where that is not −high; with a schedule,
    `bits`; the `step` if there is a schedule or a `delay`. Otherwise none.

    Args:
      bits: a number of bits from 1 to 16, a schedule of them (rounded to integers), or a format: a name, or a
        `jaxweights.formats.Format`.
      per_unit: whether each output unit has its own range; with a number of bits. A format says so itself.
      axes: how a weight is read as a matrix.
      block: number of consecutive inputs that share a scale, in place of that of the format.
      range: how the scales of a format are chosen, one of `jaxweights.ranges`.
      keep_zeros: whether 0 stays 0; with a number of bits, from 2 to 8.
      decay: of the moving average of the range, which `update` moves: r ← decay·r + (1 − decay)·r(w). By default the
        range is that of the current weights.
      delay: number of updates for which the weights stay as they are.

    >>> import jax.numpy as jnp
    >>> w = jnp.array([0.0, 0.2, 0.6, 1.0])
    >>> print(FakeQuantize(1).apply(w, {}))
    [0. 0. 1. 1.]
    >>> t = FakeQuantize("nf4", block=2)
    >>> bool((t.apply(w, {}) == t.store(w, {}).todense()).all())
    True

    References: Jacob et al., arXiv:1712.05877, 2017 (moving averages, delay).
    """

    bits: Scalar | str | Format
    per_unit: bool = False
    axes: Axes | None = None
    _: dataclasses.KW_ONLY
    block: int | None = None
    range: Range | None = None
    keep_zeros: bool = False
    decay: float | None = None
    delay: int = 0
    scheduled: ClassVar[frozenset[str]] = frozenset({"bits"})
    takes_axes: ClassVar[bool] = True

    def __post_init__(self):
        check_integer("delay", self.delay, 0)
        if self.decay is not None:
            check_scalar("decay", self.decay, 0, 1)
        if isinstance(self.bits, str | Format):
            for name in ("per_unit", "keep_zeros"):
                if getattr(self, name):
                    raise ValueError(f"{name} is for a number of bits, got the format {self.bits!r}: leave it out")
        else:
            for name in ("block", "range"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} is for a format, got bits={self.bits!r}: give one such as 'int4'")
            if not callable(self.bits):
                check_integer("bits", self.bits, *(_FORMAT_BITS if self.keep_zeros else (1, _MAX_BITS)))
            if self.axes is not None and not self.per_unit:
                raise ValueError(f"axes={self.axes} applies to ranges per output unit only: give per_unit=True too")
        object.__setattr__(self, "moves_zeros", self._remedy())

    def init(self, w, key):
        """The range of `w`, if it is averaged."""
        w = check_weight(w)
        step = {"step": jnp.zeros((), jnp.int32)} if self.delay else {}
        return {**self.init_schedules(), **step, **({} if self.decay is None else self._ends(w))}

    def update(self, w, state, grad=None):
        """Moves the averages of the range, the schedule and the step."""
        new = self.update_schedules(state)
        if self.delay:
            check_state(state, step=jax.ShapeDtypeStruct((), jnp.int32))
            new = {**new, "step": state["step"] + 1}
        if self.decay is None:
            return new
        ends = self._ends(check_weight(w))
        check_state(state, **{name: end.shape for name, end in ends.items()})
        moved = {name: self.decay * state[name] + (1 - self.decay) * end for name, end in ends.items()}
        return new | jax.lax.optimization_barrier(moved)  # else XLA may round it otherwise where `apply` uses it

    def apply(self, w, state):
        """`fake_quantize(w, bits)`, in the range of the state if there is one; `w` itself until the delay is over."""
        w = check_weight(w)
        bits = self.value("bits", state)
        if w.size == 0:
            return w
        new = self._rounded(jax.lax.stop_gradient(w), bits, self._range_of(w, state))
        if self.delay:
            check_state(state, step=jax.ShapeDtypeStruct((), jnp.int32))
            new = jnp.where(state["step"] > self.delay, new, w)
        return straight_through(w, new)

    def store(self, w: jax.Array, state: State) -> QuantizedArray:
        """The weight that `apply` returns, bit for bit, as what is kept after training. A delay is taken to be over."""
        w = check_weight(w)
        if callable(self.bits) and self.keep_zeros:
            raise ValueError(
                "bits is a schedule, and what is stored has one number of bits: store with dataclasses.replace("
                "transform, bits=N), where N is the number that training ended with"
            )
        if self._format is None:
            raise ValueError(
                f"bits={self.bits!r} is the min-max formula, whose values no format has: train a format such as 'int8' "
                f"or formats.integers(8, symmetric=False), or a number of bits with keep_zeros=True"
            )
        blocking = Blocking(self._format, self.axes, w.shape)
        return _stored(w, self._range_of(w, state), blocking, self._chosen)

    def with_axes(self, axes):
        """Sets `axes` if ranges are per output unit, or a format decides."""
        return super().with_axes(axes) if self.per_unit or isinstance(self.bits, str | Format) else self

    def tells_apart(self, a, b):
        """Whether units have other inputs, or weights share a scale with others."""
        if self.with_axes(Axes()) is self:
            return False
        return a.contracted != b.contracted if self._format is None else tells_apart(self._format, a, b)

    @property
    def _format(self) -> Format | None:
        """What `store` stores, or None for the min-max formula and for a schedule."""
        if isinstance(self.bits, str | Format):
            return format_of(self.bits, self.block)
        return None if callable(self.bits) or not self.keep_zeros else self._integers(int(self.bits))

    def _integers(self, bits: int) -> Format:
        return integers(bits, symmetric=False, per_tensor=not self.per_unit)

    @property
    def _chosen(self) -> Range:
        assert self._format is not None
        return check_range(self.range, self._format)

    def _remedy(self) -> str:
        """What to do so that zeros stay, where they do not."""
        format = self._format
        if format is None:
            return "" if self.keep_zeros else f"give FakeQuantize({self.bits!r}, keep_zeros=True), or the format 'int8'"
        if isinstance(self._chosen, HQQ):
            if self.decay is not None:
                raise ValueError("decay averages ranges, and HQQ fits zero points to the weights: leave out decay")
            return "choose a range other than HQQ"
        return "" if format.has_zero else "quantize to a grid with a 0, as 'ternary'"

    def _blocking(self, format: Format, shape: tuple[int, ...]) -> Blocking:
        """The blocks of a format; of the whole tensor with a number of bits, unless they are per output unit."""
        whole = self.keep_zeros and not self.per_unit
        return Blocking(format, WHOLE if whole else self.axes, shape)

    def _over(self, w: jax.Array) -> tuple[int, ...]:
        """The axes that share a range in the min-max formula."""
        axes = axes_or_default(self.axes, w.ndim) if self.per_unit else WHOLE
        return Reading.of(axes, w.shape).contracted

    def _ends(self, w: jax.Array) -> State:
        """The ends of the range that is chosen for a weight."""
        format = self._integers(8) if self.keep_zeros else self._format  # all numbers of bits have one range
        if format is not None:
            return _ends(w, self._blocking(format, w.shape), check_range(self.range, format))
        x = w.astype(accumulation_dtype(w.dtype))
        low, high = (f(x, self._over(w), keepdims=True) for f in (jnp.min, jnp.max))
        return {"low": low, "high": high}

    def _range_of(self, w: jax.Array, state: State) -> State | None:
        """The ends of the range in the state, or None if it is that of the weight."""
        if self.decay is None:
            return None
        shapes = jax.eval_shape(self._ends, w)
        check_state(state, **{name: end.shape for name, end in shapes.items()})
        return {name: state[name] for name in shapes}

    def _rounded(self, w: jax.Array, bits, ends: State | None) -> jax.Array:
        if self._format is not None:
            return _in_format(w, ends, self._blocking(self._format, w.shape), self._chosen)
        least, most = _FORMAT_BITS if self.keep_zeros else (1, _MAX_BITS)
        if callable(self.bits):
            bits = jnp.clip(jnp.round(bits), least, most).astype(jnp.int32)
        if not self.keep_zeros:
            return min_max(w, bits, self._over(w), ends)
        each = [self._integers(n) for n in (2, 3, 4, 5, 6, 7, 8)]
        choices = [partial(_in_format, blocking=self._blocking(f, w.shape), range=AbsMax()) for f in each]
        return jax.lax.switch(bits - least, choices, w, ends)


@partial(jax.jit, static_argnames=("blocking", "range"))
def _in_format(w: jax.Array, ends: State | None, blocking: Blocking, range: Range) -> jax.Array:
    return blocking.rounded(w, _parts(w, ends, blocking, range))


@partial(jax.jit, static_argnames=("blocking", "range"))
def _stored(w: jax.Array, ends: State | None, blocking: Blocking, range: Range) -> QuantizedArray:
    return store(w, _parts(w, ends, blocking, range), blocking)


@partial(jax.jit, static_argnames=("blocking", "range"))
def _ends(w: jax.Array, blocking: Blocking, range: Range) -> State:
    """The largest value that a range does not clip, and the smallest if it is not its negative, float32."""
    grid, parts = blocking.format.grid, blocking.fit(w, range)
    if parts.zero is None:
        assert parts.reach is not None
        return {"high": parts.reach.astype(jnp.float32)}
    assert isinstance(grid, Integers)
    low, high = ((end - parts.zero.astype(jnp.float32)) * parts.scale for end in (grid.low, grid.high))
    return {"low": low, "high": high}


def _parts(w: jax.Array, ends: State | None, blocking: Blocking, range: Range) -> Parts:
    """The scales and zero points of a weight, or those for the given ends."""
    if ends is None:
        return blocking.fit(w, range)
    high = ends["high"].astype(jnp.float32)
    return bounded(ends.get("low", -high).astype(jnp.float32), high, blocking.format)
