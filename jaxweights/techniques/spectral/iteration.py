"""The largest singular value of a linear map, by LOBPCG.

The search uses only products with the map, so it serves matrices and convolutions alike:

>>> import jax, jax.numpy as jnp
>>> w = jnp.diag(jnp.arange(1.0, 31.0))
>>> operator = Operator(lambda xs: xs @ w.T, (30,))
>>> search = start(operator, jax.random.key(0))
>>> for _ in range(3):
...     search = advance(operator, search, n_steps=5)
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
"""Number of singular pairs to follow: the leading one, and one that may overtake it when the map changes."""
SPAN = WIDTH + 2
"""Dimension of the subspace of a step."""
_SETTLED = 5e-5
"""The search has caught up once a step raises the estimate of σ by no more than this fraction."""
_MOST_STEPS = 16
"""Maximum number of steps to catch up."""
_INITIAL_STEPS = 5
"""Minimum number of steps from random vectors."""


@dataclasses.dataclass(frozen=True)
class Operator:
    """A linear map A, or a batch of them.

    Args:
      times: X -> AX for a block of n vectors (per map of the batch), (*batch, n, ...). The result may have any shape
        that begins with (*batch, n). The function is linear in X and closes over the weights.
      shape: (*batch, ...), the shape of one vector. The search stores some of them, so x should be on the smaller side.
      n_batch: number of leading axes that index separate maps.
      dtype: dtype of X and AX, float32 or wider.
      transpose: Y -> AᵀY, like `times`; by default JAX derives it.
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
        (products,) = jax.linear_transpose(self.times, xs)(ys)
        return products

    def search_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each array of a search."""
        batch, inner = self.shape[: self.n_batch], self.shape[self.n_batch :]
        return {"v": self.shape, "basis": (*batch, SPAN, *inner)}


def start(operator: Operator, key: Array) -> Search:
    """Starts a search from random vectors.

    Returns:
      {"v": an estimate of the leading right singular vector, (*batch, ...); "basis": orthonormal vectors that span
      the space of the next step, (*batch, 4, ...)}.
    """
    basis = jax.random.normal(key, operator.search_shapes()["basis"], operator.dtype)
    basis = _orthonormal(operator, _unit(operator, basis))
    return {"v": jax.lax.index_in_dim(_unit(operator, basis), 0, operator.n_batch, keepdims=False), "basis": basis}


def step(operator: Operator, search: Search) -> tuple[Search, Array]:
    """Takes one step of a search, with four products with A and one with Aᵀ.

    LOBPCG for the leading singular pair, which also keeps the second: the Rayleigh-Ritz method finds the best two
    vectors X in the span of the basis from its images. The next basis spans X, AᵀAx for the leading x, and the
    direction p in which x has moved. Steps pass on vectors but no products, so the map may change between steps. A map
    that is zero or not finite leaves its search unchanged.

    Returns:
      The search, and the relative growth of the estimate of σ, the largest of the batch.

    References: Knyazev, Toward the Optimal Preconditioned Eigensolver: Locally Optimal Block Preconditioned Conjugate
    Gradient Method, SIAM J. Sci. Comput. 23, 2001.
    """
    axis, basis = operator.n_batch, search["basis"]
    images = operator.times(basis)
    size = jnp.max(jnp.abs(images), tuple(range(axis, images.ndim)), initial=0)
    images = safe_divide(images, _expand(size, images))
    gram = _gram(operator, images, images)
    c = _leading_vectors(gram)
    p = jnp.where(jnp.arange(SPAN)[:, None] < WIDTH, 0, c[..., :1])  # the basis begins with the X of the last step
    p = safe_divide(p, jnp.sqrt(jnp.sum(jnp.square(p), -2, keepdims=True)))
    x, p = jnp.split(_combine(operator, jnp.concatenate([c, p], -1), basis), [WIDTH], axis)

    image = size * jnp.sqrt(jnp.einsum("...i,...ij,...j->...", c[..., 0], gram, c[..., 0], precision="highest"))
    z = operator.transpose_times(_combine(operator, safe_divide(c[..., :1], image[..., None, None]), images))
    length = _length(operator, z)
    z = safe_divide(z, length)
    # Up to rounding, the new part of z is orthogonal to the whole basis. Where it vanishes, a fixed direction replaces
    # it: a sparse map may map the span of X to itself, and the search would never leave it.
    leading = jax.lax.slice_in_dim(x, 0, 1, axis=axis)
    rest = z - _combine(operator, _gram(operator, leading, z), leading)
    rest = _unit(operator, rest + jnp.finfo(x.dtype).eps * _probe(operator))
    new = {"v": jnp.squeeze(z, axis), "basis": _orthonormal(operator, jnp.concatenate([x, rest, p], axis))}

    length = length.reshape(size.shape)
    good = (length > 0) & (length < jnp.inf)  # false where NaN
    growth = safe_divide(length, jnp.sqrt(gram[..., 0, 0])) - 1
    search = {n: jnp.where(_expand(good, a), a, search[n]) for n, a in new.items()}
    return search, jnp.max(jnp.where(good, growth, 0), initial=0)


def advance(operator: Operator, search: Search, n_steps: int) -> Search:
    """Takes `n_steps` steps, then more, up to 16 in all, while a step raises the estimate of σ by over 0.005%."""

    def is_behind(carry):
        _, done, growth = carry
        return (done < n_steps) | ((growth > _SETTLED) & (done < _MOST_STEPS))

    def move(carry):
        search, done, _ = carry
        search, growth = step(operator, search)
        return search, done + 1, growth

    search, _, _ = jax.lax.while_loop(is_behind, move, (search, 0, jnp.zeros((), operator.dtype)))
    return search


def sigma(operator: Operator, v: Array) -> Array:
    """σ̂ = ‖Av‖ for a unit v, shape (*batch): never above the largest singular value. One product with A.

    Its gradient is that of uᵀAv with u = Av/‖Av‖ and v held fixed. Once v has converged, this is the gradient of the
    singular value. Where Av = 0 it is 0.
    """
    y = jnp.squeeze(operator.times(jnp.expand_dims(v, operator.n_batch)), operator.n_batch)
    axis = tuple(range(operator.n_batch, y.ndim))
    fixed = jax.lax.stop_gradient(y)
    return jnp.sum(safe_divide(fixed, safe_norm(fixed, axis, keepdims=True)) * y, axis)


def error_bound(operator: Operator, v: Array) -> Array:
    """An upper bound on the distance from ‖Av‖ to a singular value, for a unit v. One product with A and one with Aᵀ.

    ‖Aᵀu − σ̂v‖/√2 with u = Av/σ̂ is the residual of (u, v)/√2 as an eigenvector of the symmetric [[0, A], [Aᵀ, 0]], whose
    eigenvalues are plus and minus the singular values. It bounds the distance to the nearest, not always the largest.
    """

    def norm_per_map(xs):
        return safe_norm(xs, tuple(range(operator.n_batch, xs.ndim)))

    v = jnp.expand_dims(v, operator.n_batch)
    image = operator.times(v)
    size = norm_per_map(image)
    residual = operator.transpose_times(safe_divide(image, _expand(size, image))) - _expand(size, v) * v
    return norm_per_map(residual) / math.sqrt(2)


# Searches in the state of a transform. `read(w, spec)` is the linear map that the transform reads from a weight.


def search_in(state: State, operator: Operator) -> Search:
    """The search in a state. Raises if the state belongs to another map."""
    shapes = operator.search_shapes()
    check_state(state, **shapes)
    return {n: state[n] for n in shapes}


@functools.partial(jax.jit, static_argnames=("read", "spec"))
def init_search(w: Array, key: Array, read: Callable[[Array, Any], Operator], spec: Any) -> Search:
    """Starts a search from random vectors and takes a few steps."""
    search = auto_sharded(lambda w: start(read(w, spec), key), w)
    return update_search(w, search, read, spec, _INITIAL_STEPS)


@functools.partial(jax.jit, static_argnames=("read", "spec", "n_steps"))
def update_search(w: Array, search: Search, read: Callable[[Array, Any], Operator], spec: Any, n_steps: int) -> Search:
    """Takes `n_steps` steps of a search, and more while the estimate grows."""
    return auto_sharded(lambda w, search: advance(read(w, spec), search, n_steps), w, search)


# Blocks of vectors, (*batch, n, ...)


def _expand(per_map: Array, like: Array) -> Array:
    """Appends axes of size 1 so that one value per map broadcasts to `like`."""
    return per_map.reshape(*per_map.shape, *(1,) * (like.ndim - per_map.ndim))


def _length(operator: Operator, xs: Array) -> Array:
    """The norm of each vector, (*batch, n, 1, ...)."""
    n, inner = operator.n_batch, tuple(range(operator.n_batch + 1, xs.ndim))
    batch = tuple(range(n + 1))
    square = jax.lax.dot_general(xs, xs, ((inner, inner), (batch, batch)), precision="highest")
    return jnp.sqrt(jnp.expand_dims(square, inner))


def _unit(operator: Operator, xs: Array) -> Array:
    """Scales each vector to length 1; a zero vector stays zero."""
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
    """Gram-Schmidt by the inverse Cholesky factor; vectors that hardly add a direction become zero."""
    return _combine(operator, _inverse_cholesky(_gram(operator, xs, xs)).mT, xs)


# Small matrices, (*batch, n, n), by products alone: unlike LAPACK, they suit stacks, meshes and TPUs.


def _leading_vectors(gram: Array) -> Array:
    """The leading eigenvectors of a positive matrix, (*batch, n, WIDTH), orthonormal or zero.

    Repeated squaring turns G into a multiple of ccᵀ for the leading eigenvector c, unless other eigenvalues are nearly
    as large. Then G is deflated.
    """

    def unit_trace(p):
        return safe_divide(p, jnp.einsum("...ii->...", p)[..., None, None])

    def square(_, p):
        return unit_trace(jnp.matmul(p, p, precision="highest"))

    def find(i, state):
        gram, found = state
        p = jax.lax.fori_loop(0, 12, square, unit_trace(gram))
        largest = jnp.argmax(jnp.einsum("...ii->...i", p), -1)[..., None, None]
        c = jnp.take_along_axis(p, largest, -1)
        c -= jnp.matmul(found, jnp.sum(found * c, -2)[..., None], precision="highest")
        c = safe_divide(c, jnp.sqrt(jnp.sum(jnp.square(c), -2, keepdims=True)))
        gram -= jnp.sum(c * jnp.matmul(gram, c, precision="highest"), -2, keepdims=True) * c * c.mT
        return gram, jnp.where(jnp.arange(WIDTH) == i, c, found)

    _, found = jax.lax.fori_loop(0, WIDTH, find, (gram, jnp.zeros_like(gram[..., :WIDTH])))
    return found


def _inverse_cholesky(gram: Array) -> Array:
    """L⁻¹ of G = LLᵀ, with zeros for vectors that depend on earlier ones, to within √eps."""
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
    _, inverse = jax.lax.fori_loop(0, n, eliminate, (gram, identity))
    return inverse


def _probe(operator: Operator) -> Array:
    """A fixed vector in general position, of length about 1: a hash of the index of each entry."""
    shape = operator.shape[operator.n_batch :]
    word = jnp.arange(math.prod(shape), dtype=jnp.uint32).reshape(shape) * jnp.uint32(0x9E3779B1)
    word = (word ^ (word >> 15)) * jnp.uint32(0x85EBCA77)
    word = (word ^ (word >> 13)) * jnp.uint32(0xC2B2AE3D)
    x = (word >> 8).astype(operator.dtype) / 2**23 - 1
    return x / math.sqrt(max(1, math.prod(shape)) / 3)
