"""The largest singular value of a linear map: a search in a small space that each step renews.

It knows the map by its products alone, so it serves matrices and convolutions alike:

>>> import jax, jax.numpy as jnp
>>> w = jnp.diag(jnp.arange(1.0, 31.0))
>>> operator = Operator(lambda x: w @ x, (30,))
>>> search = start(operator, jax.random.key(0))
>>> move = jax.jit(lambda search: step(operator, search)[0])
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

from jaxweights.numerics import safe_divide, safe_norm

Array = jax.Array
Search = dict[str, Array]

WIDTH = 4
"""How many singular pairs are followed: the leading one, and what may overtake it when the map changes."""
_SETTLED = 1e-3
"""A step that raises the estimate of σ by no more than this part of it finds a search that has caught up."""
_MOST_STEPS = 8
"""How many steps at most the search takes to catch up."""


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
      the space of the next step, (*batch, 3·WIDTH, ...)}.
    """
    basis = jax.random.normal(key, operator.search_shapes()["basis"], operator.dtype)
    basis = _orthonormal(operator, _unit(operator, basis))
    return {"v": _first(operator, _unit(operator, basis)), "basis": basis}


def step(operator: Operator, search: Search) -> tuple[Search, Array]:
    """Moves a search on, by one pass over the weights with A and one with Aᵀ.

    Block LOBPCG for the leading singular pairs of AᵀA: in the span of the basis, Rayleigh and Ritz find the best X from
    AX; the next basis spans X, AᵀAX, and the directions P in which X has moved. Only vectors are kept from step to
    step, no products, so the map may change between steps. One that is zero or not finite leaves its search as it was.

    Returns:
      The search, and by which part of it the estimate of σ has grown, the most of the batch.

    References: Knyazev, Toward the Optimal Preconditioned Eigensolver: Locally Optimal Block Preconditioned Conjugate
    Gradient Method, SIAM J. Sci. Comput. 23, 2001.
    """
    axis, basis = operator.n_batch, search["basis"]
    per_map = lambda a, like: a.reshape(*a.shape, *(1,) * (like.ndim - axis))
    images = operator.times(basis)
    size = jnp.max(jnp.abs(images), tuple(range(axis, images.ndim)), initial=0)
    images = safe_divide(images, per_map(size, images))
    gram = _gram(operator, images, images)
    c = _leading_vectors(gram)
    values = jnp.maximum(jnp.einsum("...ik,...ij,...jk->...k", c, gram, c, precision="highest"), 0)
    growth = jnp.sqrt(safe_divide(values[..., 0], gram[..., 0, 0])) - 1

    moved = jnp.where(jnp.arange(3 * WIDTH)[:, None] < WIDTH, 0, c)  # the basis begins with the X of the last step
    x, p = jnp.split(_combine(operator, jnp.concatenate([c, moved], -1), basis), 2, axis)
    u = _combine(operator, safe_divide(c, jnp.sqrt(values)[..., None, :]), images)
    z = operator.transpose_times(u)
    z = safe_divide(z, per_map(size, z))
    length = _length(operator, z)
    z = safe_divide(z, length)
    rest = jnp.concatenate([z, p], axis)
    for _ in range(2):  # twice, since little may be left after the first time
        # Fixed directions stand in for those that vanish, and are mixed into all, too little to change σ by more than
        # a rounding. A sparse map may map the space of X to itself: without them the search would never leave it.
        rest = _unit(operator, rest - _combine(operator, _gram(operator, x, rest), x))
        rest += jnp.sqrt(jnp.finfo(x.dtype).eps) * _probes(operator)
    new = {"v": _first(operator, z), "basis": _orthonormal(operator, jnp.concatenate([x, rest], axis))}

    longest = jnp.max(length, tuple(range(axis, length.ndim)))
    good = (longest > 0) & (longest < jnp.inf)  # false where NaN
    search = {n: jnp.where(per_map(good, a), a, search[n]) for n, a in new.items()}
    return search, jnp.max(jnp.where(good, growth, 0), initial=0)


def advance(operator: Operator, search: Search, n_steps: int) -> Search:
    """`n_steps` steps, and more, up to 8, while one still raises the estimate of σ by over .1%."""
    going = lambda carry: (carry[1] < n_steps) | ((carry[2] > _SETTLED) & (carry[1] < _MOST_STEPS))

    def move(carry):
        search, growth = step(operator, carry[0])
        return search, carry[1] + 1, growth

    return jax.lax.while_loop(going, move, (search, 0, jnp.zeros((), operator.dtype)))[0]


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
    inner = lambda x: tuple(range(axis, x.ndim))
    y = jnp.expand_dims(operator.matvec(v), axis)
    size = safe_norm(y, inner(y), keepdims=True)
    image = jnp.squeeze(operator.transpose_times(safe_divide(y, size)), axis)
    residual = image - size.reshape(*v.shape[:axis], *(1,) * (v.ndim - axis)) * v
    return safe_norm(residual, inner(residual)) / math.sqrt(2)


# Blocks of vectors, (*batch, n, ...)


def _first(operator: Operator, xs: Array) -> Array:
    return jax.lax.index_in_dim(xs, 0, operator.n_batch, keepdims=False)


def _length(operator: Operator, xs: Array) -> Array:
    return jnp.sqrt(jnp.sum(jnp.square(xs), tuple(range(operator.n_batch + 1, xs.ndim)), keepdims=True))


def _unit(operator: Operator, xs: Array) -> Array:
    """Each vector by its length; a zero one stays zero."""
    return safe_divide(xs, _length(operator, xs))


def _gram(operator: Operator, xs: Array, ys: Array) -> Array:
    """XᵀY, (*batch, n, m)."""
    batch, inner = tuple(range(operator.n_batch)), tuple(range(operator.n_batch + 1, xs.ndim))
    return jax.lax.dot_general(xs, ys, ((inner, inner), (batch, batch)), precision="highest")


def _combine(operator: Operator, c: Array, xs: Array) -> Array:
    """XC, with C of (*batch, n, m)."""
    batch, n = tuple(range(operator.n_batch)), operator.n_batch
    return jax.lax.dot_general(c.mT, xs, (((n + 1,), (n,)), (batch, batch)), precision="highest")


def _orthonormal(operator: Operator, xs: Array) -> Array:
    """Gram-Schmidt, by the inverse Cholesky factor; zeros for the vectors that add hardly a direction."""
    return _combine(operator, _inverse_cholesky(_gram(operator, xs, xs)).mT, xs)


# Small matrices, (*batch, n, n), by products alone: they serve stacks, meshes and TPUs as LAPACK does not.


def _leading_vectors(gram: Array) -> Array:
    """The leading eigenvectors of a positive matrix, (*batch, n, WIDTH), orthonormal or zero.

    Squared again and again, G becomes a multiple of ccᵀ for the leading c, unless others are as good to 1e-6; then G is
    deflated.
    """

    def square(_, p):
        p = jnp.matmul(p, p, precision="highest")
        return safe_divide(p, jnp.trace(p, axis1=-2, axis2=-1)[..., None, None])

    def find(i, state):
        gram, found = state
        p = safe_divide(gram, jnp.trace(gram, axis1=-2, axis2=-1)[..., None, None])
        p = jax.lax.fori_loop(0, 16, square, p)
        largest = jnp.argmax(jnp.diagonal(p, axis1=-2, axis2=-1), -1)[..., None, None]
        c = jnp.take_along_axis(p, largest, -1)
        c -= jnp.matmul(found, jnp.sum(found * c, -2)[..., None], precision="highest")
        c = safe_divide(c, jnp.sqrt(jnp.sum(jnp.square(c), -2, keepdims=True)))
        gram -= jnp.sum(c * jnp.matmul(gram, c, precision="highest"), -2, keepdims=True) * c * c.mT
        return gram, jnp.where(jnp.arange(WIDTH) == i, c, found)

    return jax.lax.fori_loop(0, WIDTH, find, (gram, jnp.zeros_like(gram[..., :WIDTH])))[1]


def _inverse_cholesky(gram: Array) -> Array:
    """L⁻¹ of G = LLᵀ, with zeros for the vectors that depend on those before them, to √eps."""
    n = gram.shape[-1]
    place, least = jnp.arange(n), jnp.sqrt(jnp.finfo(gram.dtype).eps)

    def eliminate(j, state):
        gram, out = state
        here = place == j
        column = jnp.sum(jnp.where(here, gram, 0), -1)
        pivot = jnp.sum(jnp.where(here, column, 0), -1, keepdims=True)
        inverse = jnp.where(pivot > least, jax.lax.rsqrt(jnp.maximum(pivot, 1e-9)), 0)
        row = jnp.sum(jnp.where(here[:, None], out, 0), -2) * inverse
        below = jnp.where(place > j, column * inverse, 0)[..., None]
        out = jnp.where(here[:, None], row[..., None, :], out - below * row[..., None, :])
        return gram - below * below.mT, out

    identity = jnp.broadcast_to(jnp.eye(n, dtype=gram.dtype), gram.shape)
    return jax.lax.fori_loop(0, n, eliminate, (gram, identity))[1]


def _probes(operator: Operator) -> Array:
    """Vectors fixed and in general position, as many as 2·WIDTH: a hash of each entry's place."""
    shape = (2 * WIDTH, *operator.shape[operator.n_batch :])
    word = jnp.arange(math.prod(shape), dtype=jnp.uint32).reshape(shape) * jnp.uint32(0x9E3779B1)
    word = (word ^ (word >> 15)) * jnp.uint32(0x85EBCA77)
    word = (word ^ (word >> 13)) * jnp.uint32(0xC2B2AE3D)
    xs = (word >> 8).astype(operator.dtype) / 2**23 - 1
    return xs / jnp.sqrt(jnp.asarray(max(1, xs.size // shape[0]) / 3, operator.dtype))
