"""Orthogonalization: the polar factor, against the SVD in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.test_util import check_grads
from x64 import enable_x64

import jaxweights as jw
from jaxweights.core.axes import ATTENTION_IN, ATTENTION_OUT, CONV, CONV_TRANSPOSE_KERNEL, DENSE, Axes, depthwise

# (shape, axes, w -> matrices in NumPy, batch first)
READINGS = [
    ((), None, lambda w: w.reshape(1, 1)),
    ((5,), None, lambda w: w[:, None]),
    ((40, 7), None, lambda w: w),
    ((7, 40), None, lambda w: w),
    ((3, 2, 4, 5), CONV, lambda w: w.reshape(24, 5)),
    ((1, 2, 7, 4), CONV_TRANSPOSE_KERNEL, lambda w: w.swapaxes(2, 3).reshape(8, 7)),
    ((6, 4, 3), ATTENTION_IN, lambda w: w.reshape(6, 12)),
    ((2, 3, 9), ATTENTION_OUT, lambda w: w.reshape(6, 9)),
    ((4, 5, 3), DENSE.stacked(), lambda w: w),
    ((5, 4, 2, 3), Axes(input=0, output=3, batch=(2, 1)), lambda w: w.transpose(2, 1, 0, 3)),
    ((3, 3, 2, 6), depthwise(3), lambda w: w.reshape(18, 3, 2).swapaxes(0, 1)),
    ((2, 3, 4, 6), Axes(input=2, output=3, batch=0, groups=2), lambda w: w.reshape(2, 12, 2, 3).swapaxes(1, 2)),
]
orthogonalize = jax.jit(jw.projections.orthogonalize, static_argnames=("n_steps", "axes"))


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def polar(matrices):
    u, _, vt = np.linalg.svd(np.float64(matrices), full_matrices=False)
    return u @ vt


def of_condition(kappa, m=48, n=32):
    """A matrix with log-spaced singular values from 1 to 1/kappa."""
    u, v = np.linalg.qr(normal(m, n))[0], np.linalg.qr(normal(n, n, seed=1))[0]
    return u * np.logspace(0, -np.log10(kappa), n) @ v.T


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_formula(dtype):
    weights = [jnp.asarray(normal(*shape), dtype) for shape, _, _ in READINGS]
    ours = lambda ws: [orthogonalize(w, gain=0.5, axes=axes) for w, (_, axes, _) in zip(ws, READINGS, strict=True)]
    tolerance = 2e-5 if dtype == jnp.float32 else 2 * float(jnp.finfo(dtype).eps)
    for w, out, (shape, _, read) in zip(weights, jax.jit(ours)(weights), READINGS, strict=True):
        assert out.shape == shape and out.dtype == dtype
        expected = 0.5 * polar(read(np.float64(w)))
        np.testing.assert_allclose(read(np.float64(out)), expected, atol=tolerance, err_msg=f"{shape}")


@pytest.mark.parametrize("kappa", [1, 10, 1e3, 1e5])
def test_rows_or_columns_are_orthonormal_and_as_near_the_svd_as_the_condition_lets_rounding_be(kappa):
    w = np.float32(of_condition(kappa))
    for out in (orthogonalize(w), orthogonalize(w.T).T):
        out = np.float64(out)
        np.testing.assert_allclose(out.T @ out, np.eye(32), atol=2e-6)
        assert np.linalg.norm(out - polar(w), 2) <= 1e-6 * kappa + 2e-6


def test_large_gaussian():
    w = np.float32(normal(256, 256))  # condition number about 1e3
    np.testing.assert_allclose(orthogonalize(w), polar(w), atol=2e-5)


def test_in_float64():
    with enable_x64(True):
        w = of_condition(1e4)
        np.testing.assert_allclose(orthogonalize(w), polar(w), atol=1e-10)


def test_a_few_steps_bring_the_large_singular_values_to_one_and_raise_the_small():
    w = np.float32(of_condition(1e4))
    before = np.linalg.svd(w, compute_uv=False)
    after = np.linalg.svd(np.float64(orthogonalize(w, n_steps=5)), compute_uv=False)
    np.testing.assert_allclose(after[before > 0.1], 1, atol=1e-5)
    assert (after <= 1 + 1e-5).all() and (after[before < 0.01] > 20 * before[before < 0.01]).all()


@pytest.mark.parametrize(
    ("shape", "axes", "read"),
    [READINGS[3], READINGS[10], *(pytest.param(*READINGS[i], marks=pytest.mark.slow) for i in (2, 6))],
)
def test_gradient(shape, axes, read):
    with enable_x64(True):
        w, gain = jnp.asarray(normal(*shape)), jnp.asarray(0.7)
        f = jax.jit(lambda w, gain: jw.projections.orthogonalize(w, gain=gain, axes=axes))
        check_grads(f, (w, gain), order=1, modes=["rev"], rtol=1e-6, atol=1e-6)


def test_gradient_of_a_stack_of_one_shape():
    stack = jnp.float32(normal(3, 6, 4))
    gradient = jax.grad(lambda w: jnp.sum(jw.projections.orthogonalize(w) ** 3))
    alone = jax.jit(gradient)
    expected = np.stack([alone(w) for w in stack])
    np.testing.assert_allclose(jax.jit(jax.vmap(gradient))(stack), expected, rtol=1e-4, atol=1e-6)


@jax.jit
def orthogonalize_and_pull(w, cotangent):
    out, pull = jax.vjp(jw.projections.orthogonalize, w)
    return out, pull(cotangent)[0]


def test_rank_deficient_weights_are_finite_and_exact_where_they_have_a_direction():
    w = np.float32(normal(12, 3) @ normal(3, 8, seed=1))
    out, gradient = orthogonalize_and_pull(w, jnp.ones_like(w))
    assert jnp.isfinite(out).all() and jnp.isfinite(gradient).all()
    assert np.linalg.norm(np.float64(out), 2) <= 1 + 1e-5
    u, _, vt = np.linalg.svd(np.float64(w))
    np.testing.assert_allclose(u[:, :3].T @ out @ vt[:3].T, np.eye(3), atol=1e-5)


def test_zero_and_nothing():
    for shape in ((4, 3), (0, 3), (3, 0)):
        out, gradient = orthogonalize_and_pull(jnp.zeros(shape), jnp.ones(shape))
        assert out.shape == shape and not out.any() and jnp.isfinite(gradient).all()


def test_nan_stays_in_its_matrix():
    w = np.float32(normal(3, 5, 4))
    w[0, 0, 0], w[1, 0, 0] = np.nan, np.inf
    out = orthogonalize(w, axes=DENSE.stacked())
    assert np.isnan(out[:2]).all()
    np.testing.assert_allclose(out[2], polar(w[2]), atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "size"), [(jnp.float32, 1e30), (jnp.float32, 1e-25), (jnp.bfloat16, 1e30), (jnp.float16, 1e4)]
)
def test_huge_and_tiny_weights(dtype, size):
    w = jnp.asarray(np.float64([[0, 2], [-3, 0], [0, 0]]) * size, dtype)
    out, gradient = orthogonalize_and_pull(w, jnp.zeros_like(w).at[2].set(1))
    np.testing.assert_allclose(np.float64(out), [[0, 1], [-1, 0], [0, 0]], atol=1e-6)
    # At out = U Vᵀ, changing the third row by d changes the output by d P⁻¹, with P = diag(3, 2).
    np.testing.assert_allclose(np.float64(gradient)[2] * size, [1 / 3, 1 / 2], rtol=0.02)


def test_a_trained_parametrization_reaches_a_rotation():
    rotation, x = polar(normal(6, 6)), normal(50, 6, seed=1)
    if np.linalg.det(rotation) < 0:
        rotation[:, 0] *= -1
    lifted, tx = jw.on_tree(jw.projections.Orthogonalize()), optax.sgd(0.3)
    params = {"kernel": jnp.eye(6) + 0.1 * jnp.float32(normal(6, 6, seed=2))}
    state, opt_state = lifted.init(params, jax.random.key(0)), tx.init(params)

    @jax.jit
    def step(params, opt_state):
        loss = lambda p: jnp.mean((x @ lifted.apply(p, state)["kernel"] - x @ rotation) ** 2)
        updates, opt_state = tx.update(jax.grad(loss)(params), opt_state)
        return optax.apply_updates(params, updates), opt_state

    for _ in range(300):
        params, opt_state = step(params, opt_state)
    np.testing.assert_allclose(lifted.apply(params, state)["kernel"], rotation, atol=1e-4)
