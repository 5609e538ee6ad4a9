"""Spectral clipping: projection of a weight onto the spectral-norm ball."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxweights.core.axes import Axes, Reading
from jaxweights.core.checks import check_scalar, check_weight
from jaxweights.core.transform import Number, Scalar, Transform
from jaxweights.numerics.dtypes import accumulation_dtype
from jaxweights.numerics.norms import safe_divide
from jaxweights.techniques.spectral.polar import frobenius, matmul, odd_function, polar

_TOLERANCE = 1e-5


def clip_singular_values(w: jax.Array, limit: Number, *, axes: Axes | None = None) -> jax.Array:
    """Clips the singular values of a weight to at most `limit`: projection onto the spectral-norm ball.

    w' = U min(S, c) Vᵀ, where W = U S Vᵀ is the matrix that `axes` reads from `w`. There is no SVD: for the polar
    decomposition W = QP, iterations of matrix products find Q and sign(P − cI), and

    w' = W − Q(P − cI)₊,  (P − cI)₊ = ½(P − cI)(I + sign(P − cI)).

    Args:
      w: float array of any shape.
      limit: c >= 0, a number or a scalar array.
      axes: how `w` is read as a matrix; (..., in, out) by default.

    Returns:
      Array of the shape and dtype of `w`, computed in float32 or wider. No singular value is above
      c·(1 + 1e-5) + 1e-6·σ₁ in float32; in 16 bits, rounding the result adds at most the norm of the rounding error.
      A matrix whose singular values are already below c·(1 + 1e-5) is unchanged bit for bit, and so is one with a NaN
      or infinite weight. The gradient is that of the formula.

    Raises:
      TypeError: `w` is not a float array, or `limit` is not a number.
      ValueError: `limit` is negative or NaN, or `axes` does not fit `w`.

    >>> import jax.numpy as jnp
    >>> print(clip_singular_values(jnp.diag(jnp.array([3.0, -2.0, 0.5])), 1.0).round(5))
    [[ 1.   0.   0. ]
     [ 0.  -1.   0. ]
     [ 0.   0.   0.5]]

    References: Yoshida and Miyato, Spectral Norm Regularization for Improving the Generalizability of Deep Learning,
    arXiv:1705.10941, 2017; Higham, Functions of Matrices, SIAM 2008, chapters 5 and 8.
    """
    w = check_weight(w)
    check_scalar("limit", limit, 0)
    Reading.of(axes, w.shape)

    def clip(products, w, limit):
        scale = products.norm_bound(w)
        # The limit relative to the scale, which no singular value exceeds.
        c = jnp.minimum(safe_divide(jnp.broadcast_to(limit, scale.shape), scale), 1)
        c = c.reshape(*products.batch_shape, 1, 1)
        unit = jnp.maximum(c, 1 - c)

        def clip_once(_, carry):
            x, moved = carry
            q = polar(x, products.gram, products.times, low=c)
            p = products.gram(q, x)
            beyond = (p + p.mT) / 2 - c * jnp.broadcast_to(jnp.eye(p.shape[-1], dtype=p.dtype), p.shape)
            # A singular value between c and c + low gets a sign between 0 and 1, and is clipped to c + low/8 or less.
            sign = polar(beyond / unit, matmul, matmul, low=8 * _TOLERANCE * c / unit)
            excess = (beyond + matmul(beyond, sign)) / 2
            over = (frobenius(excess) > _TOLERANCE * c).reshape(products.per_matrix_shape)
            return jnp.where(over, x - products.times(q, excess), x), moved | over

        x = safe_divide(w, scale)
        # The first pass has the rounding error of σ₁. If c is far below σ₁, a second pass has that of c.
        n_passes = jnp.where(jnp.min(c) >= 0.1, 1, 2)
        new, moved = jax.lax.fori_loop(0, n_passes, clip_once, (x, jnp.zeros(products.per_matrix_shape, bool)))
        return jnp.where(limit == 0, 0, jnp.where(moved, scale * new, w))

    return odd_function(clip, w, axes, jnp.asarray(limit, accumulation_dtype(w.dtype)))


@dataclasses.dataclass(frozen=True)
class ClipSingularValues(Transform):
    """Clips singular values to at most `limit`: projection onto the spectral-norm ball.

    State: none, unless `limit` is a schedule.

    >>> import jax.numpy as jnp
    >>> print(ClipSingularValues(1.0).apply(jnp.diag(jnp.array([3.0, 0.5])), {}).round(5))
    [[1.  0. ]
     [0.  0.5]]
    """

    limit: Scalar
    axes: Axes | None = None
    scheduled: ClassVar[frozenset[str]] = frozenset({"limit"})
    takes_axes: ClassVar[bool] = True
    transposable: ClassVar[bool] = True

    def __post_init__(self):
        check_scalar("limit", self.limit, 0, schedule=True)

    def apply(self, w, state):
        """`clip_singular_values(w, limit)`."""
        return clip_singular_values(w, self.value("limit", state), axes=self.axes)
