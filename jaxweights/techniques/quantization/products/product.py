"""The product with a stored matrix: one implementation for each kind of device, one derivative, one rule for vmap."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jax.custom_derivatives import SymbolicZero

from jaxweights.techniques.quantization.grids import Integers
from jaxweights.techniques.quantization.products.platforms import times_of_platform
from jaxweights.techniques.quantization.products.tiles import tiled_times

if TYPE_CHECKING:
    from jaxweights.techniques.quantization.array import QuantizedArray


def times(x: jax.Array, q: QuantizedArray) -> jax.Array:
    """x @ w for x (M, K), float32 or float64, and one stored matrix w (K, N): (M, N) in the dtype of x.

    Linear in x, and differentiable in it. So it is in the scales, at the price of a product tile by tile.
    """
    if x.size == 0 or q.words.size == 0:
        return jnp.zeros((x.shape[0], q.words.shape[-1]), x.dtype)
    return _times(*in_stored_order(x, q))


def in_stored_order(x: jax.Array, q: QuantizedArray) -> tuple[jax.Array, QuantizedArray]:
    """x with its columns scaled and ordered as the rows of `q` are stored, and `q` without what says so."""
    if q.input_scale is not None:
        x = x * q.input_scale.astype(x.dtype)
    if q.order is not None:
        x = x[:, q.order]
    return x, _centered(dataclasses.replace(q, order=None, input_scale=None))


def _centered(q: QuantizedArray) -> QuantizedArray:
    """The same weight with its integers and zero points around 0.

    What is subtracted from a product with large positive codes is as large, and the difference would be less exact.
    """
    grid = q.format.grid
    if not isinstance(grid, Integers) or grid.offset or (q.zero is None and q.minimum is None):
        return q
    half = 2 ** (grid.bits - 1)
    zero = jnp.zeros(q.scale.codes.shape) if q.zero is None else q.zero.astype(jnp.float32)
    format = dataclasses.replace(q.format, grid=Integers(grid.bits, -half, half - 1))
    return dataclasses.replace(q, zero=zero - half, format=format)


@jax.custom_jvp
def _times(x: jax.Array, q: QuantizedArray) -> jax.Array:
    return _on_device(x, q)


def _derivative(primals, tangents):
    (x, q), (dx, dq) = primals, tangents
    leaves, tree = jax.tree.flatten(q)
    changes = jax.tree.leaves(dq, is_leaf=lambda a: isinstance(a, SymbolicZero))
    varies = [i for i, change in enumerate(changes) if not isinstance(change, SymbolicZero)]
    y = _times(x, q)
    dy = jnp.zeros_like(y) if isinstance(dx, SymbolicZero) else tiled_times(dx, q)
    if not varies:
        return y, dy

    def of_scales(*values: jax.Array) -> jax.Array:
        new = dict(zip(varies, values, strict=True))
        return tiled_times(x, jax.tree.unflatten(tree, [new.get(i, leaf) for i, leaf in enumerate(leaves)]))

    of_q = jax.jvp(of_scales, [leaves[i] for i in varies], [changes[i] for i in varies])[1]
    return y, dy + of_q


_times.defjvp(_derivative, symbolic_zeros=True)


@custom_vmap
def _on_device(x: jax.Array, q: QuantizedArray) -> jax.Array:
    return times_of_platform(x, q) if x.dtype == jnp.float32 else tiled_times(x, q)


@_on_device.def_vmap
def _batched(size: int, batched, x: jax.Array, q: QuantizedArray):
    """One product of more rows for one matrix, a loop over products for several."""
    x_batched, q_batched = batched
    if not any(jax.tree.leaves(q_batched)):
        return _on_device(x.reshape(-1, x.shape[-1]), q).reshape(*x.shape[:-1], -1), True
    leaves, tree = jax.tree.flatten((x, q))
    in_loop = [x_batched, *jax.tree.leaves(q_batched)]

    def one(slices: list[jax.Array]) -> jax.Array:
        each = iter(slices)
        whole = [next(each) if looped else leaf for leaf, looped in zip(leaves, in_loop, strict=True)]
        return _on_device(*jax.tree.unflatten(tree, whole))

    return lax.map(one, [leaf for leaf, looped in zip(leaves, in_loop, strict=True) if looped]), True
