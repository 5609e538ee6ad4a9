"""The product with a stored matrix as one primitive, which is lowered in another way for each kind of device.

`jax.lax.platform_dependent` does not serve here: it traces the kernel of a GPU on every device, which `jax.shard_map`
refuses, and lowers it for every device where a program is exported for several.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import mlir

from jaxweights.techniques.quantization.products import cpu, gpu, tpu
from jaxweights.techniques.quantization.products.tiles import tiled_times

if TYPE_CHECKING:
    from jaxweights.techniques.quantization.array import QuantizedArray

_times_p = Primitive("quantized_times")


@jax.jit
def times_of_platform(x: jax.Array, q: QuantizedArray) -> jax.Array:
    """x @ w for x (M, K), float32, and the stored matrix w (K, N): its rows in order, without scales of their own.

    Where the weight is in bfloat16, TPUs and GPUs round both operands to it, and sum in float32.
    """
    leaves, tree = jax.tree.flatten(q)
    return _times_p.bind(x, *leaves, tree=tree)


@_times_p.def_abstract_eval
def _abstract(x, *leaves, tree):
    (y,) = jax.make_jaxpr(jax.jit(tiled_times))(x, jax.tree.unflatten(tree, leaves)).out_avals
    return y


@_times_p.def_impl  # under `jax.disable_jit`
def _evaluate(x, *leaves, tree):
    return tiled_times(x, jax.tree.unflatten(tree, leaves))


def _lowering(times):
    def lowered(x, *leaves, tree):
        return times(x, jax.tree.unflatten(tree, leaves))

    return mlir.lower_fun(lowered, multiple_results=False)


def _narrow(times):
    """The same with operands in bfloat16 where the weight is: there, accelerators multiply faster."""
    return lambda x, q: times(x.astype(q.dtype) if q.dtype == jnp.bfloat16 else x, q)


_lower_tiles, _lower_kernel = _lowering(tiled_times), _lowering(_narrow(gpu.times))


def _lower_for_gpu(ctx, *operands, tree):
    # `jax.export` refuses a kernel, because a later version of JAX may not read it.
    lower = _lower_tiles if ctx.module_context.lowering_parameters.for_export else _lower_kernel
    return lower(ctx, *operands, tree=tree)


mlir.register_lowering(_times_p, _lower_tiles)
mlir.register_lowering(_times_p, _lowering(cpu.times), platform="cpu")
mlir.register_lowering(_times_p, _lowering(_narrow(tpu.times)), platform="tpu")
mlir.register_lowering(_times_p, _lower_for_gpu, platform="cuda")
