"""The exact spectral norm of a weight, and spectral normalization by it."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxweights.core.axes import Axes, Reading, axes_or_default
from jaxweights.core.checks import check_scalar, check_weight
from jaxweights.core.transform import Number
from jaxweights.numerics.batching import map_matrices
from jaxweights.numerics.dtypes import accumulation_dtype
from jaxweights.numerics.norms import safe_divide


def spectral_norm(w: jax.Array, *, axes: Axes | None = None) -> jax.Array:
    """The spectral norm of a weight: its largest singular value, exactly (by SVD).

    σ(W) = max ‖xᵀW‖₂ over ‖x‖₂ = 1, where W is the matrix that `axes` reads from `w`.

    Args:
      w: float array of any shape.
      axes: how `w` is read as a matrix; (..., in, out) by default.

    Returns:
      σ in float32 or wider, shape (*batch, [groups]); () for one matrix. The gradient is uvᵀ for the leading singular
      vectors u and v. A zero or empty matrix has σ = 0.

    Raises:
      TypeError: `w` is not a float array.
      ValueError: `axes` does not fit `w`.

    >>> import jax.numpy as jnp
    >>> print(spectral_norm(jnp.diag(jnp.array([1.0, -3.0, 2.0]))))
    3.0
    """
    w = check_weight(w)
    matrix = axes_or_default(axes, w.ndim).matrix(w.astype(accumulation_dtype(w.dtype)))
    if 0 in matrix.shape:
        return jnp.zeros(matrix.shape[:-2], matrix.dtype)
    # Scale to 1 first: tiny weights would underflow in the SVD, and huge ones overflow.
    size = jax.lax.stop_gradient(jnp.max(jnp.abs(matrix), (-2, -1), keepdims=True))
    scaled = safe_divide(jax.lax.stop_gradient(matrix), size)
    u, v = map_matrices(leading_vectors, scaled)
    return jnp.einsum("...i,...ij,...j->...", u, matrix, v, precision="highest")


def leading_vectors(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The left and right singular vectors of the largest singular value."""
    u, _, vt = jnp.linalg.svd(matrix, full_matrices=False)
    return u[:, 0], vt[0]


def spectral_normalize(
    w: jax.Array,
    sigma: jax.Array | None = None,
    *,
    axes: Axes | None = None,
    target: Number = 1.0,
    soft: bool = False,
) -> jax.Array:
    """Divides a weight by its spectral norm.

    w' = w·c/σ(W) with target c, or w' = w·min(1, c/σ(W)) if `soft`. The gradient flows through a σ computed here.

    Args:
      w: float array of any shape.
      sigma: σ, if known, shape (*batch, [groups]) or a scalar; `spectral_norm(w, axes=axes)` by default.
      axes: how `w` is read as a matrix; (..., in, out) by default.
      target: c >= 0, the σ of the result: a number or a scalar array.
      soft: whether to leave matrices with σ <= c unchanged, bit for bit.

    Returns:
      Array of the shape and dtype of `w`. A zero matrix stays zero.

    Raises:
      TypeError: `w` is not a float array, or `target` is not a number.
      ValueError: `axes` does not fit `w`, `sigma` has another shape, or `target` is negative or NaN.

    >>> import jax.numpy as jnp
    >>> print(spectral_normalize(jnp.diag(jnp.array([1.0, 4.0]))))
    [[0.25 0.  ]
     [0.   1.  ]]

    References: Miyato, Kataoka, Koyama and Yoshida, Spectral Normalization for Generative Adversarial Networks,
    arXiv:1802.05957, 2018.
    """
    w = check_weight(w)
    check_scalar("target", target, 0)
    r = Reading.of(axes, w.shape)
    sigma = spectral_norm(w, axes=axes) if sigma is None else check_weight(sigma, "sigma")
    view, gr = r.split_groups(w)
    batch = tuple(view.shape[a] for a in gr.batch)
    if sigma.shape not in ((), batch):
        raise ValueError(f"sigma must have shape {batch} (one per matrix of w {w.shape}) or (), got {sigma.shape}")
    if sigma.shape:
        sigma = jnp.expand_dims(
            jnp.transpose(sigma, sorted(range(len(gr.batch)), key=lambda i: gr.batch[i])),
            tuple(a for a in range(view.ndim) if a not in gr.batch),
        )
    dtype = accumulation_dtype(w.dtype)
    view, sigma, target = view.astype(dtype), sigma.astype(dtype), jnp.asarray(target, dtype)
    new = target * safe_divide(view, sigma)
    return (jnp.where(sigma > target, new, view) if soft else new).astype(w.dtype).reshape(w.shape)
