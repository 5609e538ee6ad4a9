"""The largest singular value of a linear map, by LOBPCG.

The search uses only products with the map, so it serves matrices and convolutions alike:

>>> import jax, jax.numpy as jnp
>>> w = jnp.diag(jnp.arange(1.0, 31.0))
>>> operator = Operator(lambda xs: xs @ w.T, (30,), dtype=w.dtype)
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
from jaxweights.techniques.spectral.small_matrices import inverse_cholesky, two_leading_vectors

Array = jax.Array
Search = dict[str, Array]

WIDTH = 2
"""Number of singular pairs to follow: the leading one, and one that may overtake it when the map changes."""
SPAN = WIDTH + 2
"""Dimension of the subspace of a step."""
_SETTLED = 5e-5
"""The search has caught up once a step raises the estimate of σ by no more than this fraction."""
_MOST_STEPS = 16
"""Maximum number of steps of an update."""
_INITIAL_STEPS, _MOST_INITIAL_STEPS = 5, 64
"""Minimum and maximum number of steps from random vectors."""


@dataclasses.dataclass(frozen=True)
class Operator:
    """A linear map A, or a batch of them.

    Args:
      times: X -> AX for a block of n vectors (per map of the batch), (*batch, n, ...). The result has any shape that
        begins with (*batch, n). The function is linear in X and closes over the weights.
      shape: (*batch, ...), the shape of one vector. The search stores some of them, so x should be on the smaller side.
      n_batch: number of leading axes that index separate maps.
      dtype: dtype of X and AX, float32 or wider.
      transpose: Y -> AᵀY, like `times`; by default JAX derives it.
      images_last: whether `times` returns (*batch, ..., n) instead, which suits a matrix whose rows it multiplies.
    """

    times: Callable[[Array], Array]
    shape: tuple[int, ...]
    n_batch: int = 0
    dtype: jnp.dtype = dataclasses.field(default_factory=lambda: jnp.dtype(jnp.float32))
    transpose: Callable[[Array], Array] | None = None
    images_last: bool = False

    def transpose_times(self, ys: Array) -> Array:
        """AᵀY for a block of vectors, (*batch, n, ...)."""
        if self.transpose:
            return self.transpose(ys)
        batch, inner = self.shape[: self.n_batch], self.shape[self.n_batch :]
        xs = jax.ShapeDtypeStruct((*batch, ys.shape[self.n_batch], *inner), self.dtype)
        images = jnp.moveaxis(ys, self.n_batch, -1) if self.images_last else ys
        (products,) = jax.linear_transpose(self.times, xs)(images)
        return products

    def search_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each array of a search."""
        batch, inner = self.shape[: self.n_batch], self.shape[self.n_batch :]
        return {"v": self.shape, "basis": (*batch, SPAN, *inner)}


def start(operator: Operator, key: Array) -> Search:
    """Starts a search from random vectors.

    Returns:
      {"v": an estimate of the leading right singular vector, (*batch, ...); "basis": vectors that span the space of the
      next step, (*batch, 4, ...)}.
    """
    basis = _directions(operator, jax.random.key_data(key))
    return {"v": jax.lax.index_in_dim(basis, 0, operator.n_batch, keepdims=False), "basis": basis}


def step(operator: Operator, search: Search) -> tuple[Search, Array]:
    """Takes one step of a search, with four products with A and one with Aᵀ.

    LOBPCG for the leading singular pair, which also keeps the second: the Rayleigh-Ritz method finds the best two
    vectors X in the span of the basis from its images. The next basis spans X, AᵀAx for the leading x, and the
    direction p in which x has moved. Steps pass on vectors but no products, so the map may change between steps. A map
    that is zero or not finite leaves its search unchanged.

    A step starts from any vectors, such as the means of several searches: it orthonormalizes the basis, and replaces
    vectors of zero. The sign of the new v agrees with that of the old one, so that means of v do not cancel.

    Returns:
      The search, and the relative growth of the estimate of σ, the largest of the batch.

    References: Knyazev, Toward the Optimal Preconditioned Eigensolver: Locally Optimal Block Preconditioned Conjugate
    Gradient Method, SIAM J. Sci. Comput. 23, 2001.
    """
    axis = operator.n_batch
    basis = _orthonormal(operator, search["basis"])
    images = operator.times(basis)
    size = jnp.max(jnp.abs(images), tuple(range(axis, images.ndim)), initial=0)
    images = safe_divide(images, _expand(size, images))
    gram = _gram(operator, images, images, images=True)
    c = two_leading_vectors(gram)
    leading = c[..., :1]
    p = jnp.where(jnp.arange(SPAN)[:, None] < WIDTH, 0, leading)  # the basis begins with the X of the last step
    p = safe_divide(p, jnp.sqrt(jnp.sum(jnp.square(p), -2, keepdims=True)))

    image = jnp.sqrt(jnp.sum(leading * jnp.matmul(gram, leading, precision="highest"), -2, keepdims=True))
    u = _combine(operator, safe_divide(leading, size[..., None, None] * image), images, images=True)
    z = operator.transpose_times(u)

    # The new vectors are combinations of the basis and z. The new part of z is orthogonal to the basis.
    block = jnp.concatenate([basis, z], axis)
    products = _gram(operator, block, jnp.concatenate([z, jnp.expand_dims(search["v"], axis)], axis))
    length = jnp.sqrt(products[..., SPAN, 0])
    along = safe_divide(products[..., :1], length[..., None, None])[..., :SPAN, :]
    rest = -leading * jnp.sum(leading * along, -2, keepdims=True)
    columns = jnp.expand_dims(jnp.array([[1.0, 0, 0, 1, 0]], z.dtype), range(length.ndim))  # of v and of the new part
    unit = safe_divide(jnp.ones_like(length), length)[..., None, None] * columns
    c = jnp.concatenate([jnp.zeros_like(leading), c, rest, p], -1)
    c = jnp.concatenate([c, jnp.broadcast_to(unit, (*size.shape, 1, SPAN + 1))], -2)
    sign = jnp.where(products[..., SPAN, 1] < 0, -1, 1)[..., None, None].astype(z.dtype)
    v, basis = jnp.split(_combine(operator, sign * c, block), [1], axis)
    new = {"v": jnp.squeeze(v, axis), "basis": basis}

    good = (length > 0) & (length < jnp.inf)  # false where NaN
    growth = safe_divide(length, jnp.sqrt(gram[..., 0, 0])) - 1
    search = {n: jnp.where(_expand(good, a), a, search[n]) for n, a in new.items()}
    return search, jnp.max(jnp.where(good, growth, 0), initial=0)


def advance(operator: Operator, search: Search, n_steps: int, most: int = _MOST_STEPS) -> Search:
    """Takes `n_steps` steps, then more, up to `most` in all, while a step raises the estimate of σ by over 0.005%."""

    def is_behind(carry):
        _, done, growth = carry
        return (done < n_steps) | ((growth > _SETTLED) & (done < most))

    def move(carry):
        search, done, _ = carry
        search, growth = step(operator, search)
        return search, done + 1, growth

    search, _, _ = jax.lax.while_loop(is_behind, move, (search, 0, jnp.zeros((), operator.dtype)))
    return search


def sigma(operator: Operator, v: Array) -> Array:
    """σ̂ = ‖Av‖/‖v‖, shape (*batch): never above the largest singular value. One product with A.

    Its gradient is that of uᵀAv/‖v‖ with u = Av/‖Av‖ and v held fixed. Once v has converged, this is the gradient of
    the singular value. Where Av = 0 it is 0.
    """
    y = operator.times(_unit(operator, jnp.expand_dims(v.astype(operator.dtype), operator.n_batch)))
    axis = tuple(range(operator.n_batch, y.ndim))
    fixed = jax.lax.stop_gradient(y)
    return jnp.sum(safe_divide(fixed, safe_norm(fixed, axis, keepdims=True)) * y, axis)


def error_bound(operator: Operator, v: Array) -> Array:
    """An upper bound on the distance from σ̂ to a singular value. One product with A and one with Aᵀ.

    ‖Aᵀu − σ̂v‖/√2 with ‖v‖ = 1 and u = Av/σ̂ is the residual of (u, v)/√2 as an eigenvector of the symmetric
    [[0, A], [Aᵀ, 0]], whose eigenvalues are plus and minus the singular values. It bounds the distance to the nearest,
    not always the largest.
    """

    def norm_per_map(xs):
        return safe_norm(xs, tuple(range(operator.n_batch, xs.ndim)))

    v = _unit(operator, jnp.expand_dims(v, operator.n_batch))
    image = operator.times(v)
    size = norm_per_map(image)
    u = safe_divide(image, _expand(size, image))
    u = jnp.moveaxis(u, -1, operator.n_batch) if operator.images_last else u
    return norm_per_map(operator.transpose_times(u) - _expand(size, v) * v) / math.sqrt(2)


# Searches in the state of a transform. `read(w, spec)` is the linear map that the transform reads from a weight.


def search_in(state: State, operator: Operator) -> Search:
    """The search in a state. Raises if the state belongs to another map."""
    shapes = operator.search_shapes()
    check_state(state, **shapes)
    return {n: state[n] for n in shapes}


@functools.partial(jax.jit, static_argnames=("read", "spec"))
def init_search(w: Array, key: Array, read: Callable[[Array, Any], Operator], spec: Any) -> Search:
    """Starts a search from random vectors and takes a few steps."""
    search = auto_sharded(lambda w, key: start(read(w, spec), key), w, key)
    return update_search(w, search, read, spec, _INITIAL_STEPS, _MOST_INITIAL_STEPS)


@functools.partial(jax.jit, static_argnames=("read", "spec", "n_steps", "most"))
def update_search(
    w: Array, search: Search, read: Callable[[Array, Any], Operator], spec: Any, n_steps: int, most: int = _MOST_STEPS
) -> Search:
    """Takes `n_steps` steps of a search, and more, up to `most` in all, while the estimate grows."""

    def move(w, search):
        operator = read(w, spec)
        new = advance(operator, {n: a.astype(operator.dtype) for n, a in search.items()}, n_steps, most)
        return {n: a.astype(search[n].dtype) for n, a in new.items()}

    return auto_sharded(move, w, search)


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


def _vectors(operator: Operator, xs: Array, images: bool) -> tuple[int, tuple[int, ...]]:
    """The axis that counts the vectors of a block, or of a block of images, and the axes of each vector."""
    axis = xs.ndim - 1 if images and operator.images_last else operator.n_batch
    return axis, tuple(a for a in range(operator.n_batch, xs.ndim) if a != axis)


def _gram(operator: Operator, xs: Array, ys: Array, images: bool = False) -> Array:
    """XᵀY, (*batch, n, m)."""
    batch, (_, inner) = tuple(range(operator.n_batch)), _vectors(operator, xs, images)
    return jax.lax.dot_general(xs, ys, ((inner, inner), (batch, batch)), precision="highest")


def _combine(operator: Operator, c: Array, xs: Array, images: bool = False) -> Array:
    """XC, with C of (*batch, n, m): a block of m vectors, (*batch, m, ...)."""
    batch, (axis, _) = tuple(range(operator.n_batch)), _vectors(operator, xs, images)
    return jax.lax.dot_general(c.mT, xs, (((c.ndim - 1,), (axis,)), (batch, batch)), precision="highest")


def _orthonormal(operator: Operator, xs: Array) -> Array:
    """Gram-Schmidt by the inverse Cholesky factor; vectors that hardly add a direction become zero.

    A fixed direction replaces a vector of zero. A sparse map may map the span of the others to itself, and the search
    would never leave it.
    """
    xs += jnp.finfo(xs.dtype).eps * _directions(operator)
    gram = _gram(operator, xs, xs)
    scale = jax.lax.rsqrt(jnp.einsum("...ii->...i", gram))
    inverse = inverse_cholesky(scale[..., :, None] * gram * scale[..., None, :])
    return _combine(operator, (inverse * scale[..., None, :]).mT, xs)


def _directions(operator: Operator, seed: Array | None = None) -> Array:
    """Vectors in general position, of length about 1, (*batch, 4, ...): a hash of places and a seed."""
    batch, inner = operator.shape[: operator.n_batch], operator.shape[operator.n_batch :]
    shape = (*batch, SPAN, *inner)

    def mix(word):
        word = (word ^ (word >> 15)) * jnp.uint32(0x85EBCA77)
        word = (word ^ (word >> 13)) * jnp.uint32(0xC2B2AE3D)
        return word ^ (word >> 16)

    word = jnp.arange(math.prod(shape), dtype=jnp.uint32).reshape(shape) * jnp.uint32(0x9E3779B1)
    for part in () if seed is None else seed.ravel():
        word = mix(word ^ part)
    x = (mix(word) >> 8).astype(operator.dtype) / 2**23 - 1
    return x / math.sqrt(max(1, math.prod(inner)) / 3)
