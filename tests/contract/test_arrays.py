"""Every technique and variant of `cases.py` on arrays: dtypes, jit, vmap, values and gradients at the edges."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract.table import EPS, close, every_case, weight

# One program a case, compiled once a dtype: eager, each primitive would be compiled on its own.
jitted = functools.cache(lambda case: jax.jit(case.call))


@functools.cache
def value_and_gradient(case):
    """w' and the gradient of the mean of linear·w' + (square·w')²."""
    new = lambda w: case.call(w).astype(jnp.float32)
    loss = lambda w, linear, square: jnp.sum(linear * new(w) + (square * new(w)) ** 2) / w.size
    return jax.jit(lambda w, *weights: (case.call(w), jax.value_and_grad(loss)(w, *weights)))


@pytest.fixture(autouse=True)
def strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        yield


@every_case
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_shape_and_dtype_are_kept_and_16_bits_agree_with_32(case, dtype):
    w = weight(case, dtype)
    new = jitted(case)(w)
    chex.assert_trees_all_equal_shapes_and_dtypes(new, w)
    close(new, jitted(case)(w.astype(jnp.float32)), 2 * EPS[dtype])


@every_case
def test_jit_is_eager(case):
    w = weight(case)
    close(jitted(case)(w), case.call(w), 1e-5)


@every_case
def test_vmap_is_a_loop(case):
    ws = jnp.stack([weight(case, seed=i) for i in range(3)])
    close(jax.jit(jax.vmap(case.call))(ws), jnp.stack([jitted(case)(w) for w in ws]), 1e-5)


@every_case
@pytest.mark.parametrize("kind", ["zero", "constant", "huge", "huge f16", "tiny"])
def test_values_and_gradients_are_finite(case, kind):
    w = weight(case)
    w = {
        "zero": jnp.zeros_like(w),
        "constant": jnp.full_like(w, 0.5),
        "huge": 1e30 * jnp.sign(w),
        "huge f16": 6e4 * jnp.sign(w).astype(jnp.float16),
        "tiny": 1e-30 * w,
    }[kind]
    linear, square = (1, 0) if kind == "tiny" else (0, 1 / np.abs(np.asarray(w, np.float32)).max(initial=1e-6))
    chex.assert_tree_all_finite(value_and_gradient(case)(w, np.float32(linear), np.float32(square)))
