"""Batch renormalization: the formula in float64, and the gradient with r and d held constant."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from x64 import enable_x64

import jaxweights as jw

rng = np.random.default_rng(0)
X = rng.normal(size=(6, 5, 4)) * [0.1, 1, 1, 9] + [0, 1, 9, 0]  # r clipped below, none, d clipped, r clipped above
SCALE, BIAS, MEAN, VAR = rng.normal(size=4), rng.normal(size=4), 0.1 * rng.normal(size=4), rng.uniform(0.5, 1.5, 4)
R_MAX, D_MAX, EPS = 3.0, 5.0, 1e-5


def corrections(x, where=None):
    mean, var = (f(np.float64(x), (0, 1), where=True if where is None else where) for f in (np.mean, np.var))
    sigma_b, sigma = np.sqrt(var + EPS), np.sqrt(VAR + EPS)
    return mean, sigma_b, np.clip(sigma_b / sigma, 1 / R_MAX, R_MAX), np.clip((mean - MEAN) / sigma, -D_MAX, D_MAX)


def ours(x, scale, bias, **options):
    return jw.batch_renorm(x, scale, bias, mean=MEAN, var=VAR, r_max=R_MAX, d_max=D_MAX, **options)


@pytest.mark.parametrize("masked", [False, True])
def test_formula(masked):
    where = np.broadcast_to(rng.random((6, 5, 1)) < 0.6, X.shape) if masked else None
    mean, sigma, r, d = corrections(X, where)
    assert r[0] == 1 / R_MAX and r[3] == R_MAX and 1 / R_MAX < r[1] < R_MAX and d[2] == D_MAX and abs(d[1]) < D_MAX
    with enable_x64(True):
        y = jax.jit(ours)(X, SCALE, BIAS, where=where)
    np.testing.assert_allclose(y, ((X - mean) / sigma * r + d) * SCALE + BIAS, rtol=1e-12, atol=1e-12)


def test_gradient_with_the_corrections_held():
    """Compares with finite differences at fixed r and d, since no gradient flows through them."""
    _, _, r, d = corrections(X)

    def held(x, scale, bias):
        mean, var = x.mean((0, 1)), x.var((0, 1))
        return ((x - mean) / jnp.sqrt(var + EPS) * r + d) * scale + bias

    with enable_x64(True):
        args = tuple(map(jnp.asarray, (X, SCALE, BIAS)))
        check_grads(jax.jit(held), args, order=1, rtol=1e-6)
        cotangent = jnp.asarray(rng.normal(size=X.shape))
        expected, found = jax.jit(lambda *args: [jax.vjp(f, *args)[1](cotangent) for f in (held, ours)])(*args)
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


def test_between_training_and_evaluation():
    x = jnp.float32(X)
    given = {"mean": jnp.float32(MEAN), "var": jnp.float32(VAR)}

    @jax.jit
    def run(x):
        renormalized = [jw.batch_renorm(x, r_max=r, d_max=d, **given) for r, d in ((1.0, 0.0), (1e6, 1e6))]
        return renormalized, [jw.batch_norm(x), jw.batch_norm(x, **given)]

    (training, free), (of_batch, of_running) = run(x)
    np.testing.assert_allclose(training, of_batch, rtol=2e-6, atol=1e-6)
    np.testing.assert_allclose(free, of_running, rtol=1e-4, atol=1e-5)


def test_linen_and_nnx_agree_and_the_limits_may_grow():
    x = jnp.float32(X)
    linen = jw.linen.BatchNorm(use_running_average=False, momentum=0.5, renorm=(1.0, 0.0))
    nnx = jw.nnx.BatchNorm(4, momentum=0.5, renorm=(1.0, 0.0))
    variables = jax.jit(linen.init)(jax.random.key(0), x)
    step = jax.jit(lambda v, x, limits: linen.apply(v, x, renorm=limits, mutable=["batch_stats"]))
    running = (jnp.zeros(4), jnp.ones(4))
    for i, limits in enumerate([(1.0, 0.0), (2.0, 2.5), (3.0, 5.0)]):
        x = x + i
        y, new = step(variables, x, limits)
        expected = jw.batch_renorm(x, mean=running[0], var=running[1], r_max=limits[0], d_max=limits[1])
        running = jw.running_stats(running, jw.batch_stats(x), 0.5)
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(nnx(x, renorm=limits), y, rtol=1e-5, atol=1e-5)
        for name, value in zip(("mean", "var"), running, strict=True):
            np.testing.assert_allclose(new["batch_stats"][name], value, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(getattr(nnx, name)[...], value, rtol=1e-5, atol=1e-6)
        variables = {**variables, **new}
    assert step._cache_size() == 1
