"""Ranges: how the scale, and the zero point if there is one, of a block of weights is chosen."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxweights.core.checks import check_integer, check_scalar
from jaxweights.numerics.norms import safe_divide
from jaxweights.techniques.quantization.blocks import Parts, bounded, decode, encode
from jaxweights.techniques.quantization.formats import Format
from jaxweights.techniques.quantization.grids import Levels


@dataclasses.dataclass(frozen=True)
class Range:
    """A way to choose the scale of each block. A subclass is a frozen dataclass with `fit`."""

    def fit(self, x: jax.Array, over: Sequence[int], format: Format, there: jax.Array | None = None) -> Parts:
        """The scales and zero points of blocks.

        Args:
          x: weights in float32 or wider, any shape.
          over: the axes that make up a block.
          format: what they are for.
          there: whether each entry is one of the weight, and not padding with 0. Broadcasts to `x`. None: all are.

        Returns:
          `Parts`, of the shape of `x` with sizes of 1 along `over`.
        """
        raise TypeError(f"{type(self).__name__} defines no fit: a range is at least fit(x, over, format, there)")

    def check(self, format: Format) -> None:
        """Raises if the range does not suit a format. By default it suits all."""


@dataclasses.dataclass(frozen=True)
class AbsMax(Range):
    """From −max|w| to max|w|: no weight is clipped. With a zero point, from min(w, 0) to max(w, 0).

    0 is a value of the grid, so what is pruned stays so.

    >>> import jax.numpy as jnp
    >>> import jaxweights as jw
    >>> print(jw.quantize(jnp.array([3.0, -1.4, 0.2]), 3, range=jw.ranges.AbsMax()).todense())
    [ 3. -1.  0.]
    """

    def fit(self, x, over, format, there=None):
        """scale = max|w|/peak."""
        if format.zero_point:
            return bounded(
                jnp.min(x, over, keepdims=True, initial=0), jnp.max(x, over, keepdims=True, initial=0), format
            )
        reach = jnp.max(jnp.abs(x), over, keepdims=True, initial=0)
        return bounded(-reach, reach, format)


@dataclasses.dataclass(frozen=True)
class AbsMean(Range):
    """scale = mean|w|: the best for binary weights, and that of BitNet b1.58 for ternary ones.

    >>> import jax.numpy as jnp
    >>> import jaxweights as jw
    >>> print(jw.quantize(jnp.array([3.0, -1.4, 0.2, -0.2]), "ternary").todense().round(1))
    [ 1.2 -1.2  0.   0. ]

    References: Rastegari et al., XNOR-Net, arXiv:1603.05279, 2016; Ma et al., The Era of 1-bit LLMs, arXiv:2402.17764,
    2024.
    """

    def fit(self, x, over, format, there=None):
        """scale = Σ|w|/n."""
        n = math.prod(x.shape[a] for a in over)
        count = n if there is None else jnp.sum(jnp.broadcast_to(there, x.shape).astype(x.dtype), over, keepdims=True)
        mean = jnp.sum(jnp.abs(x) / jnp.maximum(count, 1), over, keepdims=True)
        return bounded(-mean * format.grid.peak, mean * format.grid.peak, format)


@dataclasses.dataclass(frozen=True)
class Percentile(Range):
    """The magnitude that this percentage of the weights of a block does not exceed; what lies beyond is clipped.

    Args:
      percent: from 0 to 100.

    >>> import jax.numpy as jnp
    >>> import jaxweights as jw
    >>> print(jw.quantize(jnp.array([9.0, 3.0, -2.0, 1.0, 0.0]), 3, range=jw.ranges.Percentile(75)).todense())
    [ 3.  3. -2.  1.  0.]
    """

    percent: float = 99.9

    def __post_init__(self):
        check_scalar("percent", self.percent, 0, 100)

    def fit(self, x, over, format, there=None):
        """scale = percentile(|w|)/peak, or between the percentiles on both sides with a zero point."""
        known = x if there is None else jnp.where(there, x, jnp.nan)

        def at(values, percent):
            return jnp.nanpercentile(values, percent, axis=tuple(over), keepdims=True)

        if format.zero_point:
            tail = (100 - self.percent) / 2
            return bounded(jnp.minimum(at(known, tail), 0), jnp.maximum(at(known, 100 - tail), 0), format)
        reach = at(jnp.abs(known), self.percent)
        return bounded(-reach, reach, format)


@dataclasses.dataclass(frozen=True)
class MSE(Range):
    """The range with the least squared error, of `steps` that shrink that of `AbsMax` down to `least` of it.

    Of scales that are powers of two, which may clip max|w|, the next larger one is tried too.

    Args:
      steps: number of ranges to try.
      least: the smallest, as a fraction of the whole range.

    >>> import jax.numpy as jnp
    >>> import jaxweights as jw
    >>> w = jnp.array([3.0] + 8 * [1.0])
    >>> for range in jw.ranges.AbsMax(), jw.ranges.MSE():
    ...     print(round(float(jnp.square(jw.quantize(w, 2, range=range).todense() - w).sum()), 1))
    8.0
    3.6

    References: Choukroun et al., Low-bit Quantization of Neural Networks for Efficient Inference, arXiv:1902.06822,
    2019.
    """

    steps: int = 80
    least: float = 0.2

    def __post_init__(self):
        check_integer("steps", self.steps, 1)
        check_scalar("least", self.least, 0, 1)

    def fit(self, x, over, format, there=None):
        """argmin over the ranges of Σ(w − ŵ)²; the widest of those that are equally good."""
        low = jnp.min(x, over, keepdims=True, initial=0)
        high = jnp.max(x, over, keepdims=True, initial=0)
        if not format.zero_point:
            high = jnp.maximum(-low, high)
            low = -high

        def attempt(fraction):
            parts = bounded(low * fraction, high * fraction, format)
            error = decode(encode(x, parts, format), parts, format).astype(x.dtype) - x
            unit = jnp.maximum(high, -low)
            return parts, jnp.sum(jnp.square(safe_divide(error, unit)), over, keepdims=True)

        def step(i, best):
            parts, error = attempt(1 - (1 - self.least) / self.steps * jnp.asarray(i, x.dtype))
            of_best, least = best
            better = error < least
            return jax.tree.map(lambda new, old: jnp.where(better, new, old), parts, of_best), jnp.minimum(error, least)

        # The power of two that is chosen for max|w| may clip it by a quarter. So the next one is tried too.
        widest = 2.0 if format.scale.dtype == "float8_e8m0fnu" else 1.0
        parts, _ = jax.lax.fori_loop(0, self.steps + 1, step, attempt(widest))
        return parts


@dataclasses.dataclass(frozen=True)
class HQQ(Range):
    """Half-quadratic quantization: the zero point with the least ‖w − ŵ‖_p, p < 1, which outliers hardly move.

    Alternates e = shrink(w − ŵ, β), z = mean(code − (w − e)/s), β ← κβ; shrink(d) = sign(d)·max(|d| − |d|^(p−1)/β, 0).
    Zero points are floating-point numbers, so in general 0 is not on the grid. Each takes 2 bytes if scales are float16
    or bfloat16, else 4.

    Args:
      steps: of the alternation. The best zero points on the way are kept.
      p: exponent of the norm.
      beta: β at the start.
      kappa: κ.

    >>> import jax.numpy as jnp
    >>> import jaxweights as jw
    >>> w, format = jnp.arange(-8.0, 8.0).at[0].set(-30), jw.formats.integers(2, symmetric=False)
    >>> for range in jw.ranges.AbsMax(), jw.ranges.HQQ():
    ...     print(f"{float(jnp.abs(jw.quantize(w, format, range=range).todense() - w).mean()):.1f}")
    3.6
    2.5

    References: Badri and Shaji, Half-Quadratic Quantization of Large Machine Learning Models, 2023.
    """

    steps: int = 20
    p: float = 0.7
    beta: float = 10.0
    kappa: float = 1.01

    def __post_init__(self):
        check_integer("steps", self.steps, 1)
        check_scalar("p", self.p, 0, 1)
        check_scalar("beta", self.beta, 0)
        check_scalar("kappa", self.kappa, 1)

    def check(self, format):
        """Raises unless the format has zero points."""
        if not format.zero_point:
            raise ValueError(
                "HQQ chooses zero points: give a format with them, as formats.integers(4, symmetric=False)"
            )

    def fit(self, x, over, format, there=None):
        """The scale of min-max, and the best zero point for it."""
        self.check(format)
        grid = format.grid
        x = jax.lax.stop_gradient(x)  # of |w − ŵ|^p, which has none at 0
        weight = jnp.ones((), x.dtype) if there is None else there.astype(x.dtype)
        total = jnp.sum(jnp.broadcast_to(weight, x.shape), over, keepdims=True)
        largest, least = jnp.inf, -jnp.inf
        known = [x, x] if there is None else [jnp.where(there, x, end) for end in (largest, least)]
        low = jnp.min(known[0], over, keepdims=True, initial=largest)
        high = jnp.max(known[1], over, keepdims=True, initial=least)
        alike = low == high  # a range from 0 holds weights that are all the same
        low, high = jnp.where(alike, jnp.minimum(low, 0), low), jnp.where(alike, jnp.maximum(high, 0), high)
        start = bounded(low, high, format, exact_zero=True)
        scale = start.scale.astype(x.dtype)

        def distance(zero):
            error = jnp.abs(decode(encode(x, Parts(start.scale, zero), format), Parts(start.scale, zero), format) - x)
            unit = jnp.maximum(scale, jnp.finfo(x.dtype).tiny)
            return jnp.sum(weight * (error / unit) ** self.p, over, keepdims=True)

        def step(i, carry):
            zero, best, least, beta = carry
            codes = encode(x, Parts(start.scale, zero), format)
            difference = x - decode(codes, Parts(start.scale, zero), format)
            size = jnp.abs(difference)
            threshold = jnp.where(size > 0, size, 1) ** (self.p - 1) / beta
            sparse = jnp.sign(difference) * jnp.maximum(size - threshold, 0)
            values = grid.decode(codes).astype(x.dtype) - safe_divide(x - sparse, scale)
            zero = (jnp.sum(weight * values, over, keepdims=True) / jnp.maximum(total, 1)).astype(zero.dtype)
            error = distance(zero)
            better = error < least
            return zero, jnp.where(better, zero, best), jnp.minimum(error, least), beta * self.kappa

        carry = (start.zero, start.zero, distance(start.zero), jnp.asarray(self.beta, x.dtype))
        _, zero, _, _ = jax.lax.fori_loop(0, self.steps, step, carry)
        return Parts(start.scale, zero, start.reach)


def default_range(format: Format) -> Range:
    """`AbsMean` for tables of −1, 0 and 1, else `AbsMax`."""
    few = isinstance(format.grid, Levels) and {abs(value) for value in format.grid.values} <= {0, 1}
    return AbsMean() if few else AbsMax()
