"""Transforms of the distance from the initial weights: bounds hold bit for bit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads
from x64 import enable_x64

import jaxweights as jw

KEY = jax.random.key(0)
FLOATS = [jnp.float32, jnp.bfloat16, jnp.float16]


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


@pytest.fixture
def clipped(optimizing):
    """Returns a jitted (w, center, limit) -> w within `limit` of the center."""

    def clipped(w, center, limit=0.1):
        t = jw.Around(jw.ClipWeights(limit))
        return t.apply(w, t.init(center, KEY))

    return jax.jit(clipped, compiler_options=optimizing)


@pytest.mark.parametrize("dtype", FLOATS)
def test_clipping_around_the_start(clipped, dtype):
    spread = np.array([[0.01], [1.0], [30.0]])
    center, w = jnp.asarray(normal(3, 500), dtype), jnp.asarray(normal(3, 500) + spread * normal(3, 500, seed=1), dtype)
    out = clipped(w, center)
    assert out.dtype == dtype
    a, b, c = (np.float64(x) for x in (w, out, center))
    np.testing.assert_allclose(b, c + np.clip(a - c, -0.1, 0.1), rtol=2 * float(jnp.finfo(dtype).eps), atol=1e-7)
    assert (np.abs(np.float32(out) - np.float32(center)) <= np.float32(0.1)).all()
    kept = np.abs(a - c) < 0.0999
    np.testing.assert_array_equal(b[kept], a[kept])


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(*[st.floats(-1e3, 1e3, width=16, allow_subnormal=False)] * 2, st.floats(2**-10, 100, width=32))
def test_the_bound_holds_for_any_numbers(clipped, center, w, limit):
    for dtype in FLOATS:
        c = np.asarray([center]).astype(dtype)
        out = clipped(np.asarray([w]).astype(dtype), c, np.float32(limit))
        assert abs(np.float32(out) - np.float32(c)) <= np.float32(limit)


def test_norms_around_the_start():
    center, w = jnp.asarray(normal(8, 5)), jnp.asarray(3 * normal(8, 5, seed=1))
    t = jw.Around(jw.ClipNorm(2.0))
    out = np.float64(jax.jit(lambda w, center: t.apply(w, t.init(center, KEY)))(w, center))
    d = np.float64(w) - np.float64(center)
    expected = np.float64(center) + d * np.minimum(1, 2 / np.linalg.norm(d, axis=0))
    np.testing.assert_allclose(out, expected, rtol=1e-6, atol=1e-6)


def test_the_state_of_the_transform():
    w = jnp.asarray(normal(8, 5))
    t = jw.Around(jw.Chain(jw.ClipWeights(lambda step: 1.0 + step), jw.Sparsify(0.5)))
    state, update, apply = jax.jit(t.init)(w, KEY), jax.jit(t.update), jax.jit(t.apply)
    moved = w + np.where(np.arange(8)[:, None] < 4, np.float32(9), np.float32(0.25))
    for n in (1, 2, 3):
        state = update(moved, state)
        out = apply(moved, state)
        np.testing.assert_allclose(out[:4], w[:4] + n, rtol=1e-6)
        np.testing.assert_array_equal(out[4:], w[4:])  # tiny moves round back to the start
    scaled = jw.Around(jw.WeightNorm())
    assert scaled.learned == {"of.scale"}
    assert set(scaled.init(w, KEY)) == {"center", "of.scale"}


def test_gradient():
    with enable_x64(True):
        center, w = jnp.asarray(normal(8, 5)), jnp.asarray(2 * normal(8, 5, seed=1))
        transforms = [jw.Around(t) for t in (jw.ClipWeights(0.7), jw.ClipNorm(1.5), jw.projections.L1Ball(3.0))]
        check_grads(jax.jit(lambda w: [t.apply(w, t.init(center, KEY)) for t in transforms]), (w,), order=1, rtol=1e-6)


def test_at_the_start_the_gradient_is_that_of_the_transform():
    """All distances are 0 and stay 0, which must not be mistaken for unchanged weights."""
    w = jnp.asarray(normal(6, 3))
    t = jw.Around(jw.projections.Simplex())
    state = t.init(w, KEY)
    pull = lambda f, x: jax.jit(lambda x: jax.vjp(f, x)[1](w)[0])(x)
    expected = pull(jw.projections.project_simplex, jnp.zeros_like(w))
    np.testing.assert_allclose(pull(lambda x: t.apply(x, state), w), expected, rtol=1e-6)


@pytest.mark.parametrize("dtype", [pytest.param(jnp.float32, marks=pytest.mark.slow), jnp.bfloat16])
def test_training_around_the_start(dtype, optimizing):
    start = {"w": jnp.asarray(normal(100, 10), dtype)}
    tx = optax.chain(optax.adam(0.05), jw.project(jw.Around(jw.ClipWeights(0.1))))
    params, state, bound = start, tx.init(start), 0

    @functools.partial(jax.jit, compiler_options=optimizing)
    def step(params, state, key):
        grads = {"w": jax.random.normal(key, (100, 10)).astype(dtype)}
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for i in range(30):
        params, state = step(params, state, jax.random.fold_in(KEY, i))
        moved = np.abs(np.float32(params["w"]) - np.float32(start["w"]))
        assert moved.max() <= np.float32(0.1)
        bound += (moved > 0.097).sum()
    assert bound > 1000
    np.testing.assert_array_equal(state[-1].transform.fixed["w"]["center"], start["w"])


def test_the_start_may_be_donated_with_the_state():
    params = {"w": jnp.ones((4, 4))}
    lifted = jw.on_tree(jw.Around(jw.ClipWeights(0.1)))
    state = jax.jit(lifted.init)(params, KEY)
    step = jax.jit(lambda p, s: (lifted.apply(p, s), s), donate_argnums=(0, 1))
    np.testing.assert_array_equal(step(params, state)[0]["w"], 1.0)
