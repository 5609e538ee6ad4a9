"""Odd functions of the singular values, U f(S) Vᵀ for W = U S Vᵀ, by matrix products alone.

They avoid the SVD, which suits neither meshes nor TPUs. The iterations below multiply a weight by itself and by square
matrices of its shorter side.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import string
from collections.abc import Callable, Sequence
from typing import NamedTuple

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
    """Products of weights of one shape, read as (a batch of) matrices X whose n columns are the shorter side.

    Weights are not reshaped, so shardings stay unchanged. Square matrices have shape (*batch, n, n).
    """

    gram_spec: str
    times_spec: str
    square_shape: tuple[int, ...]  # (*batch, n, n), before the axes of each n are merged
    batch_shape: tuple[int, ...]  # sizes of the batch axes, in array order
    per_matrix_shape: tuple[int, ...]  # sizes of the batch axes, and 1 for every other axis of the array
    matrix_axes: tuple[int, ...]

    @classmethod
    def of(cls, r: Reading, shape: tuple[int, ...]) -> Products:
        """The products of weights of a shape, as `r` reads them."""

        def size(axes: Sequence[int]) -> int:
            return math.prod(shape[a] for a in axes)

        def pick(letters: str, axes: Sequence[int]) -> str:
            return "".join(letters[a] for a in axes)

        batch = tuple(sorted(r.batch))
        short = min(r.output, r.contracted, key=size)
        x = string.ascii_letters[: len(shape)]
        y = "".join(c.upper() if a in short else c for a, c in enumerate(x))
        square = pick(x, batch) + pick(x, short) + pick(y, short)
        batch_shape = tuple(shape[a] for a in batch)
        return cls(
            gram_spec=f"{x},{y}->{square}",
            times_spec=f"{x},{square}->{y}",
            square_shape=batch_shape + 2 * tuple(shape[a] for a in short),
            batch_shape=batch_shape,
            per_matrix_shape=tuple(s if a in batch else 1 for a, s in enumerate(shape)),
            matrix_axes=tuple(a for a in range(len(shape)) if a not in batch),
        )

    def gram(self, x: Array, y: Array) -> Array:
        """XᵀY."""
        n = math.isqrt(math.prod(self.square_shape[len(self.batch_shape) :]))
        return _einsum(self.gram_spec, x, y).reshape(*self.batch_shape, n, n)

    def times(self, x: Array, m: Array) -> Array:
        """XM for a square M."""
        return _einsum(self.times_spec, x, m.reshape(self.square_shape))

    def norm_bound(self, x: Array) -> Array:
        """An upper bound on σ₁ of each matrix, at most n^⅛·σ₁ and constant for gradients; 0 for a zero matrix.

        σ₁ <= ‖(XᵀX)²‖_F^¼ = (Σσ⁸)^⅛. Everything is scaled to 1 first, so nothing overflows.
        """
        x = jax.lax.stop_gradient(x)
        size = jnp.max(jnp.abs(x), self.matrix_axes, keepdims=True)
        size = jnp.where(size < jnp.finfo(x.dtype).tiny, 0, size)
        x = safe_divide(x, size)
        g = self.gram(x, x)
        square = frobenius(g)
        g = safe_divide(g, square)
        square *= jnp.sqrt(frobenius(matmul(g, g)))
        bound = jnp.sqrt(square) * (1 + 16 * jnp.finfo(x.dtype).eps)
        return size * bound.reshape(self.per_matrix_shape)


def frobenius(m: Array) -> Array:
    """Frobenius norms of square matrices, shape (*batch, 1, 1)."""
    return jnp.sqrt(jnp.sum(jnp.square(m), (-2, -1), keepdims=True))


def matmul(a: Array, b: Array) -> Array:
    """The product of square matrices in full precision."""
    return jnp.matmul(a, b, precision="highest")


def polar(x: Array, gram: Callable, times: Callable, *, low: Array | float = 0.0, n_steps: int | None = None) -> Array:
    """The polar factor Q = U Vᵀ of X = Q·P: brings singular values in [low, 1] to 1.

    Iterates X ← X·(aI + b·A + c·A²), A = XᵀX, with the coefficients that bring the next singular values closest to 1.
    The singular values of X must not exceed 1. Those below `low`, or below 1e-6 if that is larger (in float32), end
    between their value and 1.

    Args:
      x: array in the layout of `gram` and `times`: those of `Products`, or of symmetric square matrices.
      gram: (x, y) -> XᵀY.
      times: (x, m) -> XM.
      low: lower bound; the larger it is, the fewer the steps. All matrices take the steps that the smallest one needs.
      n_steps: takes only this many of the last steps, instead of as many as `low` needs.
    """
    reach, high, coefficients = (jnp.asarray(a, x.dtype) for a in polar_steps(float(jnp.finfo(x.dtype).eps)))
    needed = jnp.sum(~(reach <= jnp.min(low))) + 1  # all steps if a matrix has NaN
    start = jnp.maximum(0, len(reach) - (needed if n_steps is None else n_steps))

    def step(k, x):
        a, b, c = coefficients[k]
        g = gram(x, x)
        return a * x + times(x, b * g + c * matmul(g, g))

    return jax.lax.fori_loop(start, len(reach), step, high[start] * x)


class PolarSteps(NamedTuple):
    """The steps of `polar`: step k maps [lₖ, hₖ] to [lₖ₊₁, hₖ₊₁], which is closer to 1."""

    reach: np.ndarray
    """lₖ/hₖ, shape (steps,)."""
    high: np.ndarray
    """hₖ, shape (steps,)."""
    coefficients: np.ndarray
    """(a, b, c) of the polynomial, shape (steps, 3)."""


@functools.cache
def polar_steps(eps: float) -> PolarSteps:
    """The steps for numbers of precision `eps`. The last is their limit, the Newton-Schulz (Björck) iteration."""
    low, high = 8 * eps, 1.0
    steps = []
    while high - low > 1e-3:
        # The minimax polynomial over [low, high] maps some large singular values as far down as the smallest go up,
        # where rounding errors are as large as the values. So take the minimax polynomial of the upper part, which
        # rises steeply below. The factor 1.001 allows for values that rounding carries beyond `high`.
        (a, b, c), error = _minimax_quintic(max(low, high / 10), 1.001 * high)
        steps.append((low / high, high, (a, b, c)))
        low, high = min(a * low + b * low**3 + c * low**5, 1 - error), 1 + error
    steps.append((low / high, high, (15 / 8, -10 / 8, 3 / 8)))
    return PolarSteps(*map(np.array, zip(*steps, strict=True)))


def _minimax_quintic(low: float, high: float) -> tuple[np.ndarray, float]:
    """(a, b, c) that minimize max |ax + bx³ + cx⁵ − 1| over [low, high], and that error, by the Remez algorithm."""
    x = low + (high - low) * np.array([0, 0.25, 0.75, 1])
    while True:
        # The optimal error equioscillates: it has equal magnitude and alternating signs at four points.
        *p, error = np.linalg.solve(np.stack([x, x**3, x**5, [1, -1, 1, -1]], 1), np.ones(4))
        a, b, c = p
        extremes = np.sqrt(np.sort(np.roots([5 * c, 3 * b, a]).real))
        if np.allclose(x[1:3], extremes, rtol=1e-9):
            return np.array(p), abs(float(error))
        x[1:3] = extremes


def odd_function(f: Callable[..., Array], w: Array, axes: Axes | None, *scalars: Array) -> Array:
    """Applies an odd function of the singular values, f(products, x, *scalars), to a weight, in the dtype of `w`.

    x is `w` in float32 or wider, in the layout of `products`. The Jacobian of such a function is symmetric, since
    U f(S) Vᵀ is a block of f of the symmetric matrix [[0, W], [Wᵀ, 0]]. The VJP is therefore computed as a JVP: the
    gradient stores only `w`, and loops may have any number of steps.
    """
    if w.size == 0:
        return w

    def run(w, *scalars):
        x, r = Reading.of(axes, w.shape).split_groups(w.astype(accumulation_dtype(w.dtype)))
        return f(Products.of(r, x.shape), x, *scalars).astype(w.dtype).reshape(w.shape)

    def forward(*arguments):
        return run(*arguments), arguments

    def backward(arguments, cotangent):
        w, *scalars = arguments
        zeros = [jnp.zeros_like(s) for s in scalars]

        def directional_derivative(*tangents):
            _, derivative = jax.jvp(run, arguments, tangents)
            return derivative

        def derivative_in_scalar(i):
            unit = [*zeros[:i], jnp.ones_like(zeros[i]), *zeros[i + 1 :]]
            return directional_derivative(jnp.zeros_like(w), *unit)

        w_gradient = directional_derivative(cotangent, *zeros)
        products = (jnp.sum(cotangent * derivative_in_scalar(i)) for i in range(len(scalars)))
        return w_gradient, *(p.astype(s.dtype) for p, s in zip(products, scalars, strict=True))

    symmetric = jax.custom_vjp(run)
    symmetric.defvjp(forward, backward)
    return auto_sharded(symmetric, w, *scalars, like=w)


def _einsum(spec: str, a: Array, b: Array) -> Array:
    return jnp.einsum(spec, a, b, precision="highest")
