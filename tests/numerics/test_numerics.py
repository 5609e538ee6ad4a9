"""Shared numerics, against float64 NumPy."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads
from x64 import enable_x64

import jaxweights as jw
from jaxweights.numerics.dtypes import accumulation_dtype
from jaxweights.numerics.norms import safe_divide, safe_norm
from jaxweights.numerics.rounding import exact_delta
from jaxweights.numerics.straight_through import straight_through

FLOATS = [jnp.float32, jnp.bfloat16, jnp.float16]
STACK = jw.Axes(1, 2, 0)
quick = settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def test_accumulation_dtype():
    assert [accumulation_dtype(d) for d in (jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64)] == [
        *[jnp.float32] * 3,
        jnp.float64,
    ]


# safe_norm


@pytest.mark.parametrize("dtype", FLOATS)
def test_safe_norm(dtype):
    x, cases = jnp.asarray(normal(3, 4, 5), dtype), [((1,), False), ((0, 2), True), ((0, 1, 2), False), ((), True)]
    norms = jax.jit(lambda x: [safe_norm(x, axis, keepdims=keepdims) for axis, keepdims in cases])(x)
    for norm, (axis, keepdims) in zip(norms, cases, strict=True):
        assert norm.dtype == jnp.float32
        expected = np.sqrt(np.sum(np.square(np.asarray(x, np.float64)), axis, keepdims=keepdims))
        np.testing.assert_allclose(norm, expected, rtol=1e-6, err_msg=str(axis))


@pytest.mark.parametrize(
    ("dtype", "size"), [(jnp.float32, 1e30), (jnp.float32, 1e-30), (jnp.bfloat16, 1e30), (jnp.float16, 6e4)]
)
def test_safe_norm_leaves_no_range(dtype, size):
    x = jnp.asarray([size, 0, -size / 2, size / 4], dtype)
    exact = np.asarray(x, np.float64)
    norm, gradient = jax.jit(jax.value_and_grad(lambda x: safe_norm(x, (0,))))(x)
    np.testing.assert_allclose(norm, np.linalg.norm(exact), rtol=1e-6)
    np.testing.assert_allclose(
        gradient.astype(jnp.float32), exact / np.linalg.norm(exact), rtol=2 * float(jnp.finfo(dtype).eps)
    )


def test_safe_norm_of_nothing_and_of_zero():
    run = jax.jit(jax.value_and_grad(lambda x: safe_norm(x, (0,)).sum()))
    for x in (jnp.zeros((3, 4)), jnp.zeros((0, 4)), jnp.full((3, 4), 1e-40)):
        norm, gradient = run(x)
        assert norm == 0 and not gradient.any()
    assert safe_norm(jnp.zeros((0, 4)), (0,), keepdims=True).shape == (1, 4)
    assert safe_norm(jnp.float32(-3), ()) == 3


def test_safe_norm_of_nan_and_infinity():
    x = jnp.array([[jnp.nan, 1], [jnp.inf, 1], [1, 1]])
    np.testing.assert_array_equal(np.isnan(safe_norm(x, (1,))), [True, True, False])


def test_safe_norm_of_rows_out_of_range_among_others():
    """A row beyond the range of squares changes no other, also under `vmap`."""
    x = normal(8, 50).astype(np.float32)
    mixed = x * np.float32([[1e30], [1], [1e-30], [0], [3e-19], [1e18], [1e-24], [1]])
    exact = np.linalg.norm(np.float64(mixed), axis=1)

    @jax.jit
    def run(mixed, x):
        norm = lambda x: safe_norm(x, (1,))
        grad = jax.grad(lambda x: norm(x).sum())
        return norm(mixed), norm(x), jax.vmap(norm)(jnp.stack([mixed, x])), grad(mixed)

    norms, ordinary, batch, gradient = run(mixed, x)
    np.testing.assert_allclose(norms, exact, rtol=1e-6)
    np.testing.assert_array_equal(norms[jnp.array([1, 7])], ordinary[jnp.array([1, 7])])
    np.testing.assert_array_equal(batch, [norms, ordinary])
    np.testing.assert_allclose(gradient, mixed / np.where(exact == 0, 1, exact)[:, None], rtol=1e-5, atol=1e-7)


def test_safe_norm_gradient():
    with enable_x64(True):
        check_grads(jax.jit(lambda x: safe_norm(x, (0, 2))), (jnp.asarray(normal(2, 3, 2)),), order=2, rtol=1e-6)


# safe_divide


def test_safe_divide():
    x, y = normal(3, 4), normal(4, seed=1)
    np.testing.assert_allclose(safe_divide(jnp.float32(x), jnp.float32(y)), x / y, rtol=1e-5)
    np.testing.assert_array_equal(safe_divide(jnp.array([2.0, 0.0]), jnp.zeros(2)), [2, 0])


def test_safe_divide_gradient():
    with enable_x64(True):
        check_grads(
            jax.jit(safe_divide), (jnp.asarray(normal(3, 4)), jnp.asarray(normal(1, 4, seed=1))), order=2, rtol=1e-5
        )


def test_safe_divide_gradient_at_zero():
    dx, dy = jax.grad(safe_divide, (0, 1))(2.0, 0.0)
    assert (dx, dy) == (1, 0)


@pytest.mark.parametrize("y", [1e-25, 1e25])
def test_safe_divide_gradient_does_not_square(y):
    dx, dy = jax.grad(safe_divide, (0, 1))(3 * y, y)
    np.testing.assert_allclose([dx, dy], [1 / y, -3 / y], rtol=1e-6)


# straight_through


def test_straight_through():
    x, y = jnp.array([0.1, 1e8]), jnp.array([0.3, 0.7])
    out, pull = jax.vjp(straight_through, x, y)
    np.testing.assert_array_equal(out, y)
    dx, dy = pull(jnp.array([2.0, 3.0]))
    np.testing.assert_array_equal(dx, [2, 3])
    np.testing.assert_array_equal(dy, [0, 0])


def test_straight_through_forward_mode():
    _, tangent = jax.jvp(straight_through, (jnp.ones(2), jnp.zeros(2)), (jnp.array([1.0, 2.0]), jnp.full(2, 9.0)))
    np.testing.assert_array_equal(tangent, [1, 2])


# exact_delta


@pytest.fixture
def stored(optimizing):
    """(p, u, target) -> (p after `optax.apply_updates` of the delta, the delta), summed in NumPy."""
    run = jax.jit(exact_delta, compiler_options=optimizing)

    def stored(p, u, target):
        d = np.asarray(run(jnp.asarray(p), jnp.asarray(u), jnp.asarray(target)))
        assert d.dtype == np.float32
        return (np.asarray(p, np.float32) + d).astype(p.dtype), d

    return stored


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: d.__name__)
@pytest.mark.parametrize("spread", [0, 1, 10, 60])
def test_exact_delta_never_passes_its_target(stored, dtype, spread):
    rng = np.random.default_rng(spread)
    info = jnp.finfo(dtype)
    # The hardware flushes float32 subnormals to 0; float16 subnormals are normal in float32.
    low = float(info.smallest_subnormal if dtype == jnp.float16 else info.tiny)

    def wild():
        a = rng.normal(size=20_000) * 2.0 ** rng.uniform(-spread, spread, 20_000)
        return np.where(np.abs(a) < low, 0, np.clip(a, -float(info.max), float(info.max))).astype(dtype)

    p, u, target = wild(), wild(), wild()
    target[:2000] = 0
    target[2000:4000] = p[2000:4000]
    after, _ = stored(p, u, target)
    exact, goal = np.float64(after), np.float64(target)
    assert (np.abs(exact) <= np.abs(goal)).all()
    assert (exact * goal >= 0).all()
    np.testing.assert_array_equal(exact[:4000], goal[:4000])
    # Falls short by at most one ulp of p, of d or, in p's dtype, of the target.
    unit = 2.0**-22 * np.maximum(np.abs(np.float64(p)), np.abs(goal)) + np.maximum(float(info.eps) * np.abs(goal), low)
    assert (np.abs(goal) - np.abs(exact) <= unit).all()


@pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: d.__name__)
def test_exact_delta_leaves_an_update_that_meets_the_target(stored, dtype):
    p, u = normal(1000).astype(dtype), (normal(1000, seed=1) / 100).astype(np.float32)
    target = (np.asarray(p, np.float32) + u).astype(dtype)
    _, d = stored(p, u, target)
    np.testing.assert_array_equal(d, u)


@quick
@given(
    st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=False), st.floats(2**-100, 1, width=32)
)
def test_exact_delta_of_a_clipped_weight(stored, p, limit):
    p, limit = np.float32(p), np.float32(limit)
    after, _ = stored(p, np.float32(0), np.clip(p, -limit, limit))
    assert abs(after) <= limit


def test_exact_delta_at_the_ends_of_the_range(stored):
    p, target = np.float32([-3e38, 3e38, 1.0]), np.float32([3e38, -3e38, 3e38])
    after, _ = stored(p, np.zeros_like(p), target)
    assert np.isfinite(after).all() and (np.abs(after) <= np.float32(3e38)).all()


@pytest.mark.parametrize(
    "f",
    [
        jw.spectral_norm,
        jax.vmap(jw.spectral_norm),
        lambda w: jw.sparsegpt(w, jnp.broadcast_to(jnp.eye(3), (4, 3, 3)), 0.5, axes=STACK),
        lambda w: jw.reconstruct(w, w > 0, jnp.broadcast_to(jnp.eye(3), (4, 3, 3)), axes=STACK),
    ],
)
def test_no_decomposition_is_batched(f):
    """Concurrent batched LAPACK calls can deadlock on the CPU."""
    text = jax.jit(f).lower(jnp.ones((4, 3, 2))).as_text()
    calls = [line for line in text.splitlines() if "@lapack" in line or "triangular_solve" in line]
    assert len(calls) > 0
    assert not [line for line in calls if re.search(r"\(tensor<\d+x\d+x\d+x", line)]
