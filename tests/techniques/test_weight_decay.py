"""Weight decay: g + λ∇P(w − w₀), against float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from x64 import enable_x64

import jaxweights as jw


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (0, 2), (2, 3, 4)])
@pytest.mark.parametrize(("dtype", "rate"), [(jnp.float32, 0.1), (jnp.bfloat16, 3), (jnp.float16, 0.0)])
def test_formula(shape, dtype, rate):
    g, w = jnp.asarray(normal(*shape), dtype), jnp.asarray(normal(*shape, seed=1), dtype)
    out = jw.weight_decay(g, w, rate)
    assert out.dtype == dtype and out.shape == shape
    expected = np.float64(g) + rate * np.float64(w)
    np.testing.assert_allclose(np.float64(out), expected, rtol=float(jnp.finfo(dtype).eps), atol=1e-6)


def test_is_the_gradient_of_the_penalised_loss():
    with enable_x64(True):
        w, rate = jnp.asarray(normal(3, 4)), 0.3
        loss = lambda w: jnp.sum(jnp.sin(w))
        penalised = jax.grad(lambda w: loss(w) + rate / 2 * jnp.sum(w**2))(w)
        np.testing.assert_allclose(jw.weight_decay(jax.grad(loss)(w), w, rate), penalised, rtol=1e-14)


def test_gradient():
    with enable_x64(True):
        g, w, rate = jnp.asarray(normal(3)), jnp.asarray(normal(3, seed=1)), jnp.asarray(0.3)
        check_grads(jw.weight_decay, (g, w, rate), order=2, rtol=1e-6)


def test_mixed_dtypes_keep_that_of_the_gradient():
    g, w = jnp.float32([1.0, 1.0]), jnp.asarray([1 / 3, 3e38], jnp.bfloat16)
    out = jw.weight_decay(g, w, 1e-3)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, 1 + 1e-3 * np.float64(w), rtol=1e-6)


def test_float16_is_computed_in_float32():
    # 1.5·65504 overflows float16; the sum does not.
    w = jnp.float16([65504])
    assert jw.weight_decay(jnp.float16([-60000]), w, 1.5)[0] == np.float16(1.5 * 65504 - 60000)
    assert jw.weight_decay(w, w, 0.5)[0] == jnp.inf


PENALTIES = {
    "l2": (None, lambda d: d),
    "l1": (jnp.sign, np.sign),
    "elastic net": (lambda d: jnp.sign(d) + 4 * d, lambda d: np.sign(d) + 4 * d),
    "group lasso": (jw.weight_normalize, lambda d: d / np.sqrt(np.sum(np.float64(d) ** 2, axis=0))),
}


@pytest.mark.parametrize("name", PENALTIES)
@pytest.mark.parametrize("cautious", [False, True])
@pytest.mark.parametrize("toward", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_penalties_centres_and_caution(name, cautious, toward, dtype):
    penalty_grad, slope = PENALTIES[name]
    g, w, center = (jnp.asarray(normal(30, 4, seed=i), dtype) for i in range(3))
    out = jw.weight_decay(g, w, 0.3, penalty_grad=penalty_grad, toward=center if toward else None, cautious=cautious)
    assert out.dtype == dtype
    g, w, center = (np.float64(x) for x in (g, w, center))
    pull = slope(w - center if toward else w)
    kept = cautious & (g * pull < 0)
    assert 0 < (g * pull < 0).mean() < 1
    np.testing.assert_allclose(
        np.float64(out), np.where(kept, g, g + 0.3 * pull), rtol=float(jnp.finfo(dtype).eps), atol=1e-6
    )


def test_caution_goes_by_signs_of_any_size():
    """Decay where g·w >= 0 (Chen et al., algorithm 1): 0 counts as agreement, and 1e-30·1e-30 must not underflow."""
    g, w = jnp.float32([0.0, 1e-30, -1e-30, 1e30, -1e30]), jnp.float32([2.0, 1e-30, 1e-30, 1e30, 1e30])
    expected = [1.0, 1.5e-30, -1e-30, 1.5e30, -1e30]
    np.testing.assert_allclose(jw.weight_decay(g, w, 0.5, cautious=True), expected, rtol=1e-6)


@pytest.mark.parametrize("penalty_grad", [None, jnp.sign, jw.weight_normalize])
def test_a_weight_at_the_centre_stays(penalty_grad):
    w = jnp.array([3.0, -2.0, 0.0])
    np.testing.assert_array_equal(jw.weight_decay(jnp.zeros(3), w, 0.5, penalty_grad=penalty_grad, toward=w), 0)


def test_errors():
    with pytest.raises(ValueError, match="shape"):
        jw.weight_decay(jnp.ones(3), jnp.ones(2), 0.1)
    with pytest.raises(ValueError, match="rate"):
        jw.weight_decay(jnp.ones(3), jnp.ones(3), -0.1)
    with pytest.raises(ValueError, match="NaN"):
        jw.weight_decay(jnp.ones(3), jnp.ones(3), float("nan"))
