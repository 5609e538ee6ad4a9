"""Masks in bits: eight weights a byte."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxweights.core.checks import check_shape
from jaxweights.numerics.sharding import auto_sharded


def packed_axis(shape: Sequence[int]) -> int:
    """The axis along which a mask is packed: one filled up least, of 64 or more entries, not the last, the longest.

    In this order. Not the last, so that bits are set and read for whole vectors of weights; 64 entries are a byte for
    each of eight devices, so that a mask sharded along the axis is packed and unpacked where it lies.
    """
    filled = lambda n: (n / (8 * -(-n // 8)) if n else 1, min(n, 64))
    return max(range(len(shape)), key=lambda a: (*filled(shape[a]), a != len(shape) - 1, shape[a]))


def packed_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of the packed form of a mask.

    >>> packed_shape((64, 32)), packed_shape((3, 3, 16, 32)), packed_shape(())
    ((8, 32), (3, 3, 16, 4), ())
    """
    shape = check_shape("shape", shape)
    if not shape:
        return ()
    axis = packed_axis(shape)
    return (*shape[:axis], -(-shape[axis] // 8), *shape[axis + 1 :])


def pack_mask(mask: jax.Array) -> jax.Array:
    """A boolean mask as bytes of eight entries each, which `unpack_mask` reads.

    Bit i of byte j holds entry 8j + i along one axis, whose length is filled up with zeros to a multiple of 8.

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
        rest = 8 * n_bytes - mask.shape[axis]
        filled = jnp.pad(mask, [(0, rest if a == axis else 0) for a in range(mask.ndim)])
        bits = filled.reshape(*mask.shape[:axis], n_bytes, 8, *mask.shape[axis + 1 :])
        return jnp.sum(bits.astype(jnp.uint8) << _places(bits.ndim, axis + 1), axis + 1, dtype=jnp.uint8)

    # On explicit axes a length that the devices do not divide is an error: then the bytes are replicated along it.
    spec, sizes = jax.typeof(mask).sharding.spec, dict(jax.typeof(mask).sharding.mesh.shape)
    names = spec[axis] if axis < len(spec) else None
    devices = math.prod(sizes[n] for n in ((names,) if isinstance(names, str) else names or ()))
    like = (
        mask
        if n_bytes % devices == 0
        else jax.sharding.PartitionSpec(*(None if a == axis else s for a, s in enumerate(spec)))
    )
    return auto_sharded(pack, mask, like=like)


def unpack_mask(packed: jax.Array, shape: Sequence[int]) -> jax.Array:
    """The boolean mask of the given shape that `pack_mask` packed.

    Args:
      packed: array of uint8.
      shape: of the mask.

    Returns:
      Boolean array of that shape.

    Raises:
      TypeError: `packed` is not of uint8, or `shape` no sequence of integers.
      ValueError: `packed` does not belong to a mask of this shape.

    >>> import jax.numpy as jnp
    >>> mask = jnp.array([[True, False, True]])
    >>> print(unpack_mask(pack_mask(mask), mask.shape))
    [[ True False  True]]
    """
    shape = check_shape("shape", shape)
    if jnp.result_type(packed) != jnp.uint8:
        raise TypeError(f"packed must be of uint8, got {jnp.result_type(packed)}: pass what pack_mask returned")
    if jnp.shape(packed) != packed_shape(shape):
        raise ValueError(
            f"packed must have shape {packed_shape(shape)} for a mask of shape {shape}, got {jnp.shape(packed)}: pass "
            f"the shape of the mask that pack_mask was given"
        )
    packed = jnp.asarray(packed)
    return auto_sharded(lambda packed: _unpack(packed, shape), packed, like=packed)


def masked(w: jax.Array, packed: jax.Array) -> jax.Array:
    """`w` where its packed mask is true, else 0, in one pass over both."""
    cut = lambda w, packed: jnp.where(_unpack(packed, w.shape), w, jnp.zeros((), w.dtype))
    return auto_sharded(cut, w, packed, like=w)


def _unpack(packed: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    if not shape:
        return packed > 0
    axis = packed_axis(shape)
    bits = jnp.expand_dims(packed, axis + 1) >> _places(len(shape) + 1, axis + 1) & 1
    filled = bits.reshape(*shape[:axis], 8 * packed.shape[axis], *shape[axis + 1 :])
    return jax.lax.slice_in_dim(filled, 0, shape[axis], axis=axis) > 0


def _places(ndim: int, axis: int) -> jax.Array:
    """0 to 7 along an axis."""
    return jnp.arange(8, dtype=jnp.uint8).reshape([8 if a == axis else 1 for a in range(ndim)])
