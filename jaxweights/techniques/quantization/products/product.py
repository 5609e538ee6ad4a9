"""The product with a quantized matrix."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from jaxweights.core.device_product import Times, device_product
from jaxweights.techniques.quantization.grids import Integers
from jaxweights.techniques.quantization.products import cpu, gpu, tpu
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


def _narrow(times: Times) -> Times:
    """The same with operands in bfloat16 where the weight is: there, accelerators multiply faster."""
    return lambda x, q: times(x.astype(q.dtype) if q.dtype == jnp.bfloat16 else x, q)


_times = device_product(
    "quantized_times",
    tiled_times,
    cpu=cpu.times,
    tpu=_narrow(tpu.times),
    gpu=_narrow(gpu.times),
    gpu_export=tiled_times,  # `jax.export` refuses a kernel, because a later version of JAX may not read it
)
