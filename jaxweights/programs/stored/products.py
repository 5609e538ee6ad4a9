"""Products and convolutions with a stored weight, in the place of those with an array."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from jaxweights.core.axes import Axes, Reading
from jaxweights.core.stored import is_stored, matmul
from jaxweights.programs.products import Operand, convolution, dot_general
from jaxweights.programs.stored.moves import batch_axes, read_as, transpose


def stored_dot_general(eqn: core.JaxprEqn, ins: Sequence[Any]) -> list[jax.Array] | None:
    """A `dot_general` as the product x @ w or x @ wᵀ; None if the weight is stored for neither."""
    left, right = ins
    position = int(is_stored(right))
    x, w = (left, right) if position else (right, left)
    x = x.todense() if is_stored(x) else x
    operand, dtype = dot_general(eqn)[position], eqn.outvars[0].aval.dtype  # type: ignore[attr-defined]
    found = _product(w, operand)
    if found is None or not jnp.issubdtype(x.dtype, jnp.floating) or not jnp.issubdtype(dtype, jnp.floating):
        return None
    times, apart = found
    lead = [operand.partner[a] for a in operand.batch]
    contracted = [operand.partner[a] for a in sorted(operand.contracted)]
    free = [a for a in range(x.ndim) if a not in lead + contracted]
    y = times(x.transpose(*lead, *free, *contracted).astype(jnp.promote_types(x.dtype, dtype)))
    batch, of_x, of_w = ([(name, a) for a in axes] for name, axes in (("b", lead), ("x", free), ("w", operand.free)))
    stacked = [("w", a) for a in apart]
    have = [*batch, *stacked, *of_x, *(axis for axis in of_w if axis not in stacked)]
    want = [*batch, *of_x, *of_w] if position else [*batch, *of_w, *of_x]
    return [y.transpose(*map(have.index, want)).astype(dtype)]


def _product(w: Any, operand: Operand) -> tuple[Callable[[jax.Array], jax.Array], Sequence[int]] | None:
    """(times, apart): the product of x and the weight, if it is stored for it.

    times(x), for x of shape (*batch, ..., *contracted), has the shape (*batch, *apart, ..., *other free axes). The axes
    that lie apart are free in the product and batch axes of the weight: x meets each of its matrices.
    """
    batch, contracted = list(operand.batch), sorted(operand.contracted)
    stacked = [a for a in operand.free if a in batch_axes(w)]
    for apart in [[], stacked] if stacked else [[]]:
        free = [a for a in operand.free if a not in apart]
        for product, rows, columns in ((matmul, contracted, free), (_transposed_matmul, free, contracted)):
            moved = transpose(w, [*batch, *apart, *rows, *columns]) if rows else None
            if moved is None:
                continue
            first, last = len(batch + apart), len(batch + apart + rows)
            axes = Axes(range(first, last), range(last, len(moved.shape)), range(first), ())
            matrices = read_as(moved, axes)
            if matrices is not None:
                return _mapped(product, matrices, len(batch), len(apart)), apart
    return None


def _mapped(
    product: Callable[[jax.Array, Any], jax.Array], matrices: Any, n_batch: int, n_apart: int
) -> Callable[[jax.Array], jax.Array]:
    """x -> product(x, w) for each matrix w: of `n_batch` axes, along which x has a part for each, and of `n_apart`."""
    for _ in range(n_apart):
        product = jax.vmap(product, in_axes=(None, 0))
    for _ in range(n_batch):
        product = jax.vmap(product)
    return lambda x: product(x, matrices)


def _transposed_matmul(x: jax.Array, w: Any) -> jax.Array:
    """x @ wᵀ, over the output axes of `w`: the vector-Jacobian product of rows -> rows @ w, which is linear."""
    n_output = len(w.shape) - len(Reading.of(getattr(w, "axes", None), w.shape).contracted)
    rows = jnp.zeros((*x.shape[: x.ndim - n_output], *w.shape[: len(w.shape) - n_output]), x.dtype)
    _, transposed = jax.vjp(lambda rows: matmul(rows, w), rows)
    (y,) = transposed(x)
    return y


def stored_convolution(eqn: core.JaxprEqn, ins: Sequence[Any]) -> list[jax.Array] | None:
    """A convolution with a window of size 1 as a product; None for any other, which takes the kernel as an array."""
    if is_stored(ins[0]):
        return None
    x, w = ins
    conv, dtype = convolution(eqn), eqn.outvars[0].aval.dtype  # type: ignore[attr-defined]
    inputs = sorted([conv.kernel.input, *conv.kernel.window])
    is_product = (
        all(w.shape[a] == 1 for a in conv.kernel.window)
        and conv.groups == conv.batch_groups == 1
        and not any(size for pair in conv.padding for size in pair)
        and set(conv.image_dilation) <= {1}
    )
    kernel = read_as(w, Axes(conv.kernel.input, conv.kernel.output, (), conv.kernel.window)) if is_product else None
    if kernel is None or not jnp.issubdtype(dtype, jnp.floating):
        return None
    strided = [slice(None)] * x.ndim
    for axis, stride in zip(conv.image.space, conv.strides, strict=True):
        strided[axis] = slice(None, None, stride)
    rows = x[tuple(strided)].transpose(conv.image.batch, *conv.image.space, conv.image.channels)
    rows = rows.reshape(*rows.shape[:-1], *(w.shape[a] for a in inputs))
    y = matmul(rows.astype(jnp.promote_types(x.dtype, dtype)), kernel)
    have = [conv.output.batch, *conv.output.space, conv.output.channels]
    return [y.transpose([have.index(a) for a in range(y.ndim)]).astype(dtype)]
