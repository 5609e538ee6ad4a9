"""The largest singular value of a linear map: a search in a small space that each step renews.

It knows the map by its products alone, so it serves matrices and convolutions alike:

>>> import jax, jax.numpy as jnp
>>> w = jnp.diag(jnp.arange(1.0, 31.0))
>>> operator = Operator(lambda x: w @ x, (30,))
>>> search = start(operator, jax.random.key(0))
>>> move = jax.jit(lambda search: step(operator, search))
>>> for _ in range(10):
...     search = move(search)
>>> print(f"{sigma(operator, search['v']):.4f}")
30.0000
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxweights.numerics import each_matrix, safe_divide, safe_norm

Array = jax.Array
Search = dict[str, Array]

WIDTH = 4
"""How many singular pairs are followed: the leading one, and those that may overtake it when the map changes."""


@dataclasses.dataclass(frozen=True)
class Operator:
    """A linear map A, or a batch of them.

    Args:
      matvec: x -> Ax, for one x (of each map of the batch) of shape `shape`. The result may have any shape that has
        the batch axes first. It is linear in x and closes over the weights.
      shape: (*batch, ...), that of x. What is stored is some vectors like x, so let x be on the smaller side.
      n_batch: how many leading axes of x number maps of their own.
      dtype: of x and Ax, float32 or wider.
      transpose: y -> Aᵀy, like `matvec`; by default JAX finds it.
    """

    matvec: Callable[[Array], Array]
    shape: tuple[int, ...]
    n_batch: int = 0
    dtype: jnp.dtype = dataclasses.field(default_factory=lambda: jnp.dtype(jnp.float32))
    transpose: Callable[[Array], Array] | None = None

    def times(self, xs: Array) -> Array:
        """AX for a block of vectors, (*batch, n, ...): one pass over the weights."""
        return jax.vmap(self.matvec, self.n_batch, self.n_batch)(xs)

    def transpose_times(self, ys: Array) -> Array:
        """AᵀY for a block of vectors: one pass over the weights."""
        x = jax.ShapeDtypeStruct(self.shape, self.dtype)
        transpose = self.transpose or (lambda y: jax.linear_transpose(self.matvec, x)(y)[0])
        return jax.vmap(transpose, self.n_batch, self.n_batch)(ys)

    def search_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each array of a search."""
        batch, inner = self.shape[: self.n_batch], self.shape[self.n_batch :]
        return {"v": self.shape, "basis": (*batch, 3 * WIDTH, *inner)}


def start(operator: Operator, key: Array) -> Search:
    """A search from random vectors.

    Returns:
      {"v": an estimate of the leading right singular vector, (*batch, ...); "basis": orthonormal vectors that span
      the space of the next step, (*batch, 12, ...)}.
    """
    basis = jax.random.normal(key, operator.search_shapes()["basis"], operator.dtype)
    basis = _orthonormal(operator, _unit(operator, basis))
    first = jax.lax.slice_in_dim(basis, 0, 1, axis=operator.n_batch)
    return {"v": jnp.squeeze(_unit(operator, first), operator.n_batch), "basis": basis}


def step(operator: Operator, search: Search) -> Search:
    """Moves a search on, by one pass over the weights with A and one with Aᵀ.

    Block LOBPCG for the leading singular pairs: in the span of the basis X, Rayleigh and Ritz find the best V from AX;
    Aᵀ gives the residuals R of V; the next basis spans V, R and the directions P in which V has moved. Only vectors
    are kept from step to step, no products, so the map may change between steps. Where it is zero `v` is kept. One
    that is not finite leaves its search as it was.

    References: Knyazev, Toward the Optimal Preconditioned Eigensolver: Locally Optimal Block Preconditioned Conjugate
    Gradient Method, SIAM J. Sci. Comput. 23, 2001.
    """
    axis, basis = operator.n_batch, search["basis"]
    inner = lambda x: tuple(range(axis, x.ndim))
    images = operator.times(basis)
    images = safe_divide(images, jnp.max(jnp.abs(images), inner(images), keepdims=True))
    _, c = _eigh(_gram(operator, images, images))
    c = c[..., ::-1][..., :WIDTH]
    v = _combine(operator, c, basis)
    z = operator.transpose_times(_unit(operator, _combine(operator, c, images)))
    p = _combine(operator, c[..., WIDTH:, :], jax.lax.slice_in_dim(basis, WIDTH, 3 * WIDTH, axis=axis))
    rest = jnp.concatenate([z, p], axis)
    for _ in range(2):  # twice, since little may be left after the first time
        rest = _unit(operator, rest - _combine(operator, _gram(operator, v, rest), v))
    # Fixed directions stand in for those that vanish, and are mixed into all, too little to change σ by more than a
    # rounding. A sparse map may map the space of X to itself: without them the search would never leave it.
    new = jnp.concatenate([v, rest], axis)
    mixed = jnp.where(_norm(operator, new) == 0, 1, jnp.sqrt(jnp.finfo(new.dtype).eps))
    basis = _orthonormal(operator, new + mixed * _probes(operator))
    leading = jnp.squeeze(_unit(operator, jax.lax.slice_in_dim(z, 0, 1, axis=axis)), axis)
    leading = jnp.where(jnp.any(leading != 0, inner(leading), keepdims=True), leading, search["v"])
    finite = lambda x: jnp.all(jnp.isfinite(x), inner(x), keepdims=True)
    return {n: jnp.where(finite(a), a, search[n]) for n, a in (("v", leading), ("basis", basis))}


def sigma(operator: Operator, v: Array) -> Array:
    """σ̂ = ‖Av‖ for a unit v, shape (*batch): never above the largest singular value. One product with A.

    Its gradient is that of uᵀAv with u = Av/‖Av‖ and v held fixed: the gradient of the singular value, once v is its
    singular vector. Where Av = 0 it is 0.
    """
    y = operator.matvec(v)
    axis = tuple(range(operator.n_batch, y.ndim))
    fixed = jax.lax.stop_gradient(y)
    return jnp.sum(safe_divide(fixed, safe_norm(fixed, axis, keepdims=True)) * y, axis)


def error_bound(operator: Operator, v: Array) -> Array:
    """How far ‖Av‖ is at most from a singular value, for a unit v. One product with A and one with Aᵀ.

    ‖Aᵀu − σ̂v‖/√2, u = Av/σ̂: the residual of (u, v)/√2 as an eigenvector of the symmetric [[0, A], [Aᵀ, 0]], whose
    eigenvalues are plus and minus the singular values. That singular value is the nearest, not always the largest.
    """
    axis = operator.n_batch
    y = operator.times(jnp.expand_dims(v, axis))
    size = _norm(operator, y)
    u = safe_divide(y, size)
    residual = operator.transpose_times(u) - size * jnp.expand_dims(v, axis)
    return _norm(operator, residual).reshape(v.shape[:axis]) / jnp.sqrt(jnp.asarray(2, v.dtype))


# Blocks of vectors, (*batch, n, ...)


def _norm(operator: Operator, xs: Array) -> Array:
    return safe_norm(xs, tuple(range(operator.n_batch + 1, xs.ndim)), keepdims=True)


def _unit(operator: Operator, xs: Array) -> Array:
    """Each vector by its length; a zero one stays zero."""
    return safe_divide(xs, _norm(operator, xs))


def _gram(operator: Operator, xs: Array, ys: Array) -> Array:
    """XᵀY, (*batch, n, m)."""
    batch, inner = tuple(range(operator.n_batch)), tuple(range(operator.n_batch + 1, xs.ndim))
    return jax.lax.dot_general(xs, ys, ((inner, inner), (batch, batch)), precision="highest")


def _combine(operator: Operator, c: Array, xs: Array) -> Array:
    """XC, with C of (*batch, n, m)."""
    batch, n = tuple(range(operator.n_batch)), operator.n_batch
    return jax.lax.dot_general(c, xs, (((n,), (n,)), (batch, batch)), precision="highest")


def _eigh(gram: Array) -> tuple[Array, Array]:
    """Eigenvalues, from the smallest on, and vectors."""
    return each_matrix(lambda g: tuple(jnp.linalg.eigh(g)), gram)


def _orthonormal(operator: Operator, xs: Array) -> Array:
    """X(XᵀX)^-½: the nearest orthonormal vectors; shorter ones in the directions that X hardly has."""
    values, q = _eigh(_gram(operator, xs, xs))
    values = jnp.maximum(values, jnp.sqrt(jnp.finfo(xs.dtype).eps))
    return _combine(operator, jnp.matmul(q / jnp.sqrt(values)[..., None, :], q.mT, precision="highest"), xs)


def _probes(operator: Operator) -> Array:
    """As many vectors as the basis has, fixed and in general position: a hash of each entry's place."""
    shape = (3 * WIDTH, *operator.shape[operator.n_batch :])
    word = jnp.arange(math.prod(shape), dtype=jnp.uint32).reshape(shape) * jnp.uint32(0x9E3779B1)
    word = (word ^ (word >> 15)) * jnp.uint32(0x85EBCA77)
    word = (word ^ (word >> 13)) * jnp.uint32(0xC2B2AE3D)
    xs = (word >> 8).astype(operator.dtype) / 2**23 - 1
    return xs / jnp.sqrt(jnp.asarray(max(1, xs.size // shape[0]) / 3, operator.dtype))
