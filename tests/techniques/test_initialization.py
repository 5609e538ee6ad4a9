"""Initialization: the moments of a million draws, within statistical bounds."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from x64 import enable_x64

import jaxweights as jw
from jaxweights.axes import ATTENTION_IN, Axes, depthwise

SHAPE = (800, 1250)  # a million draws
NORMAL = {
    "xavier_normal": 2 / (800 + 1250),
    "he_normal": 2 / 800,
    "lecun_normal": 1 / 800,
}
UNIFORM = {
    "xavier_uniform": 6 / (800 + 1250),
    "he_uniform": 6 / 800,
    "lecun_uniform": 3 / 800,
}
# Kurtosis E[x⁴]/E[x²]², and E[x⁸]/E[x²]⁴ for its standard error.
CUT = 0.7737413035760  # variance of a normal cut at two standard deviations: 1 − 4φ(2)/(2Φ(2) − 1)


def draw(name, shape, **options):
    return np.float64(jax.jit(lambda key: getattr(jw, name)(key, shape, **options))(jax.random.key(7)))


def truncated_moment(k):
    """E[z^k], even k, of a standard normal cut at ±2: m_k = (k − 1)·m_{k−2} − 2·2^(k−1)·φ(2)/(2Φ(2) − 1)."""
    density = math.exp(-2) / math.sqrt(2 * math.pi) / math.erf(math.sqrt(2))
    return 1 if k == 0 else (k - 1) * truncated_moment(k - 2) - 2 * 2 ** (k - 1) * density


def check_moments(w, variance, moment):
    """Mean, variance and kurtosis within five standard errors; `moment(k)` is E[xᵏ] at unit variance."""
    n, unit = w.size, w / math.sqrt(variance)
    assert abs(unit.mean()) < 5 / math.sqrt(n)
    for k in (2, 4):
        error = math.sqrt((moment(2 * k) - moment(k) ** 2) / n)
        assert abs((unit**k).mean() - moment(k)) < 5 * error
    assert abs((unit**3).mean()) < 5 * math.sqrt(moment(6) / n)


@pytest.mark.parametrize("name", NORMAL)
def test_normal(name):
    w = draw(name, SHAPE)
    check_moments(w, NORMAL[name], lambda k: math.prod(range(1, k, 2)))
    assert np.abs(w).max() > 4 * math.sqrt(NORMAL[name])  # not truncated: JAX's own are, at 2.27


@pytest.mark.parametrize("name", NORMAL)
def test_truncated_normal_keeps_the_variance(name):
    w = draw(name, SHAPE, truncated=True)
    spread = truncated_moment(2)
    assert math.isclose(spread, CUT, rel_tol=1e-9)
    check_moments(w, NORMAL[name], lambda k: truncated_moment(k) / spread ** (k / 2))
    limit = 2 * math.sqrt(NORMAL[name] / spread)
    assert limit * 0.999 < np.abs(w).max() <= limit * (1 + 1e-6)


@pytest.mark.parametrize("name", UNIFORM)
def test_uniform(name):
    w = draw(name, SHAPE)
    check_moments(w, UNIFORM[name] / 3, lambda k: 3 ** (k / 2) / (k + 1))
    limit = math.sqrt(UNIFORM[name])
    assert limit * 0.999 < np.abs(w).max() <= limit * (1 + 1e-6)


@pytest.mark.parametrize(
    ("shape", "axes", "n_in", "n_out"),
    [
        ((3, 3, 16, 32), None, 144, 288),
        ((3, 3, 4, 1024), depthwise(256), 36, 36),
        ((64, 4, 32), ATTENTION_IN, 64, 128),
        ((30, 20, 100), Axes(input=1, output=0, batch=2), 20, 30),
    ],
)
def test_fans_follow_the_axes(shape, axes, n_in, n_out):
    for name, variance in (
        ("xavier_normal", 2 / (n_in + n_out)),
        ("he_uniform", 2 / n_in),
    ):
        w = draw(name, shape, axes=axes)
        assert w.shape == shape
        assert abs((w**2).mean() / variance - 1) < 5 * math.sqrt(2 / w.size)


@pytest.mark.parametrize("name", [*NORMAL, *UNIFORM])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_half_precision_rounds_the_float32_draw(name, dtype):
    make = lambda dtype: getattr(jw, name)(jax.random.key(0), (20, 30), dtype)
    assert make(dtype).dtype == dtype
    np.testing.assert_array_equal(make(dtype), make(jnp.float32).astype(dtype))


def test_float64():
    with enable_x64(True):
        w = jw.he_normal(jax.random.key(0), (20, 30), jnp.float64)
        assert w.dtype == jnp.float64 and (w != w.astype(jnp.float32)).any()


def test_plugs_into_flax():
    from flax import linen as nn

    kernel = nn.Dense(200, kernel_init=jw.he_normal).init(jax.random.key(0), jnp.ones(300))["params"]["kernel"]
    assert abs(float(jnp.mean(kernel**2)) * 300 / 2 - 1) < 5 * math.sqrt(2 / kernel.size)


@pytest.mark.parametrize("name", [*NORMAL, *UNIFORM])
def test_errors(name):
    f, key = getattr(jw, name), jax.random.key(0)
    with pytest.raises(TypeError, match="dtype"):
        f(key, (2, 3), jnp.int32)
    with pytest.raises(ValueError, match="fans"):
        f(key, (0, 3))
    with pytest.raises(ValueError, match="axis"):
        f(key, (2, 3), axes=Axes(batch=2))
