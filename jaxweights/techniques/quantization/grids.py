"""Grids: the values that codes of a few bits stand for, before they are scaled."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxweights.core.checks import check_integer, check_scalar


class Grid(Protocol):
    """The values of the codes 0 to 2^bits − 1. A frozen dataclass: `Integers`, `Levels` or `Floats`."""

    @property
    def bits(self) -> int:
        """Bits of a code."""
        ...

    @property
    def peak(self) -> float:
        """The magnitude that the largest magnitude of a block is scaled to."""
        ...

    def encode(self, x: jax.Array, uniform: jax.Array | None = None) -> jax.Array:
        """The codes of the values nearest to x, int32.

        With uniform draws from [0, 1), it is one of the two neighbours of x, the mean of which is x. Values beyond the
        ends of the grid become its ends. That of NaN is any code.
        """
        ...

    def decode(self, codes: jax.Array) -> jax.Array:
        """The values of integer codes, float32."""
        ...


@dataclasses.dataclass(frozen=True)
class Integers:
    """The integers from `low` to `high`: value = code − offset.

    The offset is 2^(bits − 1), or 0 where `low` is not negative.

    Args:
      bits: of a code, 1 to 8.
      low: the least value, by default −high.
      high: the greatest, by default 2^(bits − 1) − 1.

    >>> import jax.numpy as jnp
    >>> grid = Integers(4)
    >>> codes = grid.encode(jnp.array([-9.0, -0.4, 2.5, 7.0]))
    >>> print(codes, grid.decode(codes))
    [ 1  8 10 15] [-7.  0.  2.  7.]
    """

    bits: int
    low: int = None  # type: ignore[assignment]
    high: int = None  # type: ignore[assignment]

    def __post_init__(self):
        check_integer("bits", self.bits, 1, 8)
        if self.high is None:
            check_integer("bits, of which high is made,", self.bits, 2, 8)
            object.__setattr__(self, "high", 2 ** (self.bits - 1) - 1)
        check_integer("high", self.high, 1, 2**self.bits - 1)
        if self.low is None:
            object.__setattr__(self, "low", -self.high)
        check_integer("low", self.low, -(2 ** (self.bits - 1)) if self.bits > 1 else 0, self.high - 1)
        if self.low < 0:
            check_integer("high", self.high, 1, 2 ** (self.bits - 1) - 1)

    @property
    def offset(self) -> int:
        """The code of 0."""
        return 2 ** (self.bits - 1) if self.low < 0 else 0

    @property
    def peak(self) -> float:
        """The greatest value."""
        return float(self.high)

    def encode(self, x: jax.Array, uniform: jax.Array | None = None) -> jax.Array:
        """The codes of the nearest integers, halves to even."""
        return jnp.clip(_to_integer(x, uniform), self.low, self.high).astype(jnp.int32) + self.offset

    def decode(self, codes: jax.Array) -> jax.Array:
        """code − offset."""
        return (codes.astype(jnp.int32) - self.offset).astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class Levels:
    """A table: value = values[code].

    Args:
      values: 2 to 256 numbers, in any order.

    >>> import jax.numpy as jnp
    >>> print(Levels((-1.0, 0.0, 1.0)).encode(jnp.array([-3.0, 0.4, 0.6])))
    [0 1 2]
    """

    values: tuple[float, ...]

    def __post_init__(self):
        if not isinstance(self.values, tuple) or not 2 <= len(self.values) <= 256:
            raise ValueError(f"values must be a tuple of 2 to 256 numbers, got {self.values!r}")
        for value in self.values:
            check_scalar("each of values", value)
        if not any(self.values):
            raise ValueError(f"values must not all be 0, got {self.values}: scales are chosen by the largest")

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return (len(self.values) - 1).bit_length()

    @property
    def peak(self) -> float:
        """The largest magnitude in the table."""
        return max(map(abs, self.values))

    def encode(self, x: jax.Array, uniform: jax.Array | None = None) -> jax.Array:
        """The codes of the nearest values, the lower one in a tie."""
        order = np.argsort(self.values, kind="stable")
        ascending = np.asarray(self.values, np.float32)[order]
        if uniform is None:
            place = _count(x > middle for middle in ((ascending[1:] + ascending[:-1]) / 2).tolist())
        else:
            place = _count(x >= value for value in ascending[1:-1].tolist())
            place = jnp.broadcast_to(place, x.shape)
            low, high = (_choose(place, ends).astype(x.dtype) for ends in (ascending[:-1], ascending[1:]))
            place = place + (uniform.astype(x.dtype) * (high - low) < x - low).astype(jnp.int32)
        return place if (order == np.arange(len(order))).all() else _choose(place, order.astype(np.int32))

    def decode(self, codes: jax.Array) -> jax.Array:
        """values[code]."""
        return _choose(codes, np.asarray(self.values, np.float32))


@dataclasses.dataclass(frozen=True)
class Floats:
    """Small floating-point numbers: a sign, `exponent` bits of a biased exponent, `mantissa` bits; with subnormals.

    Args:
      exponent: number of exponent bits e; the bias is 2^(e − 1) − 1.
      mantissa: number of mantissa bits.
      n_special: how many of the largest codes of each sign are not numbers: they decode to NaN.

    >>> import jax.numpy as jnp
    >>> e2m1 = Floats(2, 1)
    >>> print(e2m1.decode(jnp.arange(8)), e2m1.decode(e2m1.encode(jnp.array([-2.4, 100.0]))))
    [0.  0.5 1.  1.5 2.  3.  4.  6. ] [-2.  6.]

    References: Rouhani et al., Microscaling Data Formats for Deep Learning, arXiv:2310.10537, 2023; Micikevicius et
    al., FP8 Formats for Deep Learning, arXiv:2209.05433, 2022.
    """

    exponent: int
    mantissa: int
    n_special: int = 0

    def __post_init__(self):
        check_integer("exponent", self.exponent, 2, 5)
        check_integer("mantissa", self.mantissa, 1, 7 - self.exponent)
        check_integer("n_special", self.n_special, 0, 2**self.mantissa)

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return 1 + self.exponent + self.mantissa

    @property
    def peak(self) -> float:
        """The largest finite value."""
        exponent, fraction = divmod(2 ** (self.bits - 1) - 1 - self.n_special, 2**self.mantissa)
        return (1 + fraction * 2.0**-self.mantissa) * 2.0 ** (exponent - self._bias)

    def encode(self, x: jax.Array, uniform: jax.Array | None = None) -> jax.Array:
        """The codes of the nearest values, ties to the even code."""
        x = x.astype(jnp.float32)
        magnitude = jnp.minimum(jnp.abs(x), self.peak)
        exponent = jnp.maximum((_bits_of(magnitude) >> 23) - 127, 1 - self._bias)
        position = magnitude * _power_of_two(self.mantissa - exponent)  # in units of the last place
        # A code counts values upwards: a carry into the next power of two comes out right.
        code = _to_integer(position, uniform).astype(jnp.int32) + ((exponent + self._bias - 1) << self.mantissa)
        code = jnp.minimum(code, 2 ** (self.bits - 1) - 1 - self.n_special)
        return code | (jnp.signbit(x).astype(jnp.int32) << (self.bits - 1))

    def decode(self, codes: jax.Array) -> jax.Array:
        """±2^(exponent − bias)·(1 + fraction); without the 1 where all exponent bits are 0."""
        codes = codes.astype(jnp.int32)
        code = codes & (2 ** (self.bits - 1) - 1)
        # Subnormal values are made as integers: XLA flushes subnormal float32 numbers on CPUs.
        normal = _from_bits((code << (23 - self.mantissa)) + ((127 - self._bias) << 23))
        least = 2.0 ** (1 - self._bias - self.mantissa)
        value = jnp.where(code < 2**self.mantissa, code.astype(jnp.float32) * least, normal)
        if self.n_special:
            value = jnp.where(code < 2 ** (self.bits - 1) - self.n_special, value, jnp.nan)
        return jnp.where(codes >> (self.bits - 1) == 1, -value, value)

    @property
    def _bias(self) -> int:
        return 2 ** (self.exponent - 1) - 1


def _to_integer(x: jax.Array, uniform: jax.Array | None) -> jax.Array:
    """The nearest integer, halves to even, or stochastically one of the two neighbours."""
    if uniform is None:
        return jnp.round(x)
    below = jnp.floor(x)
    # Not ⌊x + u⌋: the sum is rounded, and may move an integer x.
    return below + (uniform.astype(x.dtype) < x - below).astype(x.dtype)


def _count(conditions: Iterable[jax.Array]) -> jax.Array:
    """How many conditions hold, int32."""
    return functools.reduce(jnp.add, (c.astype(jnp.int32) for c in conditions), jnp.zeros((), jnp.int32))


def _choose(code: jax.Array, options: np.ndarray) -> jax.Array:
    """options[code], with one comparison per bit of the code: a gather of single numbers is slow."""
    if len(options) == 1:
        return jnp.asarray(options[0])
    half = 2 ** ((len(options) - 1).bit_length() - 1)
    low, high = _choose(code, options[:half]), _choose(code, options[half:])
    return jnp.where((code & half) != 0, high, low)


def _bits_of(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.int32)


def _from_bits(bits: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _power_of_two(exponent: jax.Array) -> jax.Array:
    return _from_bits((exponent + 127) << 23)
