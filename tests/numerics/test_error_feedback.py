"""Error feedback against a loop over rows in float64, as GPTQ publishes it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxweights.numerics.error_feedback import error_feedback


@pytest.mark.parametrize(("rows", "block"), [(24, 24), (24, 8), (21, 8)])
def test_rounding_with_error_feedback_is_gptq(rows, block):
    rng = np.random.default_rng(rows + block)
    x = rng.normal(size=(100, rows)) @ rng.normal(size=(rows, rows))
    w, h, step = rng.normal(size=(rows, 5)), x.T @ x / 100, 0.25
    w32, h32 = jnp.float32(w), jnp.float32(h)
    u = np.linalg.cholesky(np.linalg.inv(h + 0.01 * np.mean(np.diag(h)) * np.eye(rows))).T

    @jax.jit
    def run(w, h):
        def begin(of_block, number):
            return jnp.zeros(of_block.w.shape, jnp.int32)

        def visit(i, of_block, codes):
            code = jnp.round(of_block.w[i] / step).astype(jnp.int32)
            return code * step, codes.at[i].set(code)

        return error_feedback(w, h, 0.01, begin, visit, block=block)

    new, codes = run(w32, h32)
    expected, moved = w.copy(), w.copy()
    for i in range(rows):
        expected[i] = np.round(moved[i] / step) * step
        moved[i:] -= np.outer(u[i, i:], (moved[i] - expected[i]) / u[i, i])
    np.testing.assert_array_equal(new, expected)
    np.testing.assert_array_equal(codes.reshape(-1, 5)[:rows] * step, expected)
