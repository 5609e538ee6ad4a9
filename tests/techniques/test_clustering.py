"""Clusters of values: the optimum, large weights through a histogram, kept zeros, and meshes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract.test_meshes import gathered
from jax.sharding import NamedSharding, PartitionSpec

import jaxweights as jw

cluster = jax.jit(jw.cluster, static_argnums=1, static_argnames=("start", "keep_zeros"))


def inertia(w, codebook, index):
    return np.sum((np.float64(w) - np.float64(codebook)[np.asarray(index)]) ** 2)


def least_inertia(w, n):
    """The minimum over all partitions of the sorted values into n ranges, in float64."""
    w = np.sort(np.float64(w).ravel())
    w = w - w.mean()
    sums, squares = np.append(0, w.cumsum()), np.append(0, (w**2).cumsum())
    i, j = np.arange(w.size + 1)[:, None], np.arange(w.size + 1)
    cost = squares[j] - squares[i] - (sums[j] - sums[i]) ** 2 / np.maximum(j - i, 1)
    cost = np.where(i <= j, cost, np.inf)
    best = cost[0]
    for _ in range(n - 1):
        best = np.min(best[:, None] + cost, axis=0)
    return best[-1]


@pytest.mark.parametrize(("size", "n"), [(1, 3), (5, 5), (300, 1), (300, 7), (700, 32)])
def test_the_optimal_start_has_the_least_inertia(size, n):
    for draw in ("normal", "laplace", "uniform", "exponential"):
        w = getattr(np.random.default_rng(size), draw)(size=size).astype(np.float32)
        codebook, index = cluster(w, n, start="optimal")
        assert (np.diff(codebook) >= 0).all()
        np.testing.assert_allclose(inertia(w, codebook, index), least_inertia(w, n), rtol=1e-5, atol=1e-12)


def test_the_optimum_of_few_values_finds_them():
    values = np.float32([-2, -0.5, 0.1, 2, 4])
    w = np.random.default_rng(0).permutation(np.repeat(values, [1, 200, 2, 250, 47]))
    codebook, index = cluster(w, 5, start="optimal")
    np.testing.assert_array_equal(codebook, values)
    np.testing.assert_array_equal(jw.share(codebook, index), w)


def test_density_starts_from_quantiles():
    w = np.float32([0] * 5 + [1] * 5 + [100])
    codebook, _ = cluster(w, 2, start="density")
    np.testing.assert_allclose(codebook, [0.5, 100], rtol=1e-6)  # Lloyd's fixed point from (0, 1)
    few = np.random.default_rng(0).standard_cauchy(3000).astype(np.float32)
    linear, density = (inertia(few, *cluster(few, 32, start=start)) for start in ("linear", "density"))
    assert density != linear


def test_a_large_weight_keeps_the_bound_of_its_histogram():
    w = np.random.default_rng(0).standard_normal((300, 200), np.float32)
    error = inertia(w, *cluster(w, 16, start="optimal"))
    # The best codebook is at least as good as this one, of Lloyd's algorithm in float64.
    codebook = np.quantile(w, (np.arange(16) + 0.5) / 16).astype(np.float64)
    for _ in range(300):
        index = np.searchsorted((codebook[1:] + codebook[:-1]) / 2, w.ravel())
        codebook = np.bincount(index, w.ravel().astype(np.float64)) / np.bincount(index)
    index = np.searchsorted((codebook[1:] + codebook[:-1]) / 2, w.ravel())
    bound = np.sqrt(inertia(w.ravel(), codebook, index) / w.size) + np.ptp(w) / 2**14
    assert np.sqrt(error / w.size) <= bound


@pytest.mark.parametrize("shape", [(40, 10), (300, 100)])
@pytest.mark.parametrize("start", ["linear", "optimal"])
def test_kept_zeros_stay_zeros(shape, start):
    rng = np.random.default_rng(0)
    w = np.where(rng.random(shape) < 0.8, 0, rng.normal(1, 1, shape)).astype(np.float32)
    codebook, index = cluster(w, 8, start=start, keep_zeros=True)
    np.testing.assert_array_equal(np.asarray(index) == -1, w == 0)
    others, clusters = w[w != 0], np.asarray(index)[w != 0]
    np.testing.assert_array_equal(
        np.abs(others - np.asarray(codebook)[clusters]), np.abs(others[:, None] - np.asarray(codebook)).min(1)
    )
    if start == "optimal" and w.size < 1000:
        np.testing.assert_allclose(inertia(others, codebook, clusters), least_inertia(others, 8), rtol=1e-5)
    state = (t := jw.ShareWeights(8, start=start, keep_zeros=True)).init(jnp.asarray(w), jax.random.key(0))
    new, pull = jax.vjp(lambda w: t.apply(w, state), jnp.asarray(w))
    np.testing.assert_array_equal(np.asarray(new) == 0, w == 0)
    np.testing.assert_array_equal(np.asarray(pull(jnp.ones_like(new))[0]) == 0, w == 0)


def test_nothing_but_zeros():
    for shape in ((5,), (200, 100)):
        codebook, index = cluster(jnp.zeros(shape), 3, keep_zeros=True)
        assert np.isfinite(codebook).all() and (np.asarray(index) == -1).all()


def test_the_mean_of_a_group_over_many_blocks():
    rng = np.random.default_rng(0)
    w = rng.normal(100, 1, (250, 401)).astype(np.float32)
    index = np.minimum(rng.geometric(0.3, w.shape) - 1, 9).astype(np.int8)
    index[-1, -1] = 11  # a group that first appears in the last block, and one without members
    t = jw.ShareWeights(12, seed=0)
    apply = jax.jit(lambda w: t.apply(w, {"index": jnp.asarray(index)}))
    out = apply(w)
    for i in {*range(10), 11}:
        np.testing.assert_allclose(np.unique(out[index == i]), [np.float64(w[index == i]).mean()], rtol=1.2e-7)
    np.testing.assert_array_equal(apply(out), out)


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_a_large_weight_on_a_mesh_is_not_gathered(kind):
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(jax.sharding.AxisType[kind],) * 2)
    w = np.random.default_rng(0).standard_normal((768, 192), np.float32)
    placed = jax.device_put(w, NamedSharding(mesh, PartitionSpec("x", "y")))
    compiled = jax.jit(lambda w: jw.cluster(w, 8)).lower(placed).compile()
    assert all(n <= 2**15 for n in gathered(compiled.as_text())), gathered(compiled.as_text())
    codebook, index = compiled(placed)
    expected, _ = cluster(w, 8)
    np.testing.assert_allclose(codebook, expected, rtol=1e-4, atol=1e-4)
    assert index.sharding.is_equivalent_to(placed.sharding, 2)


def test_temporaries_are_less_than_twice_the_weight(optimizing):
    w = jax.ShapeDtypeStruct((2000, 1000), jnp.float32)
    compiled = jax.jit(lambda w: jw.cluster(w, 64)).lower(w).compile(optimizing)
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * 4 * 2_000_000
