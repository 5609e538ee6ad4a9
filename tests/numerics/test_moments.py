"""Mean and variance with counts, against float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from x64 import enable_x64

from jaxweights.core.devices import device_sum
from jaxweights.numerics.moments import moments

FLOATS = [jnp.float32, jnp.bfloat16, jnp.float16]


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("axis", [(0,), (0, 1), (2,), ()])
def test_moments(dtype, axis):
    x = jnp.asarray(normal(6, 5, 4) + 3, dtype)
    exact = np.asarray(x, np.float64)
    mean, var, count = moments(x, axis)
    np.testing.assert_allclose(mean, exact.mean(axis, keepdims=True), rtol=1e-6)
    np.testing.assert_allclose(var, exact.var(axis, keepdims=True), rtol=1e-5)
    assert count.shape == mean.shape and (count == np.prod([x.shape[a] for a in axis])).all()


def test_moments_of_a_distant_mean(optimizing):
    x = np.float32(normal(512, 3) + 1e4)
    _, var, _ = jax.jit(lambda x: moments(x, (0,)), compiler_options=optimizing)(x)
    np.testing.assert_allclose(var[0], x.astype(np.float64).var(0), rtol=1e-4)


def test_moments_where():
    x, where = normal(6, 5, 4), np.random.default_rng(1).random((6, 5, 1)) < 0.5
    where[:, 0], where[0, 1:] = False, True
    mean, var, count = moments(jnp.float32(x), (0,), where=jnp.asarray(where))
    full = np.broadcast_to(where, x.shape)
    assert not mean[0, 0].any() and not var[0, 0].any()
    np.testing.assert_array_equal(count[0], full.sum(0))
    np.testing.assert_allclose(mean[0, 1:], x[:, 1:].mean(0, where=full[:, 1:]), rtol=1e-4)
    np.testing.assert_allclose(var[0, 1:], x[:, 1:].var(0, where=full[:, 1:]), rtol=1e-4)


def test_moments_do_not_see_what_does_not_count():
    x, where = jnp.array([1.0, 2.0, jnp.nan, jnp.inf]), jnp.array([True, True, False, False])
    variance = lambda x: moments(x, (0,), where=where)[1][0]
    assert variance(x) == 0.25
    np.testing.assert_array_equal(jax.grad(variance)(x), [-0.5, 0.5, 0, 0])


@pytest.mark.parametrize("n_devices", [1, 3, 4, 12])
def test_moments_merge_to_one_big_batch(n_devices):
    x = normal(12, 5) * 3 + 7
    where = np.random.default_rng(2).random((12, 5)) < 0.6
    where[0] = where[5] = True
    split = lambda a: jnp.asarray(a).reshape(n_devices, -1, 5)
    merged = jax.jit(
        jax.vmap(lambda x, where: moments(x, (0,), where=where, device_sum=device_sum("d")), axis_name="d")
    )
    mean, var, count = merged(split(np.float32(x)), split(where))
    for i in range(n_devices):
        np.testing.assert_array_equal(count[i, 0], where.sum(0))
        np.testing.assert_allclose(mean[i, 0], x.mean(0, where=where), rtol=1e-5)
        np.testing.assert_allclose(var[i, 0], x.var(0, where=where), rtol=1e-4)


def test_moments_merge_gradient():
    with enable_x64(True):
        x = jnp.asarray(normal(4, 3, 2))
        merged = jax.vmap(lambda x: moments(x, (0,), device_sum=device_sum("d"))[:2], axis_name="d")
        check_grads(jax.jit(merged), (x,), order=1, rtol=1e-6)


def test_moments_of_nothing():
    for mean, var, count in (moments(jnp.zeros((0, 3)), (0,)), moments(jnp.ones((2, 3)), (0,), where=jnp.array(False))):
        assert not mean.any() and not var.any() and not count.any()
