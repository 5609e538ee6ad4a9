"""Odd functions of the singular values, U f(S) Vᵀ of W = U S Vᵀ, by products of matrices alone.

They need no SVD, which neither a mesh nor a TPU takes well: the iterations below are products of a weight with itself
and with square matrices of its shorter side.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import string
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxweights.core.axes import Axes, Reading
from jaxweights.numerics.dtypes import accumulation_dtype
from jaxweights.numerics.norms import safe_divide
from jaxweights.numerics.sharding import auto_sharded

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Products:
    """Products of weights of one shape, read as (a batch of) matrices X of n columns, the shorter side.

    There is no reshape of a weight, so that shardings stay as they are; square matrices are (*batch, n, n).
    """

    gram_spec: str
    times_spec: str
    square: tuple[int, ...]  # (*batch, n, n) with the n's not yet merged
    batch: tuple[int, ...]  # sizes of the batch axes, in order of the array
    per_matrix: tuple[int, ...]  # sizes of the batch axes and 1 for each other axis of the array
    inner: tuple[int, ...]  # axes of one matrix

    @classmethod
    def of(cls, r: Reading, shape: tuple[int, ...]) -> Products:
        """The products of weights of a shape, as `r` reads them."""
        size = lambda which: math.prod(shape[a] for a in which)
        batch = tuple(sorted(r.batch))
        short = min(r.output, r.contracted, key=size)
        x = string.ascii_letters[: len(shape)]
        pick = lambda which, letters: "".join(letters[a] for a in which)
        y = "".join(c.upper() if a in short else c for a, c in enumerate(x))
        square = pick(batch, x) + pick(short, x) + pick(short, y)
        sizes = tuple(shape[a] for a in batch)
        return cls(
            f"{x},{y}->{square}",
            f"{x},{square}->{y}",
            sizes + 2 * tuple(shape[a] for a in short),
            sizes,
            tuple(s if a in batch else 1 for a, s in enumerate(shape)),
            tuple(a for a in range(len(shape)) if a not in batch),
        )

    def gram(self, x: Array, y: Array) -> Array:
        """XᵀY."""
        n = math.isqrt(math.prod(self.square[len(self.batch) :]))
        return _einsum(self.gram_spec, x, y).reshape(*self.batch, n, n)

    def times(self, x: Array, m: Array) -> Array:
        """XM for a square M."""
        return _einsum(self.times_spec, x, m.reshape(self.square))

    def scale(self, x: Array) -> Array:
        """At least σ₁ of each matrix and at most n^⅛ times that, a constant for gradients; 0 for a zero matrix.

        σ₁ <= ‖(XᵀX)²‖_F^¼ = (Σσ⁸)^⅛, with everything scaled to 1 first, so that it stays in the range.
        """
        x = jax.lax.stop_gradient(x)
        size = jnp.max(jnp.abs(x), self.inner, keepdims=True)
        size = jnp.where(size < jnp.finfo(x.dtype).tiny, 0, size)
        x = safe_divide(x, size)
        g = self.gram(x, x)
        square = frobenius(g)
        g = safe_divide(g, square)
        square *= jnp.sqrt(frobenius(matmul(g, g)))
        bound = jnp.sqrt(square) * (1 + 16 * jnp.finfo(x.dtype).eps)
        return size * bound.reshape(self.per_matrix)


def frobenius(m: Array) -> Array:
    """‖M‖_F of square matrices, shape (*batch, 1, 1)."""
    return jnp.sqrt(jnp.sum(jnp.square(m), (-2, -1), keepdims=True))


def matmul(a: Array, b: Array) -> Array:
    """AB of square matrices."""
    return jnp.matmul(a, b, precision="highest")


def polar(x: Array, gram: Callable, times: Callable, *, low: Array | float = 0.0, n_steps: int | None = None) -> Array:
    """X with its singular values in [low, 1] brought to 1: Q = U Vᵀ, the orthogonal factor of X = Q·P.

    X ← X·(aI + b·A + c·A²), A = XᵀX, with the coefficients that make the next singular values least far from 1. None
    of X may be above 1. Those below `low`, or 1e-6 if that is more (in float32), end between where they were and 1.

    Args:
      x: array, any layout that `gram` and `times` know: `Products` of a weight, or of square symmetric matrices.
      gram: (x, y) -> XᵀY.
      times: (x, m) -> XM.
      low: the larger it is, the fewer steps. One for all matrices is taken.
      n_steps: the last so many steps, instead of as many as `low` needs.
    """
    reach, high, coefficients = (jnp.asarray(a, x.dtype) for a in schedule(float(jnp.finfo(x.dtype).eps)))
    needed = jnp.sum(~(reach <= jnp.min(low))) + 1  # all steps where a matrix has NaN
    start = jnp.maximum(0, len(reach) - (needed if n_steps is None else n_steps))

    def step(k, x):
        a, b, c = coefficients[k]
        g = gram(x, x)
        return a * x + times(x, b * g + c * matmul(g, g))

    return jax.lax.fori_loop(start, len(reach), step, high[start] * x)


@functools.cache
def schedule(eps: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(reach, high, coefficients) of each step of `polar`, for numbers of precision `eps`.

    Step k maps [lₖ, hₖ] to [lₖ₊₁, hₖ₊₁], each nearer to 1, and reachₖ = lₖ/hₖ is what it starts from. The last step is
    the limit of them all: that of Newton and Schulz, and of Björck.
    """
    low, high = 8 * eps, 1.0
    steps = []
    while high - low > 1e-3:
        # The best polynomial takes some large singular values as far down as the smallest go up, where rounding would
        # be as large as they are. So it is the best for the upper part alone, and rises steeply below.
        # Rounding may also carry singular values a little beyond `high`.
        (a, b, c), error = _best_quintic(max(low, high / 10), 1.001 * high)
        steps.append((low / high, high, (a, b, c)))
        low, high = min(a * low + b * low**3 + c * low**5, 1 - error), 1 + error
    steps.append((low / high, high, (15 / 8, -10 / 8, 3 / 8)))
    reach, highs, coefficients = map(np.array, zip(*steps, strict=True))
    return reach, highs, coefficients


def _best_quintic(low: float, high: float) -> tuple[np.ndarray, float]:
    """(a, b, c) with the least greatest |ax + bx³ + cx⁵ − 1| over [low, high], and that error, by Remez's exchange."""
    x = low + (high - low) * np.array([0, 0.25, 0.75, 1])
    while True:
        # At the best p the error is as great at four points, with alternating signs.
        *p, error = np.linalg.solve(np.stack([x, x**3, x**5, [1, -1, 1, -1]], 1), np.ones(4))
        a, b, c = p
        extremes = np.sqrt(np.sort(np.roots([5 * c, 3 * b, a]).real))
        if np.allclose(x[1:3], extremes, rtol=1e-9):
            return np.array(p), abs(float(error))
        x[1:3] = extremes


def odd_function(f: Callable[..., Array], w: Array, axes: Axes | None, *scalars: Array) -> Array:
    """f(products, x, *scalars) of a weight, x in float32 or wider and laid out as `products` knows; dtype of `w`.

    An odd function of the singular values has a symmetric Jacobian, since U f(S) Vᵀ is a block of f of the symmetric
    matrix [[0, W], [Wᵀ, 0]]. So its product with a cotangent is taken forward: nothing is stored for the gradient but
    `w`, and loops may have any number of steps.
    """
    if w.size == 0:
        return w

    def run(w, *scalars):
        x, r = Reading.of(axes, w.shape).split_groups(w.astype(accumulation_dtype(w.dtype)))
        return f(Products.of(r, x.shape), x, *scalars).astype(w.dtype).reshape(w.shape)

    def backward(arguments, cotangent):
        w, *scalars = arguments
        along = lambda *tangents: jax.jvp(run, arguments, tangents)[1]
        still = [jnp.zeros_like(s) for s in scalars]
        one = lambda i: along(jnp.zeros_like(w), *still[:i], jnp.ones_like(still[i]), *still[i + 1 :])
        return along(cotangent, *still), *(jnp.sum(cotangent * one(i)).astype(s.dtype) for i, s in enumerate(scalars))

    symmetric = jax.custom_vjp(run)
    symmetric.defvjp(lambda *arguments: (run(*arguments), arguments), backward)
    return auto_sharded(symmetric, w, *scalars, like=w)


def _einsum(spec: str, a: Array, b: Array) -> Array:
    return jnp.einsum(spec, a, b, precision="highest")
