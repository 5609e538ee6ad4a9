"""Weight clipping by value and by norm, against float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads
from x64 import enable_x64

import jaxweights as jw
from jaxweights.core.axes import ATTENTION_IN, ATTENTION_OUT, CONV, DENSE

FLOATS = [jnp.float32, jnp.bfloat16, jnp.float16]


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


# clip_weights


@pytest.mark.parametrize("dtype", FLOATS)
def test_clip_weights(dtype):
    weights = [jnp.asarray(normal(*shape), dtype) for shape in ((), (7,), (30, 4), (0, 3))]
    clip = jax.jit(lambda weights, limit: [jw.clip_weights(w, limit) for w in weights])
    for limit in (0.0, 0.1, 1.0, np.inf):
        c = np.float64(np.asarray(limit).astype(dtype))
        for w, out in zip(weights, clip(weights, limit), strict=True):
            assert out.dtype == dtype and out.shape == w.shape
            np.testing.assert_array_equal(np.float64(out), np.clip(np.float64(w), -c, c))


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(width=32), min_size=8, max_size=8), st.floats(0, width=32))
def test_clip_weights_of_any_value(values, limit):
    out = np.asarray(jax.jit(jw.clip_weights)(np.float32(values), np.float32(limit)))
    for w, clipped in zip(np.float32(values), out, strict=True):
        expected = w if np.isnan(w) else min(max(w, -np.float32(limit)), np.float32(limit))
        flushed = abs(w) < 1.2e-38 or limit < 1.2e-38  # subnormals may be flushed to 0
        assert np.array_equal(clipped, expected, equal_nan=True) or (flushed and abs(clipped) < 1.2e-38)


def test_clip_weights_gradient():
    w = jnp.array([-2.0, -0.5, 0.5, 2.0, jnp.inf, jnp.nan])
    np.testing.assert_array_equal(jax.grad(lambda w: jw.clip_weights(w, 1.0).sum())(w), [0, 1, 1, 0, 0, 1])
    with enable_x64(True):
        check_grads(jax.jit(jw.clip_weights), (jnp.asarray(normal(20)), jnp.asarray(0.7)), order=1, rtol=1e-6)


def test_a_limit_beyond_the_dtype_clips_nothing():
    w = jnp.float16([-6e4, 1.0])
    np.testing.assert_array_equal(jw.clip_weights(w, 1e6), w)


# clip_norm


READINGS = [
    ((5,), None, (0,)),
    ((), None, ()),
    ((4, 30), None, (0,)),
    ((3, 2, 4, 5), CONV, (0, 1, 2)),
    ((4, 2, 3), ATTENTION_IN, (0,)),
    ((2, 3, 4), ATTENTION_OUT, (0, 1)),
    ((6, 4, 3), DENSE.stacked(), (1,)),
]


@pytest.mark.parametrize("dtype", FLOATS)
def test_clip_norm(dtype):
    weights = [jnp.asarray(normal(*shape), dtype) for shape, _, _ in READINGS]
    clip = jax.jit(lambda ws, m: [jw.clip_norm(w, m, axes=axes) for w, (_, axes, _) in zip(ws, READINGS, strict=True)])
    for max_norm in (1.5, 0.0):
        for w, out, (shape, axes, over) in zip(weights, clip(weights, max_norm), READINGS, strict=True):
            exact, case = np.float64(w), f"{shape} by {axes}, {max_norm}"
            norm = np.sqrt(np.sum(exact**2, over, keepdims=True))
            assert out.dtype == dtype and out.shape == shape
            expected = np.where(norm > max_norm, exact * (max_norm / norm), exact)
            np.testing.assert_allclose(np.float64(out), expected, rtol=2 * float(jnp.finfo(dtype).eps), err_msg=case)
            short = np.broadcast_to(norm < max_norm * (1 - 1e-6), shape)
            np.testing.assert_array_equal(np.asarray(out)[short], np.asarray(w)[short], err_msg=case)


def test_clip_norm_gradient():
    with enable_x64(True):
        w = jnp.asarray(normal(4, 6))
        assert 0 < np.sum(np.linalg.norm(w, axis=0) > 2) < 6
        check_grads(jax.jit(jw.clip_norm), (w, jnp.asarray(2.0)), order=1, rtol=1e-6)


@jax.jit
def clip_norm_and_pull(w, max_norm, cotangent):
    out, pull = jax.vjp(lambda w: jw.clip_norm(w, max_norm), w)
    return out, pull(cotangent)[0]


@pytest.mark.parametrize(("dtype", "size"), [(jnp.float32, 1e30), (jnp.bfloat16, 1e30), (jnp.float16, 1e4)])
def test_clip_norm_of_huge_weights(dtype, size):
    unit = np.float64([[1, 2], [2, -3], [-2, 6]])
    w = jnp.asarray(unit * size, dtype)
    first_row = jnp.zeros_like(w).at[0].set(1)
    out, found = clip_norm_and_pull(w, 1.0, first_row)
    np.testing.assert_allclose(np.float64(out), unit / [3, 7], rtol=2 * float(jnp.finfo(dtype).eps) + 1e-6)
    length = np.float64([3, 7])
    gradient = (np.eye(3)[:, :1] - unit[:1] / length**2 * unit) / length
    np.testing.assert_allclose(np.float64(found) * size, gradient, atol=1e-6 if dtype == jnp.float32 else 0.02)


def test_clip_norm_of_zero_and_nothing():
    w = jnp.array([[0.0, 3.0], [0.0, 4.0]])
    for max_norm in (0.0, 1.0):
        out, gradient = clip_norm_and_pull(w, max_norm, jnp.ones_like(w))
        np.testing.assert_allclose(out, np.array([[0, 0.6], [0, 0.8]]) * max_norm, rtol=1e-6)
        assert jnp.isfinite(gradient).all()
    assert jw.clip_norm(jnp.zeros((0, 3)), 1.0).shape == (0, 3)


def test_clip_norm_keeps_units_with_nan_or_infinity():
    w = jnp.array([[jnp.nan, jnp.inf, 3.0], [1.0, 1.0, 4.0]])
    out = jw.clip_norm(w, 1.0)
    np.testing.assert_array_equal(out[:, :2], w[:, :2])
    np.testing.assert_allclose(out[:, 2], [0.6, 0.8], rtol=1e-6)


# Transforms with schedules


def test_transforms_follow_their_schedule():
    w = jnp.array([[3.0], [4.0]])
    for t, expected in (
        (jw.ClipWeights(lambda step: 1.0 + step), [[1, 1], [2, 2], [3, 3]]),
        (jw.ClipNorm(lambda step: 5.0 / (1 + step)), [[3, 4], [1.5, 2], [1, 4 / 3]]),
    ):
        state = t.init(w, jax.random.key(0))
        for value in expected:
            state = t.update(w, state)
            np.testing.assert_allclose(t.apply(w, state)[:, 0], value, rtol=1e-6)


@pytest.mark.parametrize("f", [jw.clip_weights, jw.clip_norm])
def test_errors(f):
    with pytest.raises(ValueError, match="at least 0"):
        f(jnp.ones(3), -1.0)
    with pytest.raises(ValueError, match="scalar"):
        f(jnp.ones(3), jnp.ones(3))
    with pytest.raises(TypeError, match="number"):
        f(jnp.ones(3), "1")
