"""Masks packed to bits, eight weights to a byte."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxweights.core.checks import check_shape
from jaxweights.numerics.sharding import auto_sharded


def packed_axis(shape: Sequence[int]) -> int:
    """The axis along which a mask is packed. Part of the file format: see `pack_mask`.

    Not the last axis if possible, so that bits are set and read for whole vectors of weights. A multiple of 8 needs no
    padding, and the longest axis is the one whose bytes are most likely to divide evenly among devices.
    """
    candidates = [a for a, n in enumerate(shape[:-1]) if n % 8 == 0] or range(len(shape))
    return max(candidates, key=shape.__getitem__)


def packed_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of a mask once it is packed.

    >>> packed_shape((64, 32)), packed_shape((3, 3, 16, 32)), packed_shape((3, 20)), packed_shape(())
    ((8, 32), (3, 3, 2, 32), (3, 3), ())
    """
    shape = check_shape("shape", shape)
    if not shape:
        return ()
    axis = packed_axis(shape)
    return (*shape[:axis], -(-shape[axis] // 8), *shape[axis + 1 :])


def pack_mask(mask: jax.Array) -> jax.Array:
    """Packs a boolean mask into bytes, eight entries to a byte, along one axis.

    The layout is fixed: masks in old checkpoints stay readable. This is format 1:

    - The packed axis is the longest axis, other than the last, whose length is a multiple of 8 (0 is one). If there is
      none, it is the longest axis of all. Of axes of equal length it is the first.
    - Its n entries become ⌈n/8⌉ bytes. The other axes keep their lengths.
    - Bit i of byte j, bit 0 the least significant, is entry 8j + i along the axis. Bits beyond entry n − 1 are 0.
    - A scalar becomes one byte, 0 or 1, of shape ().

    In NumPy, `unpackbits(packed, axis=axis, count=n, bitorder="little")` is the mask.

    Args:
      mask: boolean array of any shape.

    Returns:
      Array of uint8 of shape `packed_shape(mask.shape)`.

    Raises:
      TypeError: `mask` is not boolean.

    >>> import jax.numpy as jnp
    >>> print(pack_mask(jnp.array([True, False, True, True, False, False, False, False, True])))
    [13  1]
    """
    if not jnp.issubdtype(jnp.result_type(mask), jnp.bool_):
        raise TypeError(f"mask must be boolean, got {jnp.result_type(mask)}: compare it with a number")
    mask = jnp.asarray(mask)
    if not mask.ndim:
        return mask.astype(jnp.uint8)
    axis = packed_axis(mask.shape)
    n_bytes = -(-mask.shape[axis] // 8)

    def pack(mask):
        n_padding = 8 * n_bytes - mask.shape[axis]
        padded = jnp.pad(mask, [(0, n_padding if a == axis else 0) for a in range(mask.ndim)])
        bits = padded.reshape(*mask.shape[:axis], n_bytes, 8, *mask.shape[axis + 1 :])
        return jnp.sum(bits.astype(jnp.uint8) << _bit_numbers(bits.ndim, axis + 1), axis + 1, dtype=jnp.uint8)

    return auto_sharded(pack, mask, like=_packed_spec(mask, axis, n_bytes))


def _packed_spec(mask: jax.Array, axis: int, n_bytes: int) -> jax.sharding.PartitionSpec:
    """The sharding of `mask`, but replicated along `axis` where its devices do not divide `n_bytes`."""
    sharding = jax.typeof(mask).sharding
    spec, sizes = sharding.spec, dict(sharding.mesh.shape)
    names = spec[axis] if axis < len(spec) else None
    n_devices = math.prod(sizes[n] for n in ((names,) if isinstance(names, str) else names or ()))
    if n_bytes % n_devices == 0:
        return spec
    return jax.sharding.PartitionSpec(*(None if a == axis else s for a, s in enumerate(spec)))


def unpack_mask(packed: jax.Array, shape: Sequence[int]) -> jax.Array:
    """Unpacks the bytes that `pack_mask` returned; its docstring has their layout.

    Args:
      packed: uint8 array of shape `packed_shape(shape)`.
      shape: shape of the mask.

    Returns:
      Boolean array of that shape.

    Raises:
      TypeError: `packed` is not of dtype uint8, or `shape` is not a sequence of integers.
      ValueError: `packed` is not the packed form of a mask of this shape.

    >>> import jax.numpy as jnp
    >>> mask = jnp.array([[True, False, True]])
    >>> print(unpack_mask(pack_mask(mask), mask.shape))
    [[ True False  True]]
    """
    shape = check_shape("shape", shape)
    if jnp.result_type(packed) != jnp.uint8:
        raise TypeError(f"packed must be of dtype uint8, got {jnp.result_type(packed)}: pass what pack_mask returned")
    if jnp.shape(packed) != packed_shape(shape):
        raise ValueError(
            f"packed must have shape {packed_shape(shape)} for a mask of shape {shape}, got {jnp.shape(packed)}: pass "
            f"the shape of the mask that pack_mask was given"
        )
    packed = jnp.asarray(packed)
    return auto_sharded(lambda packed: _unpack(packed, shape), packed, like=packed)


def masked(w: jax.Array, packed: jax.Array) -> jax.Array:
    """`w` where its packed mask is true, else 0, in one pass over both."""

    def select(w, packed):
        return jnp.where(_unpack(packed, w.shape), w, jnp.zeros((), w.dtype))

    return auto_sharded(select, w, packed, like=w)


def _unpack(packed: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    if not shape:
        return packed > 0
    axis = packed_axis(shape)
    bits = jnp.expand_dims(packed, axis + 1) >> _bit_numbers(len(shape) + 1, axis + 1) & 1
    padded = bits.reshape(*shape[:axis], 8 * packed.shape[axis], *shape[axis + 1 :])
    return jax.lax.slice_in_dim(padded, 0, shape[axis], axis=axis) > 0


def _bit_numbers(ndim: int, axis: int) -> jax.Array:
    """0 to 7 along `axis` of an array of `ndim` axes, the others of length 1."""
    return jnp.arange(8, dtype=jnp.uint8).reshape([8 if a == axis else 1 for a in range(ndim)])
