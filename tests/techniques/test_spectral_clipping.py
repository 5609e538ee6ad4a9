"""Spectral clipping, against the SVD in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.test_util import check_grads
from x64 import enable_x64

import jaxweights as jw
from jaxweights.core.axes import ATTENTION_IN, CONV, DENSE, depthwise

# (shape, axes, w -> matrices in NumPy, batch first)
READINGS = [
    ((5,), None, lambda w: w[:, None]),
    ((40, 7), None, lambda w: w),
    ((6, 4, 3), ATTENTION_IN, lambda w: w.reshape(6, 12)),
    ((3, 2, 4, 5), CONV, lambda w: w.reshape(24, 5)),
    ((4, 5, 3), DENSE.stacked(), lambda w: w),
    ((3, 3, 2, 6), depthwise(3), lambda w: w.reshape(18, 3, 2).swapaxes(0, 1)),
]
clip = jax.jit(jw.projections.clip_singular_values, static_argnames="axes")


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def clipped(matrices, limit):
    u, s, vt = np.linalg.svd(np.float64(matrices), full_matrices=False)
    return u * np.minimum(s, limit)[..., None, :] @ vt


def sigma(w):
    return np.linalg.norm(np.float64(w), 2, axis=(-2, -1))


def of_singular_values(s, m=48):
    u, v = np.linalg.qr(normal(m, len(s)))[0], np.linalg.qr(normal(len(s), len(s), seed=1))[0]
    return np.float32(u * s @ v.T)


SPECTRA = {
    "ill-conditioned": np.logspace(0, -8, 24),
    "rank-deficient": np.r_[np.linspace(2, 0.1, 8), np.zeros(16)],
    "equal": np.full(24, 0.8),
    "equal to the limit": np.full(24, 0.5),
    "close to the limit": 0.5 * (1 + np.linspace(-1e-3, 1e-3, 24)),
    "closer than rounding": 0.5 * (1 + np.linspace(-1e-7, 1e-7, 24)),
    "one above": np.r_[0.6, np.full(23, 0.49)],
    "far above": np.r_[40.0, np.linspace(0.7, 0.3, 23)],
    "all above": np.linspace(9, 0.6, 24),
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_formula(dtype):
    weights = [jnp.asarray(normal(*shape), dtype) for shape, _, _ in READINGS]
    limits = [0.7 * sigma(read(np.float64(w))).max() for w, (_, _, read) in zip(weights, READINGS, strict=True)]
    ours = lambda ws, limits: [clip(w, c, axes=axes) for w, c, (_, axes, _) in zip(ws, limits, READINGS, strict=True)]
    tolerance = 1e-5 if dtype == jnp.float32 else 2 * float(jnp.finfo(dtype).eps)
    for w, limit, out, (shape, _, read) in zip(weights, limits, jax.jit(ours)(weights, limits), READINGS, strict=True):
        assert out.shape == shape and out.dtype == dtype
        expected = clipped(read(np.float64(w)), limit)
        np.testing.assert_allclose(read(np.float64(out)), expected, atol=tolerance * limit, err_msg=f"{shape}")


@pytest.mark.parametrize("name", SPECTRA)
def test_spectra(name):
    w = of_singular_values(SPECTRA[name])
    out = clip(w, 0.5)
    largest = max(0.5, SPECTRA[name].max())
    assert sigma(out) <= 0.5 * (1 + 1e-5)
    assert sigma(out - clipped(w, 0.5)) <= 1e-5 * 0.5 + 1e-5 * largest * (largest > 1)
    again = clip(out, 0.5)
    assert sigma(again - out) <= 1e-5 * 0.5


def test_large_gaussian(optimizing):
    w, clip = np.float32(normal(160, 120)), jax.jit(jw.projections.clip_singular_values, compiler_options=optimizing)
    for fraction in (0.05, 0.3, 0.9):
        limit = fraction * sigma(w)
        out = clip(w, limit)
        assert sigma(out) <= limit * (1 + 1e-5)
        assert sigma(out - clipped(w, limit)) <= 5e-6 * sigma(w)


@pytest.mark.parametrize("optimized", [pytest.param(True, marks=pytest.mark.slow), False])
def test_weights_within_the_limit_are_kept_bit_for_bit(optimized, optimizing):
    """Fast compilation too, which may compute w/scale twice with different rounding."""
    options = optimizing if optimized else None
    clip = jax.jit(jw.projections.clip_singular_values, static_argnames="axes", compiler_options=options)
    stack = np.stack([of_singular_values(SPECTRA[n]) for n in ("one above", "close to the limit", "equal")])
    out = np.asarray(clip(stack, 0.6 * (1 + 1e-6), axes=DENSE.stacked()))
    np.testing.assert_array_equal(out[:2], stack[:2])
    np.testing.assert_allclose(out[2], 0.75 * stack[2], atol=1e-5)
    for limit in (np.inf, 1e30):
        np.testing.assert_array_equal(clip(stack, limit, axes=DENSE.stacked()), stack)


@pytest.mark.parametrize(
    ("shape", "axes", "read"),
    [READINGS[3], READINGS[5], *(pytest.param(*READINGS[i], marks=pytest.mark.slow) for i in (0, 1, 2, 4))],
)
def test_gradient(shape, axes, read):
    with enable_x64(True):
        w = jnp.asarray(normal(*shape))
        s = np.linalg.svd(read(w), compute_uv=False)
        f = jax.jit(lambda w, limit: jw.projections.clip_singular_values(w, limit, axes=axes))
        check_grads(f, (w, jnp.asarray(0.8 * s.max())), order=1, modes=["rev"], rtol=1e-5, atol=1e-6)


def test_a_projection_holds_after_every_step():
    lifted, tx = (
        jw.on_tree(jw.projections.ClipSingularValues(1.0)),
        optax.chain(optax.sgd(0.3), jw.project(jw.projections.ClipSingularValues(1))),
    )
    for dtype, slack in ((jnp.float32, 1e-5), (jnp.bfloat16, 1e-2)):
        params = {"kernel": jnp.asarray(of_singular_values(np.linspace(2, 0.1, 24)), dtype)}
        params = lifted.apply(params, lifted.init(params, jax.random.key(0)))
        state, update = tx.init(params), jax.jit(tx.update)
        for i in range(4):
            grads = {"kernel": jnp.asarray(normal(48, 24, seed=i), dtype)}
            updates, state = update(grads, state, params)
            assert sigma(params["kernel"] - 0.3 * grads["kernel"]) > 1.5
            params = optax.apply_updates(params, updates)
            assert 0.9 < sigma(params["kernel"]) <= 1 + slack


def test_schedule():
    t, w = jw.projections.ClipSingularValues(lambda step: 0.5 ** (step + 1.0)), of_singular_values(np.full(24, 0.4))
    state, apply = t.init(w, jax.random.key(0)), jax.jit(t.apply)
    for expected in (0.4, 0.25, 0.125):
        state = t.update(w, state)
        assert sigma(apply(w, state)) == pytest.approx(expected, rel=1e-5)


@jax.jit
def clip_and_pull(w, limit):
    out, pull = jax.vjp(lambda w: jw.projections.clip_singular_values(w, limit), w)
    return out, pull(jnp.ones_like(out))[0]


def test_zero_and_nothing():
    assert not clip(np.float32(normal(4, 3)), 0.0).any()
    for shape in ((4, 3), (0, 3), (3, 0)):
        out, gradient = clip_and_pull(jnp.zeros(shape), 1.0)
        assert out.shape == shape and not out.any() and (gradient == 1).all()


def test_matrices_with_nan_or_infinity_are_kept():
    w = np.float32(normal(3, 5, 4))
    w[0, 0, 0], w[1, 0, 0] = np.nan, np.inf
    out = np.asarray(clip(w, 0.1, axes=DENSE.stacked()))
    np.testing.assert_array_equal(out[:2], w[:2])
    np.testing.assert_allclose(out[2], clipped(w[2], 0.1), atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "size"), [(jnp.float32, 1e30), (jnp.float32, 1e-25), (jnp.bfloat16, 1e30), (jnp.float16, 1e4)]
)
def test_huge_and_tiny_weights(dtype, size):
    unit = np.float64([[0, 2], [-4, 0], [0, 0]])
    out, gradient = clip_and_pull(jnp.asarray(unit * size, dtype), 3 * size)
    tolerance = 2 * float(jnp.finfo(dtype).eps) + 1e-6
    np.testing.assert_allclose(np.float64(out) / size, [[0, 2], [-3, 0], [0, 0]], atol=4 * tolerance)
    # The clipped value has zero gradient, the value below the limit the full gradient, and the third row, which
    # rotates the first singular vector, 3/4 of it.
    gradient = np.float64(gradient)
    np.testing.assert_allclose(gradient[[0, 1, 2, 2], [1, 0, 0, 1]], [1, 0, 3 / 4, 1], atol=0.02)
