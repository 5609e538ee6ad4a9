"""The product with a stored matrix: one implementation for each kind of device, one derivative, one rule for vmap."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Primitive
from jax.interpreters import mlir

Times = Callable[[jax.Array, Any], jax.Array]
"""(x, w) -> x @ w for rows x (M, K) and a stored matrix w (K, N), a pytree."""


def device_product(name: str, tiled: Times, *, cpu: Times, tpu: Times, gpu: Times, gpu_export: Times) -> Times:
    """A product x @ w that is lowered in another way for each kind of device: (M, N) in the dtype of x.

    Linear in x, and differentiable in it. So it is in the arrays of the weight, at the price of a product tile by tile.
    Under `vmap`, a single weight gets one product of more rows, and several a loop.

    Args:
      name: of the primitive.
      tiled: the product for any dtype, device and derivative.
      cpu: the product of float32 on a CPU.
      tpu: that on a TPU.
      gpu: that on a GPU.
      gpu_export: that on a GPU in an exported program.
    """
    by_device = _by_device(name, tiled, cpu, tpu, gpu, gpu_export)

    @jax.custom_jvp
    def times(x: jax.Array, w: Any) -> jax.Array:
        return once(x, w)

    def derivative(primals, tangents):
        (x, w), (dx, dw) = primals, tangents
        leaves, tree = jax.tree.flatten(w)
        changes = jax.tree.leaves(dw, is_leaf=lambda a: isinstance(a, SymbolicZero))
        varies = [i for i, change in enumerate(changes) if not isinstance(change, SymbolicZero)]
        y = times(x, w)
        dy = jnp.zeros_like(y) if isinstance(dx, SymbolicZero) else tiled(dx, w)
        if not varies:
            return y, dy

        def of_arrays(*values: jax.Array) -> jax.Array:
            new = dict(zip(varies, values, strict=True))
            return tiled(x, jax.tree.unflatten(tree, [new.get(i, leaf) for i, leaf in enumerate(leaves)]))

        of_w = jax.jvp(of_arrays, [leaves[i] for i in varies], [changes[i] for i in varies])[1]
        return y, dy + of_w

    times.defjvp(derivative, symbolic_zeros=True)

    @custom_vmap
    def once(x: jax.Array, w: Any) -> jax.Array:
        return by_device(x, w) if x.dtype == jnp.float32 else tiled(x, w)

    @once.def_vmap
    def batched(size: int, batched, x: jax.Array, w: Any):
        """One product of more rows for one matrix, a loop over products for several."""
        x_batched, w_batched = batched
        if not any(jax.tree.leaves(w_batched)):
            return once(x.reshape(-1, x.shape[-1]), w).reshape(*x.shape[:-1], -1), True
        leaves, tree = jax.tree.flatten((x, w))
        in_loop = [x_batched, *jax.tree.leaves(w_batched)]

        def one(slices: list[jax.Array]) -> jax.Array:
            each = iter(slices)
            whole = [next(each) if looped else leaf for leaf, looped in zip(leaves, in_loop, strict=True)]
            return once(*jax.tree.unflatten(tree, whole))

        return lax.map(one, [leaf for leaf, looped in zip(leaves, in_loop, strict=True) if looped]), True

    return times


def _by_device(name: str, tiled: Times, cpu: Times, tpu: Times, gpu: Times, gpu_export: Times) -> Times:
    """The product as one primitive.

    `jax.lax.platform_dependent` does not serve here: it traces the kernel of a GPU on every device, which
    `jax.shard_map` refuses, and lowers it for every device where a program is exported for several.
    """
    product = Primitive(name)

    @jax.jit
    def times(x: jax.Array, w: Any) -> jax.Array:
        leaves, tree = jax.tree.flatten(w)
        return product.bind(x, *leaves, tree=tree)

    @product.def_abstract_eval
    def abstract(x, *leaves, tree):
        (y,) = jax.make_jaxpr(jax.jit(tiled))(x, jax.tree.unflatten(tree, leaves)).out_avals
        return y

    @product.def_impl  # under `jax.disable_jit`
    def evaluate(x, *leaves, tree):
        return tiled(x, jax.tree.unflatten(tree, leaves))

    def lowering(times: Times):
        def lowered(x, *leaves, tree):
            return times(x, jax.tree.unflatten(tree, leaves))

        return mlir.lower_fun(lowered, multiple_results=False)

    lower_here, lower_exported = lowering(gpu), lowering(gpu_export)

    def lower_for_gpu(ctx, *operands, tree):
        lower = lower_exported if ctx.module_context.lowering_parameters.for_export else lower_here
        return lower(ctx, *operands, tree=tree)

    mlir.register_lowering(product, lowering(tiled))
    mlir.register_lowering(product, lowering(cpu), platform="cpu")
    mlir.register_lowering(product, lowering(tpu), platform="tpu")
    mlir.register_lowering(product, lower_for_gpu, platform="cuda")
    return times
