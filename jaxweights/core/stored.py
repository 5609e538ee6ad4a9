"""Stored weights: what every stored type offers, and the product with one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeGuard, runtime_checkable

import jax
import jax.numpy as jnp

from jaxweights.core.axes import Axes, Reading
from jaxweights.core.checks import check_weight
from jaxweights.numerics.dtypes import accumulation_dtype


@runtime_checkable
class Stored(Protocol):
    """A weight that is stored as other arrays, as a pytree node of them. Every level takes it for one leaf.

    `QuantizedArray`, `ClusteredArray`, `PackedArray`, `BlockSparseArray` and the sparse arrays of JAX are such. So is
    any class with these four members. `with_stored` uses those of `FollowedStored` too, where a class has them.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        ...

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of the weight."""
        ...

    def todense(self) -> jax.Array:
        """The weight as an array."""
        ...

    def __rmatmul__(self, x: jax.Array) -> jax.Array:
        """x @ w, over the input axes of the weight."""
        ...


@runtime_checkable
class FollowedStored(Stored, Protocol):
    """A stored weight that stays stored where a program casts it, transposes it or takes one layer of a stack.

    The arrays of a stack have its batch axes in front, in the same order, so that they are sliced with it. If there is
    a method `take(index)`, it gives the rows w[index] as an array, or None, and serves to look up embeddings.
    """

    @property
    def axes(self) -> Axes:
        """How the weight is read as a matrix."""
        ...

    def astype(self, dtype: jnp.dtype) -> FollowedStored:
        """The weight in another floating dtype."""
        ...

    def transpose(self, permutation: Sequence[int]) -> FollowedStored | None:
        """The weight with its axes in this order; None if it has to be an array for that."""
        ...

    def read_as(self, axes: Axes) -> FollowedStored | None:
        """The same weight with `axes` of the same rows and the same batch axes; None if it is stored in another way."""
        ...


def is_stored(leaf: Any) -> TypeGuard[Stored]:
    """Whether a node of a tree is a stored weight."""
    return hasattr(type(leaf), "todense") and isinstance(leaf, Stored)


def matmul(x: jax.Array, w: Stored) -> jax.Array:
    """x @ w for a stored weight, computed from what is stored.

    y = Σ x·w over the input axes of `w`, accumulated in float32 or wider. For the types of this library it is `x @ w`.

    Args:
      x: float array, shape (..., *input) with the input axes of `w` last.
      w: a `QuantizedArray`, `ClusteredArray`, `PackedArray` or `BlockSparseArray` without batch axes, a sparse matrix
        of JAX, or anything that has `shape`, `dtype`, `todense()` and `__rmatmul__`.

    Returns:
      Array of shape (..., *output) and the dtype of `x`.

    Raises:
      TypeError: `x` is not a float array or `w` not a stored weight.
      ValueError: the shapes do not fit.

    >>> import jax.numpy as jnp
    >>> import jaxweights as jw
    >>> w = jnp.array([[2.0, 0.0], [0.0, 3.0], [0.0, 0.0], [1.0, 0.0]])
    >>> for stored in jw.quantize(w, 8), jw.sparse.pack(w), jw.sparse.to_csr(w):
    ...     print(matmul(jnp.array([1.0, 1.0, 1.0, 1.0]), stored).round(1))
    [3. 3.]
    [3. 3.]
    [3. 3.]
    """
    if not is_stored(w):
        raise TypeError(
            f"w must be a stored weight, got {type(w).__name__}: make one with quantize(w, bits), pack(w) or "
            f"pack_blocks(w), and multiply by an array with x @ w"
        )
    if is_of_jax(w):
        return product(x, w, lambda rows: (coordinates(w).T @ rows.T).T)
    return w.__rmatmul__(check_weight(x, "x"))


def product(x: jax.Array, w: Stored, times: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """x @ w, where `times` multiplies an array (n, rows of the matrix) by the matrix that `w` is read as."""
    r = contraction(x, w)
    lead = x.shape[: x.ndim - len(r.contracted)]
    rows = x.reshape(math.prod(lead), -1 if x.size else math.prod(w.shape[a] for a in r.contracted))
    y = times(rows.astype(accumulation_dtype(x.dtype))).reshape(*lead, *(w.shape[a] for a in r.output))
    order = sorted(range(len(r.output)), key=lambda i: r.output[i])
    return jnp.transpose(y, (*range(len(lead)), *(len(lead) + i for i in order))).astype(x.dtype)


def contraction(x: jax.Array, w: Stored) -> Reading:
    """How `w` is read in the product x @ w. Raises unless it is a single product and `x` ends in its input axes."""
    check_weight(x, "x")
    axes: Axes | None = getattr(w, "axes", None)
    r = Reading.of(axes, w.shape)
    if r.batch or r.groups > 1:
        raise ValueError(f"w has batch axes {r.batch} or groups: multiply with jax.vmap over them")
    inputs = tuple(w.shape[a] for a in r.contracted)
    if x.shape[x.ndim - len(inputs) :] != inputs:
        raise ValueError(f"x must end in the input axes {inputs} of w, got shape {x.shape}")
    return r


def is_of_jax(w: Stored) -> bool:
    """Whether `w` is a sparse array of JAX. It has no axes: it is a matrix (in, out)."""
    return type(w).__module__.startswith("jax.")


def coordinates(w: Any) -> Any:
    """A sparse array of JAX. CSR becomes BCOO: it has no vmap, and its gradient of w.T @ x is wrong (jax 0.10.2)."""
    from jax.experimental import sparse

    if not isinstance(w, sparse.CSR):
        return w
    rows = jnp.searchsorted(w.indptr, jnp.arange(w.nse), side="right") - 1
    return sparse.BCOO((w.data, jnp.stack([rows, w.indices], 1)), shape=w.shape, indices_sorted=True)


def nbytes(w) -> int:
    """Bytes of all arrays in a tree."""
    return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(w))
