"""LSQ: quantization-aware training with learned scales."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxweights.core.axes import Axes
from jaxweights.core.checks import check_state, check_weight
from jaxweights.core.transform import State, Transform
from jaxweights.numerics.norms import safe_divide
from jaxweights.techniques.quantization.array import QuantizedArray
from jaxweights.techniques.quantization.blocking import Blocking, tells_apart
from jaxweights.techniques.quantization.blocks import Parts, encode
from jaxweights.techniques.quantization.formats import Format, format_of
from jaxweights.techniques.quantization.grids import Integers
from jaxweights.techniques.quantization.quantize import store
from jaxweights.techniques.quantization.ranges import AbsMax


@dataclasses.dataclass(frozen=True)
class LSQ(Transform):
    """Learned step size quantization: the scales of a format are trained with the weights.

    ŵ = q(w/s)·s, q(x) the value of the grid nearest to x, from −Q_N to Q_P. With gradients straight through q:
    ∂ŵ/∂w = 1 and ∂ŵ/∂s = q(w/s) − w/s where −Q_N < w/s < Q_P; else ∂ŵ/∂w = 0, and ∂ŵ/∂s = −Q_N or Q_P. The gradient of
    a scale is multiplied by 1/√(N·Q_P), N the number of weights that share it.

    A format with zero points is LSQ+: ŵ = q((w − β)/s)·s + β with a learned offset β, rounded to a multiple of s so
    that 0 stays 0. ∂ŵ/∂β = 0 where ∂ŵ/∂w = 1, else 1.

    `store(w, state)` is the `QuantizedArray` of exactly what `apply(w, state)` returns, bit for bit.

    State: the learned `scale`, one per output unit (*batch, *output) or per block (*batch, [groups,] blocks, N). It
    starts at 2·mean|w|/√Q_P, or with zero points as `AbsMax` chooses; where all weights are zero, as if they were
    drawn with variance 1/n_in. Its sign does not matter. With zero points also the learned `offset`.

    Args:
      format: as in `quantize`: a number of bits, 2 to 8, a name, or a `jaxweights.formats.Format`. The grid of the
        paper is Format(Integers(b, −2^(b−1), 2^(b−1) − 1)).
      axes: how a weight is read as a matrix.
      block: number of consecutive inputs that share a scale, in place of that of the format.

    >>> import jax, jax.numpy as jnp
    >>> w, t = jnp.array([[3.0], [-1.0], [1.0], [-3.0]]), LSQ(2)
    >>> state = t.init(w, jax.random.key(0))
    >>> print(state["scale"], t.apply(w, state).T)
    [4.] [[ 4.  0.  0. -4.]]
    >>> bool((t.store(w, state).todense() == t.apply(w, state)).all())
    True

    References: Esser et al., Learned Step Size Quantization, arXiv:1902.08153, 2019; Bhalgat et al., LSQ+: Improving
    Low-bit Quantization through Learnable Offsets and Better Initialization, arXiv:2004.09576, 2020.
    """

    format: int | str | Format
    axes: Axes | None = None
    block: int | None = None
    learned: ClassVar[frozenset[str]] = frozenset({"scale", "offset"})
    takes_axes: ClassVar[bool] = True

    def __post_init__(self):
        if not self._format.has_zero:
            object.__setattr__(self, "moves_zeros", "quantize to a grid with a 0, as 'ternary'")

    def init(self, w, key):
        """The scales, and the offsets if there are zero points, to start from."""
        w = check_weight(w)
        blocking = self._blocking(w)
        scale, offset = _start(w, blocking)
        scale = jnp.squeeze(scale, blocking.over)
        return {"scale": scale} if offset is None else {"scale": scale, "offset": jnp.squeeze(offset, blocking.over)}

    def apply(self, w, state):
        """ŵ."""
        w = check_weight(w)
        if w.size == 0:
            return w
        blocking = self._blocking(w)
        return _quantized(blocking, w, *self._learned(blocking, state))

    def store(self, w: jax.Array, state: State) -> QuantizedArray:
        """The weight that `apply` returns, bit for bit, as what is kept after training."""
        w = check_weight(w)
        blocking = self._blocking(w)
        return _stored(blocking, w, *self._learned(blocking, state))

    def tells_apart(self, a, b):
        """Whether units have other inputs, or weights share a scale with others."""
        return self.with_axes(Axes()) is not self and tells_apart(self._format, a, b)

    @property
    def _format(self) -> Format:
        return format_of(self.format, self.block)

    def _blocking(self, w: jax.Array) -> Blocking:
        return Blocking(self._format, self.axes, w.shape)

    def _learned(self, blocking: Blocking, state: State) -> tuple[jax.Array, jax.Array | None]:
        """The scales and offsets of the state, of the rank of the weight that is cut into blocks."""
        names = ("scale", "offset") if blocking.format.zero_point else ("scale",)
        check_state(state, **dict.fromkeys(names, blocking.units))
        scale, *offset = (jnp.expand_dims(check_weight(state[name], name), blocking.over) for name in names)
        return scale, offset[0] if offset else None


@functools.partial(jax.jit, static_argnums=1)
def _start(w: jax.Array, blocking: Blocking) -> tuple[jax.Array, jax.Array | None]:
    """The scales and offsets to start from."""
    format, x = blocking.format, blocking.split(w)
    drawn = math.sqrt(2 / math.pi / max(blocking.rows, 1))
    if not format.zero_point:
        there = jnp.broadcast_to(True if blocking.there is None else blocking.there, x.shape)
        n = jnp.maximum(jnp.sum(there, blocking.over, keepdims=True), 1)
        mean = jnp.sum(jnp.abs(x) / n.astype(x.dtype), blocking.over, keepdims=True)
        return (2 / math.sqrt(format.grid.peak) * jnp.where(mean == 0, drawn, mean)).astype(jnp.float32), None
    parts = AbsMax().fit(x, blocking.over, format, blocking.there)
    assert parts.zero is not None
    scale = jnp.where(parts.scale == 0, 2 / math.sqrt(format.grid.peak) * drawn, parts.scale)
    return scale, jnp.where(parts.scale == 0, 0, -parts.zero.astype(jnp.float32) * scale)


def _parts(blocking: Blocking, scale: jax.Array, offset: jax.Array | None) -> Parts:
    """What blocks with these scales and offsets are coded with."""
    grid, scale = blocking.format.grid, jnp.abs(scale.astype(jnp.float32))
    parts = Parts(scale, None, scale * grid.peak)
    if offset is None:
        return parts
    assert isinstance(grid, Integers)
    zero = jnp.round(safe_divide(-offset.astype(jnp.float32), blocking.stored(parts).scale))
    return parts._replace(zero=jnp.clip(zero, grid.low, grid.high).astype(jnp.uint8 if grid.low >= 0 else jnp.int8))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
@functools.partial(jax.jit, static_argnums=0)
def _quantized(blocking: Blocking, w: jax.Array, scale: jax.Array, offset: jax.Array | None) -> jax.Array:
    """ŵ."""
    return blocking.rounded(w, _parts(blocking, scale, offset))


@_quantized.defjvp
def _(blocking, primals, tangents):
    (w, scale, offset), (dw, dscale, doffset) = primals, tangents
    format, x = blocking.format, blocking.split(w)
    parts = blocking.stored(_parts(blocking, scale, offset))
    position = safe_divide(x, parts.scale.astype(x.dtype))
    if parts.zero is not None:
        position = position + parts.zero.astype(x.dtype)
    largest = float(jnp.finfo(jnp.float32).max)
    ends = format.grid.decode(format.grid.encode(jnp.array([-largest, largest], jnp.float32))).astype(x.dtype)
    inside = (position > ends[0]) & (position < ends[1])
    value = format.grid.decode(encode(x, parts, format)).astype(x.dtype)
    by_scale = jnp.where(inside, value - position, jnp.clip(position, ends[0], ends[1]))
    rate = 1 / math.sqrt(blocking.block_size * format.grid.peak)
    dscale = rate * jnp.where(scale < 0, -dscale, dscale)
    tangent = jnp.where(inside, blocking.split(dw), 0) + by_scale * dscale.astype(x.dtype)
    if doffset is not None:
        tangent = tangent + jnp.where(inside, 0, (rate * doffset).astype(x.dtype))
    return _quantized(blocking, w, scale, offset), blocking.join(tangent).astype(w.dtype)


@functools.partial(jax.jit, static_argnums=0)
def _stored(blocking: Blocking, w: jax.Array, scale: jax.Array, offset: jax.Array | None) -> QuantizedArray:
    return store(w, _parts(blocking, scale, offset), blocking)
