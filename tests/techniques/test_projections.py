"""Ranges, norms in a range, the simplex and the L1 ball, against float64 NumPy and the definition of a projection."""

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
READINGS = [
    ((5,), None, (0,)),
    ((), None, ()),
    ((4, 30), None, (0,)),
    ((3, 2, 4, 5), CONV, (0, 1, 2)),
    ((4, 2, 3), ATTENTION_IN, (0,)),
    ((2, 3, 4), ATTENTION_OUT, (0, 1)),
    ((6, 4, 3), DENSE.stacked(), (1,)),
]
# Few lengths, since each is compiled once.
vectors = st.sampled_from([1, 2, 3, 7, 12]).flatmap(
    lambda n: st.lists(st.floats(-1e6, 1e6, width=32), min_size=n, max_size=n).map(np.float32)
)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def per_unit(f, w, over):
    """Applies f to the vector of each output unit in float64, in a loop."""
    w = np.float64(w)
    if not over:
        return np.vectorize(lambda x: f(np.array([x]))[0])(w)
    rest = [a for a in range(w.ndim) if a not in over]
    moved = np.transpose(w, (*rest, *over))
    rows = moved.reshape(-1, np.prod([w.shape[a] for a in over]))
    out = np.array([f(row) for row in rows]).reshape(moved.shape)
    return np.transpose(out, np.argsort((*rest, *over)))


def simplex(v, total):
    """Duchi et al. 2008, figure 1, by sorting. The shift is needed for small totals, even in float64."""
    v = v - v.max()
    u = np.sort(v)[::-1]
    gaps = u - (np.cumsum(u) - total) / np.arange(1, len(v) + 1)
    rho = np.flatnonzero(gaps > 0).max(initial=0)
    return np.maximum(v - (u[: rho + 1].sum() - total) / (rho + 1), 0)


def l1_ball(v, radius):
    return v if np.abs(v).sum() <= radius else np.sign(v) * simplex(np.abs(v), radius)


# clip_range


@pytest.mark.parametrize("dtype", FLOATS)
def test_clip_range(dtype):
    weights = [jnp.asarray(normal(*shape), dtype) for shape in ((), (30, 4), (0, 3))]
    run = jax.jit(lambda weights, low, high: [jw.projections.clip_range(w, low, high) for w in weights])
    for low, high in [(0.0, np.inf), (-np.inf, -0.3), (0.1, 0.7), (-1, 0.25), (0.5, 0.5)]:
        rounded = [np.float64(np.asarray(limit).astype(dtype)) for limit in (low, high)]
        for w, out in zip(weights, run(weights, low, high), strict=True):
            assert out.dtype == dtype and out.shape == w.shape
            np.testing.assert_array_equal(np.float64(out), np.clip(np.float64(w), *rounded))


def test_clip_range_with_arrays():
    """As numpy.clip, and jnp.clip's gradients in the limits."""
    w, low, high = normal(6, 30), -np.abs(normal(6, 1, seed=1)), np.abs(normal(30, seed=2))
    for dtype in FLOATS:
        rounded = [np.float64(np.asarray(a).astype(dtype)) for a in (w, low, high)]
        out = jw.projections.clip_range(jnp.asarray(w, dtype), low, jnp.asarray(high))
        assert out.dtype == dtype and out.shape == w.shape
        np.testing.assert_array_equal(np.float64(out), np.clip(*rounded))
    cotangent = np.float32(normal(6, 30, seed=3))
    pull = jax.vjp(jw.projections.clip_range, *map(jnp.float32, (w, low, high)))[1]
    of_w, of_low, of_high = pull(cotangent)
    np.testing.assert_array_equal(of_w, np.where((w > low) & (w < high), cotangent, 0))
    np.testing.assert_allclose(of_low, np.sum(cotangent * (w < low), 1, keepdims=True), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(of_high, np.sum(cotangent * (w > high), 0), rtol=1e-5, atol=1e-6)


def test_clip_range_of_what_is_no_number_and_its_gradient():
    w = jnp.array([-jnp.inf, -1.0, 0.5, 2.0, jnp.inf, jnp.nan])
    out, pull = jax.vjp(lambda w: jw.projections.clip_range(w, 0.0, 1.0), w)
    np.testing.assert_array_equal(out, [0, 0, 0.5, 1, 1, np.nan])
    np.testing.assert_array_equal(pull(jnp.ones(6))[0], [0, 0, 1, 0, 0, 1])
    assert jw.projections.clip_range(jnp.array(0.0), jnp.array(2.0), jnp.array(1.0)) == 1


# bound_norm


@pytest.mark.parametrize("dtype", FLOATS)
def test_bound_norm(dtype):
    ours = lambda w, low, high, rate, axes: jw.projections.bound_norm(w, low, high, rate=rate, axes=axes)
    run = jax.jit(lambda ws, *limits: [ours(w, *limits, axes) for w, (_, axes, _) in zip(ws, READINGS, strict=True)])
    weights = [jnp.asarray(normal(*shape), dtype) for shape, _, _ in READINGS]
    for low, high, rate in [(1.0, 2.0, 1.0), (1.0, 1.0, 1.0), (0.0, 1.5, 0.25), (3.0, 4.0, 0.5)]:
        for w, out, (shape, _, over) in zip(weights, run(weights, low, high, rate), READINGS, strict=True):
            assert out.dtype == dtype and out.shape == shape
            exact = np.float64(w)
            norm = np.sqrt(np.sum(exact**2, over, keepdims=True))
            expected = exact * (rate * np.clip(norm, low, high) + (1 - rate) * norm) / norm
            case = f"{shape}, {low} to {high}, rate {rate}"
            np.testing.assert_allclose(np.float64(out), expected, rtol=2 * float(jnp.finfo(dtype).eps), err_msg=case)


def test_bound_norm_keeps_what_is_in_range_zero_or_no_number():
    w = jnp.array([[0.0, 0.6, jnp.nan, jnp.inf, 30.0], [0.0, 0.8, 1.0, 1.0, 40.0]])
    out = jw.projections.bound_norm(w, 0.5, 2.0)
    np.testing.assert_array_equal(out[:, :4], w[:, :4])
    np.testing.assert_allclose(out[:, 4], [1.2, 1.6], rtol=1e-6)


def test_bound_norm_gradient():
    with enable_x64(True):
        w, low, high, rate = jnp.asarray(normal(4, 30)), jnp.array(1.5), jnp.array(2.5), jnp.array(0.7)
        norm = np.linalg.norm(w, axis=0)
        assert (norm < 1.5).any() and (norm > 2.5).any() and ((norm > 1.5) & (norm < 2.5)).any()
        f = jax.jit(lambda w, low, high, rate: jw.projections.bound_norm(w, low, high, rate=rate))
        check_grads(f, (w, low, high, rate), order=1, rtol=1e-6)


def test_unit_norm_of_huge_and_tiny_weights():
    ours = lambda w: jw.projections.bound_norm(w, 1e3, 1e3)
    run = jax.jit(lambda w: (ours(w), jax.vjp(ours, w)[1](jnp.full_like(w, 1e-4))[0]))
    for size in (1e30, 1e-30):
        out, gradient = run(jnp.float32([[1, 2], [2, -3], [-2, 6]]) * size)
        np.testing.assert_allclose(out, 1e3 * np.float64([[1, 2], [2, -3], [-2, 6]]) / [3, 7], rtol=1e-6)
        assert jnp.isfinite(gradient).all()


# bound_sum


@pytest.mark.parametrize("dtype", FLOATS)
def test_bound_sum(dtype):
    weights = [jnp.asarray(normal(*shape), dtype) for shape, _, _ in READINGS]
    normals = [jnp.asarray(normal(*shape, seed=1), dtype) for shape, _, _ in READINGS]

    @jax.jit
    def run(weights, normals, low, high):
        ours = lambda w, a, axes: jw.projections.bound_sum(w, low, high, normal=a, axes=axes)
        cases = list(zip(weights, normals, READINGS, strict=True))
        return [ours(w, None, axes) for w, _, (_, axes, _) in cases], [ours(w, a, axes) for w, a, (_, axes, _) in cases]

    for low, high in [(0.0, 0.0), (-np.inf, -0.3), (0.1, 0.7)]:
        plain, weighted = run(weights, normals, low, high)
        ones = [np.ones(shape) for shape, _, _ in READINGS]
        for name, found, each in (("plain", plain, ones), ("weighted", weighted, normals)):
            for w, a, out, (shape, _, over) in zip(weights, each, found, READINGS, strict=True):
                assert out.dtype == dtype and out.shape == shape
                exact, a = np.float64(w), np.float64(a)
                total = np.sum(a * exact, over, keepdims=True)
                expected = exact + a * (np.clip(total, low, high) - total) / np.sum(a**2, over, keepdims=True)
                tolerance = 8 * float(jnp.finfo(dtype).eps)
                case = f"{name}, {shape}, {low} to {high}"
                np.testing.assert_allclose(np.float64(out), expected, rtol=0, atol=tolerance, err_msg=case)


def test_bound_sum_as_a_transform_with_a_normal():
    """The nearest point of each half-space, and a spec that is equal to another of the same numbers."""
    w, a = np.float32(normal(5, 4)), np.float32(normal(5, 1, seed=1))
    spec, same = (jw.projections.BoundSum(high=1.0, normal=n) for n in (a, jnp.asarray(a)))
    assert spec == same and hash(spec) == hash(same) and spec != jw.projections.BoundSum(high=1.0, normal=2 * a)
    out = jax.jit(lambda t, w: t.apply(w, {}), static_argnums=0)(spec, w)
    gap = np.minimum(1 - np.sum(np.float64(a) * w, 0), 0)
    np.testing.assert_allclose(out, w + np.float64(a) * gap / np.sum(np.float64(a) ** 2), rtol=1e-5, atol=1e-6)
    assert (gap < 0).any() and (gap == 0).any()


def test_bound_sum_at_the_edges():
    w = jnp.array([[0.0, 0.5, jnp.nan, jnp.inf, 3.0], [0.0, -0.25, 1.0, 1.0, 1.0]])
    out = jw.projections.bound_sum(w, -1.0, 1.0)
    np.testing.assert_array_equal(out[:, :2], w[:, :2])
    assert jnp.isnan(out[0, 2]) and jnp.isnan(out[:, 3]).any()
    np.testing.assert_array_equal(out[:, 4], [1.5, -0.5])
    np.testing.assert_array_equal(jw.projections.bound_sum(w[:, 3], 0.0), w[:, 3])  # an infinite sum is in range
    np.testing.assert_array_equal(jw.projections.bound_sum(w[:, 4], 9.0, normal=jnp.zeros(2)), w[:, 4])
    with enable_x64(True):
        w, low, high = jnp.asarray(normal(4, 30)), jnp.array(-1.0), jnp.array(1.0)
        check_grads(jax.jit(jw.projections.bound_sum), (w, low, high), order=1, rtol=1e-6)


# The simplex and the L1 ball


PROJECTIONS = {  # with their oracles
    jw.projections.project_simplex: simplex,
    jw.projections.project_l1_ball: l1_ball,
    jw.projections.project_l1_sphere: lambda v, radius: np.where(v < 0, -1, 1) * simplex(np.abs(v), radius),
}


@pytest.mark.parametrize("dtype", FLOATS)
def test_simplex_and_l1_ball(dtype):
    cases = [(f, oracle, reading) for f, oracle in PROJECTIONS.items() for reading in READINGS]
    weights = [jnp.asarray(normal(*shape), dtype) for _, _, (shape, _, _) in cases]
    run = jax.jit(lambda ws, size: [f(w, size, axes=axes) for w, (f, _, (_, axes, _)) in zip(ws, cases, strict=True)])
    for size in (0.0, 0.5, 3.0):
        for w, out, (f, oracle, (shape, _, over)) in zip(weights, run(weights, size), cases, strict=True):
            assert out.dtype == dtype and out.shape == shape
            expected = per_unit(lambda v, oracle=oracle: oracle(v, size), w, over)  # noqa: B023
            tolerance = (size + 1) * float(jnp.finfo(dtype).eps)
            case = f"{f.__name__}, {shape}, {size}"
            np.testing.assert_allclose(np.float64(out), expected, atol=tolerance, err_msg=case)


every_projection = jax.jit(lambda w, size: [f(w, size) for f in PROJECTIONS])


@settings(deadline=None, max_examples=200)
@given(vectors, st.floats(2**-20, 1e6, width=32))
def test_simplex_and_l1_ball_of_any_vector(v, size):
    out, ball, _ = map(np.float64, every_projection(v, np.float32(size)))
    assert (out >= 0).all()
    assert abs(out.sum() - size) <= 1e-6 * size * len(v)
    np.testing.assert_allclose(out, simplex(np.float64(v), size), atol=2e-6 * size)
    assert np.abs(ball).sum() <= size * (1 + 1e-6 * len(v))
    if np.abs(np.float64(v)).sum() <= size * (1 - 1e-6):
        np.testing.assert_array_equal(ball, v)
    np.testing.assert_allclose(ball, l1_ball(np.float64(v), size), atol=2e-6 * size)


def test_no_feasible_point_is_nearer():
    """For a convex set, p is the projection of w if and only if (w − p)·(q − p) <= 0 for every q of the set."""
    rng = np.random.default_rng(0)
    w = 2 * rng.normal(size=(20, 6))
    q = rng.dirichlet(np.full(20, 0.2), size=2000)
    corners = np.eye(20)
    signs = rng.choice([-1, 1], size=q.shape)
    shrink = rng.uniform(size=(2000, 1))
    sets = np.concatenate([q, corners]), np.concatenate([q * signs * shrink, corners, -corners, np.zeros((1, 20))])
    with enable_x64(True):
        for total in (0.5, 2.0, 10.0):
            for p, points in zip(map(np.asarray, every_projection(w, total)[:2]), sets, strict=True):
                assert (np.einsum("iu,qiu->qu", w - p, total * points[:, :, None] - p) <= 1e-12).all(), total


@pytest.mark.parametrize("n", [1, 2, 1000])
@pytest.mark.parametrize(
    "vector",
    [
        lambda n: 2.0 ** -np.arange(n),  # worst case: each step separates few entries
        lambda n: 2.0 ** np.arange(n).clip(0, 99),
        lambda n: 1e30 + np.zeros(n),
        lambda n: np.linspace(-1e30, 1e30, n),
        lambda n: 1e-30 * normal(n),
        lambda n: -1e4 + 1e-2 * normal(n),
    ],
)
def test_simplex_of_wide_ranges(n, vector):
    v = np.float32(vector(n))
    out = np.float64(jax.jit(jw.projections.project_simplex)(v))
    np.testing.assert_allclose(out, simplex(np.float64(v), 1.0), atol=1e-6)
    assert out.sum() == pytest.approx(1, abs=1e-6)


def test_gradients():
    with enable_x64(True):
        w, size = jnp.asarray(normal(8, 5)), jnp.array(2.0)
        assert all(0 < (out == 0).sum() < w.size for out in every_projection(w, size))
        of_units = lambda w, size: [jax.vmap(lambda v, f=f: f(v, size))(w.T) for f in PROJECTIONS]
        both = jax.jit(lambda w, size: (every_projection(w, size), of_units(w, size)))
        check_grads(both, (w, size), order=1, rtol=1e-6)


def test_what_is_no_number():
    w = jnp.array([[jnp.nan, jnp.inf, -jnp.inf, 0.5], [1.0, 1.0, 1.0, 0.5]])
    on_simplex, in_ball, _ = every_projection(w, 1.0)
    np.testing.assert_array_equal(on_simplex, [[np.nan, np.nan, 0, 0.5], [np.nan, 0, 1, 0.5]])
    np.testing.assert_array_equal(in_ball, [[np.nan, np.nan, np.nan, 0.5], [np.nan, 0, 0, 0.5]])
    for shape in ((0, 3), (3, 0)):
        assert all(f(jnp.zeros(shape), 1.0).shape == shape for f in PROJECTIONS)


def test_transforms_follow_their_schedules():
    w = jnp.array([[0.5], [-3.0], [4.0]])
    growing = lambda step: 1.0 + step
    transforms = {
        jw.projections.ClipRange(0.0, growing): lambda n: jw.projections.clip_range(w, 0.0, n),
        jw.projections.BoundNorm(0.5, growing): lambda n: jw.projections.bound_norm(w, 0.5, n),
        jw.projections.Simplex(growing): lambda n: jw.projections.project_simplex(w, n),
        jw.projections.L1Ball(growing): lambda n: jw.projections.project_l1_ball(w, n),
        jw.projections.L1Sphere(growing): lambda n: jw.projections.project_l1_sphere(w, n),
        jw.projections.BoundSum(-3.0, growing): lambda n: jw.projections.bound_sum(w, -3.0, n),
    }
    states = [t.init(w, jax.random.key(0)) for t in transforms]
    update = jax.jit(lambda states: [t.update(w, state) for t, state in zip(transforms, states, strict=True)])
    apply = jax.jit(lambda states: [t.apply(w, state) for t, state in zip(transforms, states, strict=True)])
    expected = jax.jit(lambda n: [f(n) for f in transforms.values()])
    for n in (1.0, 2.0, 3.0):
        states = update(states)
        for t, new, goal in zip(transforms, apply(states), expected(n), strict=True):
            np.testing.assert_allclose(new, goal, rtol=1e-6, err_msg=f"{t}")
