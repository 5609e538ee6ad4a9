"""Masks in bits: eight weights a byte."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxweights.checks import check_shape
from jaxweights.numerics import automatic


def packed_axis(shape: Sequence[int]) -> int:
    """The axis along which a mask is packed: the one that is filled up least, not the last if possible, the longest.

    Bytes of one word then lie apart by rows, so that bits are set and read for whole vectors of weights; and a mask
    that is sharded along this axis into multiples of eight is packed and unpacked where it lies.
    """
    last = len(shape) - 1
    return max(range(len(shape)), key=lambda a: (-(-(-shape[a] // 8) * 8) / max(shape[a], 1), a != last, shape[a]))


def packed_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of the packed form of a mask.

    >>> packed_shape((64, 32)), packed_shape((3, 3, 16, 32)), packed_shape(())
    ((8, 32), (3, 3, 2, 32), ())
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

    return automatic(pack, mask, like=mask)


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
    return automatic(lambda packed: _unpack(packed, shape), packed, like=packed)


def masked(w: jax.Array, packed: jax.Array) -> jax.Array:
    """`w` where its packed mask is true, else 0, in one pass over both."""
    cut = lambda w, packed: jnp.where(_unpack(packed, w.shape), w, jnp.zeros((), w.dtype))
    return automatic(cut, w, packed, like=w)


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
