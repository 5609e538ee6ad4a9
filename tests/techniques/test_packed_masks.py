"""Masks packed to bits: round trips, format 1 byte by byte, and meshes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxweights as jw
from jaxweights.techniques.sparsification.packed import packed_shape


@pytest.mark.parametrize(
    "shape", [(), (0,), (3, 0), (0, 5), (1,), (9,), (64, 32), (3, 5), (1, 1025), (4, 8, 16)], ids=str
)
def test_packing(shape):
    mask = np.random.default_rng(0).random(shape) < 0.5
    packed = jax.jit(jw.sparse.pack_mask)(mask)
    assert packed.dtype == jnp.uint8 and packed.shape == packed_shape(shape)
    np.testing.assert_array_equal(jw.sparse.unpack_mask(packed, shape), mask)
    batch = jnp.stack([mask, ~mask])
    np.testing.assert_array_equal(
        jax.vmap(lambda m: jw.sparse.unpack_mask(jw.sparse.pack_mask(m), shape))(batch), batch
    )


FORMAT_1 = {  # shape: (packed axis, bytes)
    (11,): (0, [205, 3]),
    (8, 9): (0, [[1, 2, 4, 8, 16, 32, 64, 128, 0]]),  # not the last axis, although it is longer
    (16, 3): (0, [[1, 2, 4], [8, 16, 255]]),
    (8, 8): (0, [[0, 1, 3, 7, 15, 31, 63, 127]]),
    (3, 16): (1, [[13, 1], [0, 128], [85, 170]]),
    (3, 20): (1, [[255, 0, 15], [170, 85, 10], [1, 2, 4]]),  # no multiple of 8: the longest axis
    (9, 5): (0, [[1, 2, 4, 8, 16], [1, 0, 1, 0, 1]]),
    (1, 10, 10): (1, [[[9, 8, 7, 6, 5, 4, 3, 2, 1, 0], [3, 2, 1, 0, 3, 2, 1, 0, 3, 2]]]),  # a tie: the first
    (8, 16, 2): (1, 8 * [[[1, 200], [30, 4]]]),  # two multiples of 8: the longest
    (16, 2, 3): (0, [[[1, 2, 3], [4, 5, 6]], [[7, 8, 9], [10, 11, 12]]]),  # attention, query
    (2, 8, 3): (1, [[[250, 251, 252]], [[1, 0, 77]]]),  # attention, out
    (2, 1, 8, 3): (2, [[[[1, 2, 3]]], [[[4, 5, 254]]]]),  # convolution
    (1, 2, 3, 10): (3, [[[[1, 2], [3, 1], [5, 0]], [[7, 3], [9, 2], [255, 3]]]]),
}
"""The layout documented by `pack_mask`. Changing it makes old checkpoints unreadable."""


@pytest.mark.parametrize("shape", FORMAT_1, ids=str)
def test_bytes_of_format_1_are_read_and_written(shape):
    axis, written = FORMAT_1[shape]
    packed = np.array(written, np.uint8)
    mask = np.unpackbits(packed, axis=axis, count=shape[axis], bitorder="little").astype(bool)
    assert mask.shape == shape
    np.testing.assert_array_equal(jw.sparse.unpack_mask(packed, shape), mask)
    np.testing.assert_array_equal(jw.sparse.pack_mask(mask), packed)


def test_masks_of_format_1_entry_by_entry():
    rows = ["10", "01", "11", "00", "00", "00", "00", "10", "11", "00", "00", "00", "00", "00", "00", "01"]
    mask = np.array([[c == "1" for c in row] for row in rows])
    np.testing.assert_array_equal(jw.sparse.unpack_mask(np.uint8([[133, 6], [1, 129]]), (16, 2)), mask)
    row = np.array([[c == "1" for c in "101100001"]])
    np.testing.assert_array_equal(jw.sparse.unpack_mask(np.uint8([[13, 1]]), (1, 9)), row)
    for value in (0, 1):
        assert jw.sparse.unpack_mask(np.uint8(value), ()) == bool(value)
        assert jw.sparse.pack_mask(jnp.bool_(value)) == np.uint8(value)


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_on_a_mesh_masks_are_packed_where_they_lie(kind):
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(jax.sharding.AxisType[kind],) * 2)
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x", "y"))
    mask = jax.device_put(np.random.default_rng(0).normal(size=(64, 32)) > 0, sharding)
    pack = jax.jit(jw.sparse.pack_mask).lower(mask).compile()
    packed = pack(mask)
    assert packed.sharding.is_equivalent_to(sharding, 2)
    unpack = jax.jit(lambda p: jw.sparse.unpack_mask(p, mask.shape)).lower(packed).compile()
    np.testing.assert_array_equal(unpack(packed), mask)
    for program in (pack, unpack):
        assert not any(f" {kind}(" in program.as_text() for kind in ("all-gather", "all-to-all", "collective-permute"))
