"""The largest singular value of a linear map: a search in a small space that each step renews.

It knows the map by its products alone, so it serves matrices and convolutions alike:

>>> import jax, jax.numpy as jnp
>>> w = jnp.diag(jnp.arange(1.0, 31.0))
>>> operator = Operator(lambda xs: xs @ w.T, (30,))
>>> search = start(operator, jax.random.key(0))
>>> move = jax.jit(lambda search: step(operator, search)[0])
>>> for _ in range(15):
...     search = move(search)
>>> print(f"{sigma(operator, search['v']):.4f}")
30.0000
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxweights.core.checks import check_state
from jaxweights.core.transform import State
from jaxweights.numerics.norms import safe_divide, safe_norm
from jaxweights.numerics.sharding import auto_sharded

Array = jax.Array
Search = dict[str, Array]

WIDTH = 2
"""How many singular pairs are followed: the leading one, and what may overtake it when the map changes."""
SPAN = WIDTH + 2
"""The dimensions of the space of a step."""
_SETTLED = 5e-5
"""A step that raises the estimate of σ by no more than this part of it finds a search that has caught up."""
_MOST_STEPS = 16
"""How many steps at most the search takes to catch up."""
_INITIAL_STEPS = 5
"""How many it takes at least from random vectors."""


@dataclasses.dataclass(frozen=True)
class Operator:
    """A linear map A, or a batch of them.

    Args:
      times: X -> AX, for a block of n vectors (of each map of the batch), (*batch, n, ...). The result may have any
        shape that begins with (*batch, n). It is linear in X and closes over the weights.
      shape: (*batch, ...), that of one vector. What is stored is some of them, so let x be on the smaller side.
      n_batch: how many leading axes number maps of their own.
      dtype: of X and AX, float32 or wider.
      transpose: Y -> AᵀY, like `times`; by default JAX finds it.
    """

    times: Callable[[Array], Array]
    shape: tuple[int, ...]
    n_batch: int = 0
    dtype: jnp.dtype = dataclasses.field(default_factory=lambda: jnp.dtype(jnp.float32))
    transpose: Callable[[Array], Array] | None = None

    def transpose_times(self, ys: Array) -> Array:
        """AᵀY for a block of vectors."""
        if self.transpose:
            return self.transpose(ys)
        batch, inner = self.shape[: self.n_batch], self.shape[self.n_batch :]
        xs = jax.ShapeDtypeStruct((*batch, ys.shape[self.n_batch], *inner), self.dtype)
        return jax.linear_transpose(self.times, xs)(ys)[0]

    def search_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each array of a search."""
        batch, inner = self.shape[: self.n_batch], self.shape[self.n_batch :]
        return {"v": self.shape, "basis": (*batch, SPAN, *inner)}


def start(operator: Operator, key: Array) -> Search:
    """A search from random vectors.

    Returns:
      {"v": an estimate of the leading right singular vector, (*batch, ...); "basis": orthonormal vectors that span
      the space of the next step, (*batch, 4, ...)}.
    """
    basis = jax.random.normal(key, operator.search_shapes()["basis"], operator.dtype)
    basis = _orthonormal(operator, _unit(operator, basis))
    return {"v": jax.lax.index_in_dim(_unit(operator, basis), 0, operator.n_batch, keepdims=False), "basis": basis}


def step(operator: Operator, search: Search) -> tuple[Search, Array]:
    """Moves a search on, by four products with A and one with Aᵀ.

    LOBPCG for the leading singular pair, that keeps the second: in the span of the basis, Rayleigh and Ritz find the
    best two vectors X from their images; the next basis spans X, AᵀAx for the leading x, and the direction p in which x
    has moved. Only vectors are kept from step to step, no products, so the map may change between steps. One that is
    zero or not finite leaves its search as it was.

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
    p = jnp.where(jnp.arange(SPAN)[:, None] < WIDTH, 0, c[..., :1])  # the basis begins with the X of the last step
    p = safe_divide(p, jnp.sqrt(jnp.sum(jnp.square(p), -2, keepdims=True)))
    x, p = jnp.split(_combine(operator, jnp.concatenate([c, p], -1), basis), [WIDTH], axis)

    image = size * jnp.sqrt(jnp.einsum("...i,...ij,...j->...", c[..., 0], gram, c[..., 0], precision="highest"))
    z = operator.transpose_times(_combine(operator, safe_divide(c[..., :1], image[..., None, None]), images))
    length = _length(operator, z)
    z = safe_divide(z, length)
    # What z adds is orthogonal to the whole basis, but for rounding. A fixed direction stands in where it vanishes: a
    # sparse map may map the space of X to itself, and the search would never leave it.
    leading = jax.lax.slice_in_dim(x, 0, 1, axis=axis)
    rest = z - _combine(operator, _gram(operator, leading, z), leading)
    rest = _unit(operator, rest + jnp.finfo(x.dtype).eps * _probe(operator))
    new = {"v": jnp.squeeze(z, axis), "basis": _orthonormal(operator, jnp.concatenate([x, rest, p], axis))}

    length = length.reshape(size.shape)
    good = (length > 0) & (length < jnp.inf)  # false where NaN
    growth = safe_divide(length, jnp.sqrt(gram[..., 0, 0])) - 1
    search = {n: jnp.where(per_map(good, a), a, search[n]) for n, a in new.items()}
    return search, jnp.max(jnp.where(good, growth, 0), initial=0)


def advance(operator: Operator, search: Search, n_steps: int) -> Search:
    """`n_steps` steps, and more, up to 16, while one still raises the estimate of σ by over .005%."""
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
    y = jnp.squeeze(operator.times(jnp.expand_dims(v, operator.n_batch)), operator.n_batch)
    axis = tuple(range(operator.n_batch, y.ndim))
    fixed = jax.lax.stop_gradient(y)
    return jnp.sum(safe_divide(fixed, safe_norm(fixed, axis, keepdims=True)) * y, axis)


def error_bound(operator: Operator, v: Array) -> Array:
    """How far ‖Av‖ is at most from a singular value, for a unit v. One product with A and one with Aᵀ.

    ‖Aᵀu − σ̂v‖/√2, u = Av/σ̂: the residual of (u, v)/√2 as an eigenvector of the symmetric [[0, A], [Aᵀ, 0]], whose
    eigenvalues are plus and minus the singular values. That singular value is the nearest, not always the largest.
    """
    v = jnp.expand_dims(v, operator.n_batch)
    image = operator.times(v)
    length = lambda xs: safe_norm(xs, tuple(range(operator.n_batch, xs.ndim)))
    size = length(image)
    per_map = lambda like: size.reshape(*size.shape, *(1,) * (like.ndim - size.ndim))
    residual = operator.transpose_times(safe_divide(image, per_map(image))) - per_map(v) * v
    return length(residual) / math.sqrt(2)


# The search in the state of a transform. `read(w, spec)` is the map that the transform sees in a weight.


def search_in(state: State, operator: Operator) -> Search:
    """The part of a state that the search moves, or an error unless it belongs to such a map."""
    shapes = operator.search_shapes()
    check_state(state, **shapes)
    return {n: state[n] for n in shapes}


@functools.partial(jax.jit, static_argnames=("read", "spec"))
def started(w: Array, key: Array, read: Callable[[Array, Any], Operator], spec: Any) -> Search:
    """A search from random vectors, brought close by a few steps."""
    search = auto_sharded(lambda w: start(read(w, spec), key), w)
    return moved(w, search, read, spec, _INITIAL_STEPS)


@functools.partial(jax.jit, static_argnames=("read", "spec", "n_steps"))
def moved(w: Array, search: Search, read: Callable[[Array, Any], Operator], spec: Any, n_steps: int) -> Search:
    """The search moved on by `n_steps` steps, and more while the estimate grows."""
    return auto_sharded(lambda w, search: advance(read(w, spec), search, n_steps), w, search)


# Blocks of vectors, (*batch, n, ...)


def _length(operator: Operator, xs: Array) -> Array:
    n, inner = operator.n_batch, tuple(range(operator.n_batch + 1, xs.ndim))
    batch = tuple(range(n + 1))
    square = jax.lax.dot_general(xs, xs, ((inner, inner), (batch, batch)), precision="highest")
    return jnp.sqrt(jnp.expand_dims(square, inner))


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

    Squared again and again, G becomes a multiple of ccᵀ for the leading c, unless others are nearly as good; then G is
    deflated.
    """
    unit_trace = lambda p: safe_divide(p, jnp.einsum("...ii->...", p)[..., None, None])

    def find(i, state):
        gram, found = state
        p = jax.lax.fori_loop(0, 12, lambda _, p: unit_trace(jnp.matmul(p, p, precision="highest")), unit_trace(gram))
        largest = jnp.argmax(jnp.einsum("...ii->...i", p), -1)[..., None, None]
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


def _probe(operator: Operator) -> Array:
    """A vector fixed and in general position, of length 1 or so: a hash of each entry's place."""
    shape = operator.shape[operator.n_batch :]
    word = jnp.arange(math.prod(shape), dtype=jnp.uint32).reshape(shape) * jnp.uint32(0x9E3779B1)
    word = (word ^ (word >> 15)) * jnp.uint32(0x85EBCA77)
    word = (word ^ (word >> 13)) * jnp.uint32(0xC2B2AE3D)
    x = (word >> 8).astype(operator.dtype) / 2**23 - 1
    return x / math.sqrt(max(1, math.prod(shape)) / 3)
