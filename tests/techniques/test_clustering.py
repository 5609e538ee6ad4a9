"""Clusters of values: the optimum, starts, importance, codebooks per unit, large weights, kept zeros, and meshes."""

import os
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract.test_meshes import gathered
from jax.sharding import NamedSharding, PartitionSpec

import jaxweights as jw

cluster = jax.jit(jw.cluster, static_argnums=1, static_argnames=("start", "keep_zeros", "axes"))


def inertia(w, codebook, index, importance=1):
    return np.sum(np.float64(importance) * (np.float64(w) - np.float64(codebook)[np.asarray(index)]) ** 2)


def least_inertia(w, n, importance=None):
    """The minimum over all partitions of the sorted values into n ranges, in float64."""
    w = np.float64(w).ravel()
    h = np.ones(w.size) if importance is None else np.float64(importance).ravel()
    w, h = w[np.argsort(w)] - np.average(w, weights=h), h[np.argsort(w)]
    mass, sums, squares = (np.append(0, (h * w**p).cumsum()) for p in range(3))
    i, j = np.arange(w.size + 1)[:, None], np.arange(w.size + 1)
    between = np.where(mass[j] > mass[i], mass[j] - mass[i], 1)
    cost = squares[j] - squares[i] - (sums[j] - sums[i]) ** 2 / between
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


@pytest.mark.slow
def test_the_optimum_is_that_of_kmeans1d():
    kmeans1d = pytest.importorskip("kmeans1d", reason="kmeans1d is an oracle: pip install kmeans1d")
    w = np.random.default_rng(0).standard_normal(16_384).astype(np.float32)
    index, codebook = kmeans1d.cluster(w.tolist(), 64)
    np.testing.assert_allclose(inertia(w, *cluster(w, 64)), inertia(w, codebook, index), rtol=3e-5)


def test_entries_count_by_their_importance():
    rng = np.random.default_rng(0)
    w = rng.laplace(size=(70, 10)).astype(np.float32)
    importance = rng.gamma(0.3, size=w.shape).astype(np.float32) * (rng.random(w.shape) < 0.7)
    codebook, index = cluster(w, 7, importance=importance)
    found = inertia(w, codebook, index, importance)
    np.testing.assert_allclose(found, least_inertia(w, 7, importance), rtol=1e-5)
    for scale in (1e-30, 1e30):  # only ratios matter
        np.testing.assert_allclose(cluster(w, 7, importance=importance * np.float32(scale))[0], codebook, rtol=1e-5)
    plain = cluster(w, 7)[0]
    for same in (0, 1e-45, 3e38):
        np.testing.assert_allclose(cluster(w, 7, importance=np.full_like(w, same))[0], plain, rtol=1e-5)
    for bad in (-1, np.inf, np.nan):
        assert np.isnan(cluster(w, 7, importance=np.where(w == w[3, 4], np.float32(bad), importance))[0]).all()
    # One entry counts a million times as much as the others, and one not at all.
    w, importance = np.float32([0, 1, 2, 3, 9]), np.float32([1, 1, 1e6, 1, 0])
    codebook, index = cluster(w, 2, importance=importance)
    np.testing.assert_allclose(codebook, [0.5, (2e6 + 3) / (1e6 + 1)], rtol=1e-6)
    np.testing.assert_array_equal(index, [0, 0, 1, 1, 1])


def test_a_large_weight_with_importance_keeps_the_bound_of_its_histogram():
    rng = np.random.default_rng(0)
    w = np.where(rng.random((300, 200)) < 0.5, 0, rng.standard_normal((300, 200))).astype(np.float32)
    importance = rng.gamma(0.3, size=(300, 1)).astype(np.float32)
    codebook, index = (np.asarray(a) for a in cluster(w, 15, importance=importance, keep_zeros=True))
    assert (codebook[index][w == 0] == codebook[-1]).all() and (index[w == 0] == -1).all()
    w, index, h = w[w != 0], index[w != 0], np.broadcast_to(importance, w.shape)[w != 0].astype(np.float64)
    best = np.quantile(w, (np.arange(15) + 0.5) / 15).astype(np.float64)
    for _ in range(300):  # Lloyd's algorithm in float64
        near = np.searchsorted((best[1:] + best[:-1]) / 2, w)
        best = np.bincount(near, h * w) / np.bincount(near, h)
    bound = np.sqrt(inertia(w, best, np.searchsorted((best[1:] + best[:-1]) / 2, w), h) / h.sum()) + np.ptp(w) / 2**14
    assert np.sqrt(inertia(w, codebook, index, h) / h.sum()) <= bound


def test_random_starts():
    values = np.float32([-2, -0.5, 0.1, 2, 4])
    w = np.random.default_rng(0).permutation(np.repeat(values, [1, 200, 2, 250, 47]))
    for seed in range(3):  # an entry at distance 0 is never drawn again, so every value is drawn once
        np.testing.assert_array_equal(cluster(w, 5, start="k-means++", key=jax.random.key(seed))[0], values)
    w = np.random.default_rng(0).laplace(size=500).astype(np.float32)
    one, other, same = (cluster(w, 5, start="k-means++", key=jax.random.key(seed)) for seed in (0, 1, 0))
    assert (one[0] != other[0]).any() and (one[0] == same[0]).all()
    codebook, index = map(np.asarray, one)
    means = [np.float64(w[index == k]).mean() for k in range(5)]
    np.testing.assert_allclose(codebook, means, rtol=1e-5)  # a fixed point of Lloyd's algorithm
    t = jw.ShareWeights(5, start="k-means++")
    state = t.init(jnp.asarray(w), jax.random.key(1))
    np.testing.assert_array_equal(state["index"], other[1])


def test_a_codebook_for_each_output_unit():
    rng = np.random.default_rng(0)
    w = np.where(rng.random((3, 16, 4)) < 0.2, 0, rng.standard_normal((3, 16, 4))).astype(np.float32)
    w *= np.float32([1, 10, 100])[:, None, None]
    importance = rng.gamma(1, size=(3, 16, 1)).astype(np.float32)
    axes = jw.Axes(batch=0)
    codebook, index = map(np.asarray, cluster(w, 3, importance=importance, axes=axes, keep_zeros=True))
    assert codebook.shape == (12, 3)
    np.testing.assert_array_equal(index == -1, w == 0)
    for unit, (layer, column) in enumerate(np.ndindex(3, 4)):
        x, k, h = w[layer, :, column], index[layer, :, column], importance[layer, :, 0]
        least = least_inertia(x[x != 0], 3, h[x != 0])
        np.testing.assert_allclose(inertia(x[x != 0], codebook[unit], k[x != 0], h[x != 0]), least, rtol=1e-5)
    stored = jw.store_clusters(codebook, index, axes=axes)
    expected = np.where(
        index == -1, 0, codebook.reshape(3, 1, 4, 3)[np.arange(3)[:, None, None], 0, np.arange(4), index]
    )
    np.testing.assert_array_equal(stored.todense(), expected)


def test_density_starts_from_quantiles():
    w = np.float32([0] * 5 + [1] * 5 + [100])
    codebook, _ = cluster(w, 2, start="density")
    np.testing.assert_allclose(codebook, [0.5, 100], rtol=1e-6)  # Lloyd's fixed point from (0, 1)
    few = np.random.default_rng(0).standard_cauchy(3000).astype(np.float32)
    linear, density = (inertia(few, *cluster(few, 32, start=start)) for start in ("linear", "density"))
    assert density != linear


@pytest.mark.slow
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
    t = jw.ShareWeights(8, start=start, keep_zeros=True)
    state = t.init(jnp.asarray(w), jax.random.key(0))
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
    t = jw.ShareWeights(jw.sharing.Hashed(12))
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
    compiled = jax.jit(lambda w: jw.cluster(w, 8, importance=w * w)).lower(placed).compile()
    assert all(n <= 2**15 for n in gathered(compiled.as_text())), gathered(compiled.as_text())
    codebook, index = compiled(placed)
    expected, _ = cluster(w, 8, importance=w * w)
    np.testing.assert_allclose(codebook, expected, rtol=1e-4, atol=1e-4)
    assert index.sharding.is_equivalent_to(placed.sharding, 2)


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_output_units_on_a_mesh_stay_where_they_are(kind):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType[kind],))
    w = np.random.default_rng(0).standard_normal((96, 64), np.float32)
    placed = jax.device_put(w, NamedSharding(mesh, PartitionSpec(None, "x")))
    axes = jw.Axes(input=0, output=1)
    compiled = jax.jit(lambda w: jw.cluster(w, 4, axes=axes)).lower(placed).compile()
    assert all(n <= 4 * 64 for n in gathered(compiled.as_text())), gathered(compiled.as_text())  # the codebooks
    codebook, index = compiled(placed)
    np.testing.assert_allclose(codebook, jw.cluster(w, 4, axes=axes)[0], rtol=1e-5, atol=1e-6)
    assert index.sharding.is_equivalent_to(placed.sharding, 2)


TWO_PROCESSES = """
import sys
import jax
import numpy as np
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(sys.argv[1], num_processes=2, process_id=int(sys.argv[2]))
import jaxweights as jw
from contract.test_meshes import gathered
w = np.random.default_rng(0).standard_normal((768, 192), np.float32)
mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x", "y"))
placed = jax.make_array_from_callback(w.shape, sharding, lambda part: w[part])
compiled = jax.jit(lambda w: jw.cluster(w, 8)).lower(placed).compile()
assert jax.process_count() == 2 and all(n <= 2**15 for n in gathered(compiled.as_text()))
codebook, index = compiled(placed)
assert index.sharding.is_equivalent_to(sharding, 2)
print(*np.asarray(codebook.addressable_data(0)))
"""


@pytest.mark.slow
def test_a_mesh_of_two_processes():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    commands = ([sys.executable, "-c", TWO_PROCESSES, address, str(i)] for i in range(2))
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    processes = [subprocess.Popen(c, env=environment, stdout=subprocess.PIPE, text=True) for c in commands]
    expected, _ = cluster(np.random.default_rng(0).standard_normal((768, 192), np.float32), 8)
    for process in processes:
        out, _ = process.communicate(timeout=300)
        assert process.returncode == 0
        np.testing.assert_allclose(np.float32(out.split()[-8:]), expected, rtol=1e-4)


@pytest.mark.parametrize(("n", "axes"), [(64, None), (4, jw.Axes())])
def test_temporaries_are_less_than_twice_the_weight(optimizing, n, axes):
    w = jax.ShapeDtypeStruct((4000, 2500), jnp.float32)
    importance = w if axes is None else None
    f = lambda w, importance: jw.cluster(w, n, importance=importance, axes=axes)
    compiled = jax.jit(f).lower(w, importance).compile(optimizing)
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * 4 * 10_000_000
