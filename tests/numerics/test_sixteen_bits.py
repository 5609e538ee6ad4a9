"""Selecting and narrowing 16-bit floats, against NumPy and `jnp.where`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxweights.numerics.sixteen_bits import narrow, where

EDGES = [1.5, -0.0, 0.0, np.inf, -np.inf, np.nan, 6e-8, -3.0]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_where_keeps_every_bit_and_has_the_gradients_of_jnp_where(dtype):
    x, y = np.asarray(EDGES, dtype), np.asarray(EDGES[::-1], dtype)
    condition = np.arange(8) % 3 > 0

    def gradients(select):
        loss = lambda x, y: jnp.sum(jnp.square(select(condition, x, y).astype(jnp.float32))[:3])
        return jax.grad(loss, (0, 1))(x, y)

    got, ours, theirs = jax.jit(lambda: (where(condition, x, y), gradients(where), gradients(jnp.where)))()
    word = f"uint{8 * x.itemsize}"
    np.testing.assert_array_equal(np.asarray(got).view(word), np.where(condition, x.view(word), y.view(word)))
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(np.float32(a), np.float32(b))
    batched = jax.jit(jax.vmap(where, (0, 0, None)))(condition, x, y[1])
    np.testing.assert_array_equal(np.float32(batched), np.float32(np.where(condition, x, y[1])))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_narrow_is_astype_of_what_needs_no_rounding(dtype):
    x = np.asarray([*EDGES, jnp.finfo(dtype).max, jnp.finfo(dtype).tiny], dtype)
    got = jax.jit(lambda x: narrow(x, dtype))(x.astype(np.float32))
    assert got.dtype == dtype
    np.testing.assert_array_equal(np.float32(got), np.float32(x))
    np.testing.assert_array_equal(np.signbit(np.float32(got)), np.signbit(np.float32(x)))
