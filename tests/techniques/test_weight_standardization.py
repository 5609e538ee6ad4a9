"""Centered and standardized weights, against float64 NumPy, torch layers, and their invariants."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from x64 import enable_x64

import jaxweights as jw
from jaxweights.core.axes import ATTENTION_IN, ATTENTION_OUT, CONV, DENSE, WHOLE, depthwise

READINGS = [
    ((5,), None, (0,)),
    ((4, 3), None, (0,)),
    ((3, 2, 4, 5), CONV, (0, 1, 2)),
    ((4, 2, 3), ATTENTION_IN, (0,)),
    ((2, 3, 4), ATTENTION_OUT, (0, 1)),
    ((6, 4, 3), DENSE.stacked(), (1,)),
    ((3, 3, 1, 4), depthwise(4), (0, 1, 2)),
    ((4, 3), WHOLE, (0, 1)),
]
DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def units(shape, over):
    return tuple(s for a, s in enumerate(shape) if a not in over)


@pytest.mark.parametrize("dtype", DTYPES)
def test_formulas(dtype):
    weights = [jnp.asarray(normal(*shape) + 3, dtype) for shape, _, _ in READINGS]
    gains = [jnp.asarray(normal(*units(shape, over), seed=1), dtype) for shape, _, over in READINGS]

    def standardized(w, gain, eps, axes):
        given = {"eps": eps, "axes": axes}
        plain = jw.weight_standardize(w, **given), jw.weight_standardize(w, gain, **given)
        return *plain, jw.weight_standardize(w, gain, scaled=True, **given)

    @jax.jit
    def run(weights, gains, eps):
        cases = list(zip(weights, gains, READINGS, strict=True))
        centred = [jw.projections.center(w, axes=axes) for w, _, (_, axes, _) in cases]
        return centred, [standardized(w, gain, eps, axes) for w, gain, (_, axes, _) in cases]

    tolerance = 4 * float(jnp.finfo(dtype).eps)
    for eps in (0.0, 1e-10, 0.5):
        for w, gain, reading, *found in zip(weights, gains, READINGS, *run(weights, gains, eps), strict=True):
            shape, axes, over = reading
            exact = np.float64(w)
            exact = exact - exact.mean(over, keepdims=True)
            unit = exact / np.sqrt(np.mean(exact**2, over, keepdims=True) + eps)
            expected = unit * np.expand_dims(np.float64(gain), over)
            goals = exact, unit, expected, expected / np.sqrt(np.prod([shape[a] for a in over]))
            for out, goal in zip((found[0], *found[1]), goals, strict=True):
                assert out.dtype == dtype
                case = f"{shape} by {axes}, eps {eps}"
                np.testing.assert_allclose(np.float64(out), goal, rtol=tolerance, atol=tolerance, err_msg=case)


def test_gradients():
    readings = READINGS[1::3]
    with enable_x64(True):
        weights = [jnp.asarray(normal(*shape)) for shape, _, _ in readings]
        gains = [jnp.asarray(normal(*units(shape, over), seed=1)) for shape, _, over in readings]

        @jax.jit
        def run(weights, gains):
            cases = list(zip(weights, gains, readings, strict=True))
            centred = [jw.projections.center(w, axes=axes) for w, _, (_, axes, _) in cases]
            return centred, [
                jw.weight_standardize(w, gain, scaled=True, eps=0.1, axes=axes) for w, gain, (_, axes, _) in cases
            ]

        check_grads(run, (weights, gains), order=1, rtol=1e-6)

        # The output is invariant to the mean and, without ε, the scale of the weights: no gradient along these.
        @jax.jit
        @jax.grad
        def gradients(weights):
            cases = zip(weights, gains, readings, strict=True)
            outs = [jw.weight_standardize(w, gain, eps=0.0, axes=axes) for w, gain, (_, axes, _) in cases]
            return sum(jnp.sum(normal(*out.shape, seed=2) * out) for out in outs)

        for grad, w, (_, _, over) in zip(gradients(weights), weights, readings, strict=True):
            np.testing.assert_allclose(np.asarray(grad).sum(over), 0, atol=1e-13)
            np.testing.assert_allclose(np.asarray(grad * w).sum(over), 0, atol=1e-13)


def test_scaled_standardization_is_centred_weight_normalization():
    w, g = jnp.float32(normal(3, 3, 8, 16)), jnp.float32(normal(16, seed=1))
    chain = jw.Chain(jw.projections.Center(), jw.WeightNorm())
    assert chain.learned == {"1.scale"}
    np.testing.assert_allclose(
        jw.weight_standardize(w, g, scaled=True, eps=0.0), chain.apply(w, {"1.scale": g}), rtol=1e-5, atol=1e-6
    )
    # The chain starts at the centered weights.
    state = chain.init(w, jax.random.key(0))
    np.testing.assert_allclose(chain.apply(w, state), jw.projections.center(w), rtol=1e-6)


def test_a_scaled_layer_keeps_the_variance_of_its_inputs():
    w, x = jnp.float32(normal(400, 50) + 1), jnp.float32(normal(20_000, 400, seed=1))
    y = x @ jw.weight_standardize(w, scaled=True)
    np.testing.assert_allclose(y.std(0), 1, rtol=0.03)


def test_equal_weights_become_zero():
    """Exactly 0, although sums of c are rounded."""
    functions = jw.projections.center, jw.weight_standardize, lambda w: jw.weight_standardize(w, eps=0.0)
    run = jax.jit(lambda w: [(f(w), jax.vjp(f, w)[1](jnp.ones_like(w))[0]) for f in functions])
    for c in (0.0, 0.1, -1e4, 1e30):
        for out, gradient in run(jnp.full((1000, 2), c, jnp.float32)):
            np.testing.assert_array_equal(out, 0, err_msg=f"{c}")
            assert jnp.isfinite(gradient).all(), c


def test_weights_about_a_distant_mean():
    w = np.float32(normal(1000, 2) + 1e4)
    exact = np.float64(w) - np.float64(w).mean(0)
    centred, standard = jax.jit(lambda w: (jw.projections.center(w), jw.weight_standardize(w)))(w)
    np.testing.assert_allclose(centred, exact, atol=1e-5)
    np.testing.assert_allclose(standard, exact / exact.std(0), atol=1e-5)


@pytest.mark.parametrize(("dtype", "size"), [(jnp.float32, 1e30), (jnp.bfloat16, 1e30), (jnp.float16, 3e4)])
def test_huge_weights(dtype, size):
    unit = np.float64([[1, 1], [-1, 1], [1, -1], [-1, -1]])
    w = jnp.asarray(size * unit, dtype)
    both = lambda w: [jw.weight_standardize(w, eps=eps) for eps in (0.0, 1e-10)]
    outs, gradient = jax.jit(lambda w: (both(w), jax.vjp(both, w)[1]([jnp.ones_like(w)] * 2)[0]))(w)
    assert jnp.isfinite(gradient).all()
    for out in outs:
        np.testing.assert_allclose(np.float64(out), unit, rtol=1e-6)


def test_centred_float16_saturates():
    w = jnp.array([6e4, -6e4, -6e4, -6e4], jnp.float16)
    out, pull = jax.vjp(jw.projections.center, w)
    np.testing.assert_array_equal(out, np.float16([65504, -3e4, -3e4, -3e4]))
    assert jnp.isfinite(pull(w)[0]).all()


def test_nan_and_infinity_stay_in_their_unit():
    w = jnp.array([[jnp.nan, jnp.inf, 3.0], [1.0, 1.0, 5.0]])
    for f, goal in ((jw.projections.center, 1.0), (jw.weight_standardize, 1.0)):
        out = f(w)
        assert jnp.isnan(out[:, :2]).any(0).all()
        np.testing.assert_allclose(out[:, 2], [-goal, goal], rtol=1e-6)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0,), ()])
def test_nothing_or_a_number_is_its_own_mean(shape):
    w = jnp.ones(shape)
    np.testing.assert_array_equal(jw.projections.center(w), jnp.zeros(shape))
    np.testing.assert_array_equal(jw.weight_standardize(w, scaled=True), jnp.zeros(shape))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_transform_starts_at_its_gain(dtype):
    w = jnp.asarray(normal(16, 4, 8), dtype)
    t = jw.WeightStandardization(1.5, scaled=True, axes=ATTENTION_IN)
    state = t.init(w, jax.random.key(0))
    assert state["gain"].dtype == jnp.float32
    np.testing.assert_array_equal(state["gain"], np.full((4, 8), 1.5))
    expected = jw.weight_standardize(w, jnp.full((4, 8), 1.5), scaled=True, axes=ATTENTION_IN)
    np.testing.assert_array_equal(t.apply(w, state), expected)
    plain = jw.WeightStandardization(eps=0.1)
    assert plain.init(w, jax.random.key(0)) == {}
    np.testing.assert_array_equal(plain.apply(w, {}), jw.weight_standardize(w, eps=0.1))
