"""One-shot pruning against float64 references: the published algorithms, least squares, a loop over matrices."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from x64 import enable_x64

import jaxweights as jw
from jaxweights.core.axes import axes_or_default
from jaxweights.numerics.inverse_factor import inverse_factor


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


@functools.cache
def problem(rows=256, columns=128, n=1024, seed=6):
    """(w, x) with correlated inputs of very different norms. Magnitude pruning has error .07 at 50% and .13 at 2:4."""
    rng = np.random.default_rng(seed)
    i = np.arange(rows)
    w = rng.normal(size=(rows, columns))
    x = rng.normal(size=(n, rows)) @ np.linalg.cholesky(0.6 ** np.abs(i[:, None] - i)).T
    return w, x * np.exp(0.92 * rng.normal(size=rows))


def moment(x):
    return x.T @ x / len(x)


def error(w, new, x):
    """‖X(W' − W)‖² / ‖XW‖² in float64."""
    new = np.asarray(new, np.float64)
    return np.sum((x @ (new - w)) ** 2) / np.sum((x @ w) ** 2)


def smallest(scores, k):
    """Mask that is True at the k smallest, ties by flat index."""
    mask = np.zeros(scores.size, bool)
    mask[np.argsort(scores.ravel(), kind="stable")[:k]] = True
    return mask.reshape(scores.shape)


def half_up(x):
    return int(np.floor(x + 0.5))


def wanda(w, norm, sparsity):
    """The published recipe in NumPy: per output unit, or per group of m."""
    scores, mask = np.abs(w) * norm[:, None], np.ones(w.shape, bool)
    size, k = (len(w), half_up(sparsity * len(w))) if not isinstance(sparsity, tuple) else (sparsity[1], None)
    k = sparsity[1] - sparsity[0] if k is None else k
    for start in range(0, len(w), size):
        for j in range(w.shape[1]):
            mask[start : start + size, j] = ~smallest(scores[start : start + size, j], k)
    return mask


def recipe(w, h, sparsity, block=128):
    """SparseGPT as published, one column of the paper's matrix (a row of ours) at a time, in float64."""
    w, h = w.copy(), h.copy()
    rows, columns = w.shape
    dead = np.diag(h) == 0
    h[dead, dead], w[dead] = 1, 0
    h += 0.01 * np.mean(np.diag(h)) * np.eye(rows)
    u = np.linalg.cholesky(np.linalg.inv(h)).T
    mask, counts = np.ones(w.shape, bool), 0
    for start in range(0, rows, block):
        end = min(start + block, rows)
        if not isinstance(sparsity, tuple):
            k = half_up(sparsity * end * columns) - counts
            mask[start:end] = ~smallest(w[start:end] ** 2 / np.diag(u)[start:end, None] ** 2, k)
            counts += k
        for i in range(start, end):
            if isinstance(sparsity, tuple) and i % sparsity[1] == 0:
                n, m = sparsity
                scores = w[i : i + m] ** 2 / np.diag(u)[i : i + m, None] ** 2
                mask[i : i + m] = np.stack([~smallest(s, m - n) for s in scores.T], 1)
            e = np.where(mask[i], 0, w[i]) / u[i, i]
            w[i:] -= np.outer(u[i, i:], e)
            w[i] = np.where(mask[i], w[i], 0)
    return w, mask


def least_squares(w, mask, x):
    """Solves the normal equations, with a ridge that matters only for dependent inputs."""
    h, new = moment(x), np.zeros_like(w)
    h += 1e-12 * np.trace(h) / len(h) * np.eye(len(h))
    for j, kept in enumerate(mask.T):
        new[kept, j] = np.linalg.solve(h[np.ix_(kept, kept)], h[kept] @ w[:, j])
    return new


sparsegpt = jax.jit(jw.sparsegpt, static_argnames=("sparsity", "axes", "block"))
reconstruct = jax.jit(jw.reconstruct, static_argnames="axes")


# Values of the reference implementations


@pytest.mark.parametrize(
    ("sparsity", "magnitude", "of_wanda", "of_sparsegpt", "best"),
    [
        pytest.param(0.5, 0.069, 0.0083, 0.0069, 0.0048, marks=pytest.mark.slow),
        ((2, 4), 0.136, 0.031, 0.022, 0.015),
    ],
)
def test_no_worse_than_the_peers(sparsity, magnitude, of_wanda, of_sparsegpt, best, optimizing):
    w, x = problem()

    @functools.partial(jax.jit, compiler_options=optimizing)  # fast compilation would make the solvers too slow
    def run(w, h, norm):
        mask, (new, sparsegpt_mask) = jw.wanda_mask(w, norm, sparsity), jw.sparsegpt(w, h, sparsity)
        return new, [(m, jw.reconstruct(w, m, h)) for m in (mask, sparsegpt_mask)]

    new, restored = run(*map(jnp.float32, (w, moment(x), np.linalg.norm(x, axis=0))))
    assert error(w, np.where(wanda(w, np.ones(len(w)), sparsity), w, 0), x) == pytest.approx(magnitude, rel=0.1)
    assert error(w, np.where(restored[0][0], w, 0), x) < of_wanda
    assert error(w, new, x) < of_sparsegpt
    for mask, reconstructed in restored:
        optimum = error(w, least_squares(w, np.asarray(mask), x), x)
        reconstructed = error(w, reconstructed, x)
        assert reconstructed < best and reconstructed == pytest.approx(optimum, rel=1e-6)


# Wanda


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_wanda_is_the_recipe(dtype):
    w, norm = jnp.asarray(normal(24, 10), dtype), jnp.float32(np.abs(normal(24, seed=1)))
    scores = np.abs(np.float32(w)) * np.asarray(norm)[:, None]
    fractions, patterns = (0.0, 0.3, 0.5, 1.0), ((2, 4), (1, 4), (3, 8), (0, 2), (2, 2))
    masks = jax.jit(lambda w: [jw.wanda_mask(w, norm, s) for s in (*fractions, *patterns)])(w)
    for mask, sparsity in zip(masks, (*fractions, *patterns), strict=True):
        np.testing.assert_array_equal(mask, wanda(scores, np.ones(24), sparsity), err_msg=f"{sparsity}")
    traced = jax.jit(lambda w, s: jw.wanda_mask(w, norm, s))
    for mask, sparsity in zip(masks, fractions, strict=False):
        np.testing.assert_array_equal(traced(w, sparsity), mask, err_msg=f"{sparsity}")


def test_wanda_takes_the_first_of_equal_scores():
    run = jax.jit(lambda w: [jw.wanda_mask(w, jnp.ones(8), sparsity) for sparsity in (0.5, (2, 4))])
    ones = jnp.ones((8, 3))
    for mask, with_nan, sparsity in zip(run(ones), run(ones.at[0].set(jnp.nan)), (0.5, (2, 4)), strict=True):
        np.testing.assert_array_equal(mask, wanda(np.ones((8, 3)), np.ones(8), sparsity))
        assert not mask[0].any() and mask[-1].all()
        assert with_nan[0].all() and not with_nan[1].any()


# SparseGPT


@pytest.mark.parametrize(
    ("rows", "columns", "sparsity", "block"),
    [
        *((48, 16, 0.5, 128), (100, 12, 0.7, 32), (9, 5, 1.0, 4), (9, 5, 0.0, 4)),
        *((64, 10, (2, 4), 32), (24, 6, (1, 3), 128), (40, 8, (4, 8), 20)),
    ],
)
def test_sparsegpt_is_the_recipe(rows, columns, sparsity, block):
    w, x = problem(rows, columns, 300, 0)
    h = moment(x)
    h[3], h[:, 3] = 0, 0  # an input that never occurs
    h *= (rows - 1) / np.trace(h)  # makes our substitute, the mean diagonal, equal the recipe's 1
    # Our blocks match the recipe's, except that for n:m they hold whole groups.
    span = block if not isinstance(sparsity, tuple) else rows
    expected, kept = recipe(w, h, sparsity, span)
    new, mask = sparsegpt(jnp.float32(w), jnp.float32(h), sparsity, block=block)
    np.testing.assert_array_equal(mask, kept)
    np.testing.assert_allclose(new, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max(initial=1e-9))
    np.testing.assert_array_equal(np.where(mask, 0, new), 0)


def test_the_count_of_zeros_is_exact():
    w, x = problem(150, 7, 300, 0)
    w, h = jnp.float32(w), jnp.float32(moment(x))
    traced = jax.jit(functools.partial(jw.sparsegpt, block=32))
    for s in (0.123, 0.5, 0.75):
        assert np.sum(~traced(w, h, s)[1]) == half_up(s * w.size), s
    assert np.sum(~sparsegpt(w, h, 0.123, block=32)[1]) == half_up(0.123 * w.size)


def test_new_weights_have_the_dtype_and_the_layout_of_the_old_ones():
    w, x = problem(32, 7, 300, 0)
    h, axes = jnp.float32(moment(x)), jw.Axes(1, 0)
    new, mask = sparsegpt(jnp.bfloat16(w.T), h, (2, 4), axes=axes)
    reconstructed = reconstruct(jnp.bfloat16(w.T), mask, h, axes=axes)
    assert new.dtype == reconstructed.dtype == jnp.bfloat16
    assert new.shape == mask.shape == reconstructed.shape == (7, 32)
    np.testing.assert_array_equal((new != 0).reshape(7, 8, 4).sum(2), 2)
    assert error(w, np.float64(reconstructed).T, x) < error(w, np.float64(new).T, x) + 1e-4


def test_the_scale_of_the_second_moment_does_not_matter():
    w, x = problem(32, 8, 100, 0)
    w, h = jnp.float32(w), jnp.float32(moment(x))
    new, mask = sparsegpt(w, h, 0.5)
    expected = reconstruct(w, mask, h)
    for scale in (1e-30, 1e30):
        scaled = sparsegpt(w, scale * h, 0.5)
        np.testing.assert_array_equal(scaled[1], mask)
        np.testing.assert_allclose(scaled[0], new, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(reconstruct(w, mask, scale * h), expected, rtol=1e-3, atol=1e-4)


# Reconstruction


def test_reconstruction_with_a_mask_that_keeps_all_or_nothing():
    w, x = problem(32, 8, 100, 0)
    w, h = jnp.float32(w), jnp.float32(moment(x))
    np.testing.assert_array_equal(reconstruct(w, w == w, h), w)
    np.testing.assert_array_equal(reconstruct(w, w != w, h), jnp.zeros_like(w))


@pytest.mark.parametrize("noise", [1e-3, 0.0])
def test_reconstruction_where_inputs_are_linearly_dependent(noise):
    """64 inputs from 20 factors; each unit keeps half of the inputs, enough to restore its output."""
    w, x = normal(64, 8), normal(500, 20) @ normal(20, 64, seed=1) + noise * normal(500, 64, seed=2)
    mask = normal(64, 8, seed=3) > 0
    new = reconstruct(jnp.float32(w), mask, jnp.float32(moment(x)))
    assert error(w, new, x) <= 1.2 * error(w, least_squares(w, mask, x), x) + 1e-9
    assert np.abs(new).max() < 10


SINGULAR = {
    "rank 1": np.outer(normal(90), normal(48, seed=1)),
    "rank 10": normal(90, 10) @ normal(10, 48, seed=1),
    "fewer samples than inputs": normal(20, 48),
    "each input twice": np.repeat(normal(90, 24), 2, 1),
    "each input twice, at other scales": np.repeat(normal(90, 24), 2, 1) * np.exp(3 * normal(48, seed=1)),
    "constant": np.ones((5, 48)),
    "never": np.zeros((5, 48)),
    "some never": normal(90, 48) * (np.arange(48) % 3 > 0),
}


@pytest.mark.parametrize("dtype", [jnp.float32, pytest.param(jnp.float64, marks=pytest.mark.slow)])
def test_singular_second_moments(dtype):
    """Without damping SparseGPT beats Wanda, and reconstruction is least squares on the mask."""
    w = normal(48, 12, seed=3)
    with enable_x64(dtype == jnp.float64):
        prune = jax.jit(lambda w, h, norm: (jw.sparsegpt(w, h, 0.5, damping=0.0), jw.wanda_mask(w, norm, 0.5)))
        for name, x in SINGULAR.items():
            h = jnp.asarray(moment(x), dtype)
            (new, mask), of_wanda = prune(jnp.asarray(w, dtype), h, jnp.asarray(np.linalg.norm(x, axis=0), dtype))
            assert np.isfinite(new).all() and np.sum(~mask) == w.size // 2, name
            for chosen in (mask, of_wanda):
                restored = np.asarray(reconstruct(jnp.asarray(w, dtype), chosen, h))
                assert np.isfinite(restored).all() and not restored[~np.asarray(chosen)].any(), name
                best = np.zeros_like(w)
                for j, kept in enumerate(np.asarray(chosen).T):
                    best[kept, j] = np.linalg.lstsq(x[:, kept], x @ w[:, j])[0]
                outputs = x @ w if x.any() else np.ones(1)
                relative = lambda new, x=x, outputs=outputs: np.sum((x @ (new - w)) ** 2) / np.sum(outputs**2)
                assert relative(restored) <= 1.001 * relative(best) + (1e-9 if dtype == jnp.float32 else 1e-6), name
            if "scales" not in name:  # where only the dominant inputs count, neither is better
                assert relative(np.float64(new)) <= relative(np.where(of_wanda, w, 0)), name
            if name in ("rank 1", "constant"):  # half of the inputs restore the output
                assert relative(np.float64(new)) < 1e-9, name


def test_the_factor_of_a_sound_matrix_is_that_of_the_inverse():
    h = moment(normal(200, 30) * np.exp(3 * normal(30, seed=1)))
    for damping in (0.0, 0.01):
        u = np.float64(jax.jit(inverse_factor)(jnp.float32(h), damping))
        scale = np.sqrt(np.diag(h) + damping * np.mean(np.diag(h)))
        inverse = np.linalg.inv(h + damping * np.mean(np.diag(h)) * np.eye(30))
        np.testing.assert_array_equal(u, np.triu(u))
        np.testing.assert_allclose(u.T @ u * scale * scale[:, None], inverse * scale * scale[:, None], atol=1e-4)
    assert np.isnan(jax.jit(inverse_factor)(jnp.full((3, 3), jnp.nan), 0.0)).any()


# Layouts, values, devices

LAYOUTS = {  # few matrices, compiled once
    "attention in": ((16, 2, 3), jw.axes.ATTENTION_IN, (2, 4)),
    "attention out": ((2, 8, 6), jw.axes.ATTENTION_OUT, 0.5),
    "conv": ((2, 2, 4, 6), None, (2, 4)),
    "depthwise": ((4, 4, 1, 6), jw.axes.depthwise(6), 0.5),
    "in groups": ((4, 1, 4, 18), jw.axes.depthwise(3), (2, 4)),
    "stack": ((3, 16, 6), jw.Axes(-2, -1, 0), 0.5),
    "stack in the middle": ((16, 3, 6), jw.Axes(0, 2, 1), (2, 4)),
    "vector": ((16,), None, 0.5),
}


@functools.partial(jax.jit, static_argnums=(3, 4))
def prune(w, h, norm, sparsity, axes=None):
    mask = jw.wanda_mask(w, norm, sparsity, axes=axes)
    return mask, *jw.sparsegpt(w, h, sparsity, axes=axes), jw.reconstruct(w, mask, h, axes=axes)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_matrix_of_a_weight_is_pruned_alone(name):
    shape, axes, sparsity = LAYOUTS[name]
    w = jnp.float32(normal(*shape))
    read = axes_or_default(axes, len(shape)).matrix
    matrix = read(w)
    lead, rows = matrix.shape[:-2], matrix.shape[-2]
    x = normal(*lead, 50, rows, seed=1) * np.exp(normal(*lead, 1, rows, seed=2))
    h, norm = jnp.float32(np.einsum("...si,...sj->...ij", x, x) / 50), jnp.float32(np.linalg.norm(x, axis=-2))

    whole = [read(a) for a in prune(w, h, norm, sparsity, axes)]
    for i in np.ndindex(*lead):
        for a, b in zip(whole, prune(matrix[i], h[i], norm[i], sparsity), strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["zero", "constant", "huge", "tiny"])
def test_values_are_finite(kind):
    w = {"zero": 0 * normal(8, 4), "constant": np.full((8, 4), 0.5), "huge": 1e30 * np.sign(normal(8, 4))}
    w = jnp.float32(w.get(kind, 1e-30 * normal(8, 4)))
    for h in (moment(normal(50, 8)), np.zeros((8, 8)), np.ones((8, 8))):
        mask, *new = prune(w, jnp.float32(h), jnp.ones(8), 0.5)
        assert mask.sum() == 16 and np.isfinite(new[0]).all() and np.isfinite(new[2]).all()


@pytest.mark.parametrize("shape", [(0, 3), (4, 0)])
def test_weights_of_no_size(shape):
    assert all(a.shape == shape for a in prune(jnp.zeros(shape), jnp.eye(shape[0]), jnp.ones(shape[0]), 0.5))


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_a_weight_sharded_over_its_output_units_is_not_gathered(kind):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType[kind],))
    w, x = problem(32, 64, 100, 0)
    w, h, norm = jnp.float32(w), jnp.float32(moment(x)), jnp.float32(np.linalg.norm(x, axis=0))

    def place(a, *names):
        return jax.device_put(a, NamedSharding(mesh, PartitionSpec(*names)))

    @jax.jit
    def run(w, h, norm):
        mask = jw.wanda_mask(w, norm, 0.5)
        return mask, jw.wanda_mask(w, norm, (2, 4)), *jw.sparsegpt(w, h, 0.5, block=16), jw.reconstruct(w, mask, h)

    arguments = place(w, None, "x"), place(h), place(norm)
    compiled = run.lower(*arguments).compile()
    for a, b in zip(compiled(*arguments), run(w, h, norm), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    gathers = re.findall(r"\[([\d,]*)\]\S* all-gather\(", compiled.as_text())
    assert all(math.prod(map(int, shape.split(","))) < w.size / 8 for shape in gathers), gathers
