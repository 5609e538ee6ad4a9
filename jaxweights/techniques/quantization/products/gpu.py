"""Products with stored weights on NVIDIA GPUs: a kernel that decodes the codes of a tile in registers."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxweights.core.packing import planes, rows_of_a_period
from jaxweights.techniques.quantization.blocks import Parts, decode
from jaxweights.techniques.quantization.formats import E4M3
from jaxweights.techniques.quantization.products.tiles import tiled_times
from jaxweights.techniques.quantization.scales import Scales

if TYPE_CHECKING:
    from jaxweights.techniques.quantization.array import QuantizedArray

_WORD = 32
_DEPTH = 16  # rows of a product of tiles, the least that Triton takes
_LEAST_HEIGHT, _HEIGHT = 16, 64  # of a tile of x
_WIDTHS = (64, 32, 16)  # of a tile of the weight
_MOST_ROWS = 128  # of x: with more of them, the same tile would be decoded too often
_PROGRAMS = 512  # that keep a GPU busy


def times(x: jax.Array, q: QuantizedArray, *, interpret: bool = False) -> jax.Array:
    """x @ w for x (M, K) and the stored matrix w (K, N), whose rows are in order and have no scales of their own.

    In float32, or float64 if `x` is. Both operands are rounded to bfloat16 if `x` is in it. The kernel is for up to 128
    rows of `x` and a matrix that its tiles divide. Others are dequantized part by part. So are all in a `shard_map`
    that checks along which axes arrays vary: how a kernel is told of that differs between versions of JAX. And so are
    all where JAX has no Triton, or, from 0.12 on, does not know the GPU: lower under a mesh of an `AbstractDevice`.
    """
    width = next((n for n in _WIDTHS if q.words.shape[1] % n == 0), None)
    divides = width is not None and x.shape[1] % (_DEPTH * rows_of_a_period(q.format.grid.bits)) == 0
    many = not 0 < x.shape[0] <= _MOST_ROWS or x.size == 0
    out_of_reach = x.dtype == jnp.float64 or not divides or many or _varies((x, q))
    if width is None or out_of_reach or not (interpret or _lowers()):
        return tiled_times(x.astype(jnp.promote_types(x.dtype, jnp.float32)), q)
    return _kernel_times(x if x.dtype == jnp.bfloat16 else x.astype(jnp.float32), q, width, interpret)


def _varies(tree: Any) -> bool:
    """Whether any array varies along axes of a `shard_map` that checks this."""
    types = [jax.typeof(a) for a in jax.tree.leaves(tree)]
    # JAX 0.7 calls it vma.
    return any(t.manual_axis_type.varying if hasattr(t, "manual_axis_type") else t.vma for t in types)  # type: ignore


def _lowers() -> bool:
    """Whether kernels can be lowered here."""
    try:
        from jax.experimental.pallas import triton  # slow to import: only those who lower for a GPU should wait for it
    except ImportError:
        return False
    is_gpu_device = getattr(triton, "is_gpu_device", None)  # JAX 0.12
    return is_gpu_device is None or is_gpu_device()


def _kernel_times(x: jax.Array, q: QuantizedArray, width: int, interpret: bool) -> jax.Array:
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    (n_rows, rows), columns, bits = x.shape, q.words.shape[1], q.format.grid.bits
    period, block = rows_of_a_period(bits), q.format.blocks(rows)[1]
    words_of_period = period * bits // _WORD
    height = 1 if n_rows == 1 else max(_LEAST_HEIGHT, 1 << (n_rows - 1).bit_length())
    tile_height = min(height, max(_LEAST_HEIGHT, _HEIGHT * 8 // max(period, 8)))  # for each field, a tile of x is kept
    tiles = (columns // width, height // tile_height)
    # The rows are split, in as many parts as it takes to keep the GPU busy, and the parts are summed in the end.
    n_tiles = rows // period // _DEPTH
    splits = math.gcd(n_tiles, 1 << max(_PROGRAMS // math.prod(tiles), 1).bit_length() - 1)
    # What meets the same field of the words lies together: (field, row of x, period).
    x = jnp.pad(x, ((0, height - n_rows), (0, 0))).reshape(height, -1, period).transpose(2, 0, 1)
    scale_after = q.scale.codes.shape[0] == 1 and q.minimum is None
    shared, tree = jax.tree.flatten((None if scale_after else _as_bytes(q.scale), q.zero, _as_bytes(q.minimum)))
    precision = None if x.dtype == jnp.bfloat16 else lax.Precision.HIGHEST

    def kernel(x_ref: Any, words_ref: Any, *refs: Any) -> None:
        scale, zero, minimum = jax.tree.unflatten(tree, refs[:-1])
        at_columns = pl.ds(pl.program_id(0) * width, width)
        at_rows = pl.ds(pl.program_id(1) * tile_height, tile_height)
        first = pl.program_id(2) * (n_tiles // splits)

        def load(ref: Any, row: jax.Array) -> jax.Array:
            at = at_columns if ref.shape[1] > 1 else pl.ds(0, 1)
            return ref[row if ref.shape[0] > 1 else pl.ds(0, 1), at]

        def values(scales: Scales, block: jax.Array) -> jax.Array:
            codes = load(scales.codes, block)
            by_bits = scales.format.dtype == "float8_e4m3fn"
            value = E4M3.decode(codes) if by_bits else dataclasses.replace(scales, codes=codes, outer=None).values()
            if scales.outer is None:
                return value
            return value * load(scales.outer, block // (scales.format.outer or 1)).astype(jnp.float32)

        def add(i: jax.Array, y: jax.Array) -> jax.Array:
            start = (first + i) * _DEPTH
            at = start + jnp.arange(_DEPTH, dtype=jnp.int32)
            words = [words_ref[at * words_of_period + n, at_columns] for n in range(words_of_period)]
            parts = Parts(jnp.float32(1))
            least: jax.Array | float = 0.0
            for field in range(period):
                if field == 0 or block % period:
                    of_block = (at * period + field) // block
                    parts = Parts(
                        jnp.float32(1) if scale is None else values(scale, of_block),
                        None if zero is None else load(zero, of_block),
                    )
                    least = 0.0 if minimum is None else values(minimum, of_block)
                w = decode(_field(words, field, bits), parts, q.format) - least
                at_tile = pl.ds(start, _DEPTH)
                if height == 1:  # a product would be of 16 rows: multiply, and sum over the tile in the end
                    y += x_ref[field, 0, at_tile].astype(jnp.float32)[:, None] * w
                else:
                    part = x_ref[field, at_rows, at_tile]
                    y += jnp.dot(part, w.astype(x.dtype), precision=precision, preferred_element_type=jnp.float32)
            return y

        zeros = jnp.zeros((_DEPTH if height == 1 else tile_height, width), jnp.float32)
        y = lax.fori_loop(0, n_tiles // splits, add, zeros)
        refs[-1][pl.program_id(2), at_rows, at_columns] = jnp.sum(y, 0, keepdims=True) if height == 1 else y

    parts = pl.pallas_call(
        kernel,
        jax.ShapeDtypeStruct((splits, height, columns), jnp.float32),
        grid=(*tiles, splits),
        interpret=interpret,
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
        name="times_quantized",
    )(x, q.words, *shared)
    y = jnp.sum(parts, 0)[:n_rows]
    return y * q.scale.values() if scale_after else y


def _field(words: list[jax.Array], field: int, bits: int) -> jax.Array:
    """The codes of one row of each period, from the words of the periods."""
    code, first = jnp.zeros_like(words[0]), 0
    for size, low in planes(bits):
        per_word = _WORD // size
        word, shift = words[first + field // per_word], size * (field % per_word)
        part = lax.shift_right_logical(word, jnp.full_like(word, shift)) & (2**size - 1)
        code |= part << low
        first += rows_of_a_period(bits) // per_word
    return code


def _as_bytes(scales: Scales | None) -> Scales | None:
    """Scales in 8-bit floats as bytes: not every GPU converts them."""
    if scales is None or scales.format.dtype != "float8_e4m3fn":
        return scales
    return dataclasses.replace(scales, codes=lax.bitcast_convert_type(scales.codes, jnp.uint8))
