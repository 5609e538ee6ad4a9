"""Weight sharing: codebooks, convolutions as shared matrices, clusters and hashes."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.test_util import check_grads
from x64 import enable_x64

import jaxweights as jw


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


# share


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("shape", [(), (7,), (3, 4), (0, 2)])
def test_share(dtype, shape):
    codebook = jnp.asarray(normal(5), dtype)
    index = np.random.default_rng(1).integers(-1, 5, shape)
    out = jw.share(codebook, jnp.asarray(index))
    assert out.dtype == dtype and out.shape == shape
    np.testing.assert_array_equal(out, np.where(index == -1, 0, np.asarray(codebook)[index]))


@pytest.mark.parametrize("kind", [np.int8, np.uint8, np.int16, np.uint32, np.int32])
def test_share_takes_any_integer_dtype(kind):
    codebook = np.arange(300, dtype=np.float32)
    index = np.array([0, 1, 127 if kind is np.int8 else 255], kind)
    np.testing.assert_array_equal(jw.share(jnp.asarray(codebook), jnp.asarray(index)), codebook[index])


def test_share_out_of_range_is_nan():
    out = jw.share(jnp.array([1.0, 2.0]), jnp.array([-1, 0, 1, 2, -2, -3, 1000]))
    np.testing.assert_array_equal(out, [0, 1, 2, np.nan, np.nan, np.nan, np.nan])


def test_share_gradient_sums_over_positions():
    index = np.array([[0, 1, -1], [1, 1, 2]])
    cotangent = normal(2, 3)
    _, pull = jax.vjp(lambda c: jw.share(c, jnp.asarray(index)), jnp.ones(4))
    expected = [cotangent[index == i].sum() for i in range(4)]
    np.testing.assert_allclose(pull(jnp.float32(cotangent))[0], expected, rtol=1e-6)
    with enable_x64(True):
        check_grads(lambda c: jw.share(c, jnp.asarray(index)), (jnp.asarray(normal(4)),), order=1)


# conv_index


@pytest.mark.parametrize(
    ("kernel_shape", "input_shape", "strides", "padding"),
    [
        ((3, 2, 4), (7, 2), 1, "SAME"),
        ((4, 1, 1), (9, 1), 3, "SAME"),
        ((3, 2, 4), (7, 2), 2, "VALID"),
        ((3, 2, 2), (5, 2), 2, [(2, 1)]),
        ((1, 3, 2), (4, 3), 1, "VALID"),
        ((3, 3, 2, 3), (5, 6, 2), 1, "SAME"),
        ((2, 3, 2, 3), (5, 6, 2), (2, 1), "same"),
        ((3, 2, 1, 2), (6, 5, 1), (2, 3), "VALID"),
        ((3, 3, 2, 2), (4, 4, 2), (1, 2), [(1, 0), (3, 2)]),
        ((2, 2, 1, 1), (4, 4, 1), 1, [(-1, 0), (0, -1)]),
        ((2, 3, 2, 2, 2), (3, 4, 3, 2), (1, 2, 1), "SAME"),
    ],
)
def test_conv_index_is_the_convolution(kernel_shape, input_shape, strides, padding):
    n = len(kernel_shape) - 2
    x, kernel = jnp.float32(normal(*input_shape)), jnp.float32(normal(*kernel_shape, seed=1))
    index = jw.conv_index(kernel_shape, input_shape, strides=strides, padding=padding)
    assert index.dtype == (np.int8 if np.prod(kernel_shape) <= 128 else np.int16)

    def shared(kernel):
        return jnp.dot(x.ravel(), jw.share(kernel.ravel(), index), precision="highest")

    def convolved(kernel):
        layout = (
            ("NWC", "WIO", "NWC") if n == 1 else ("NHWC", "HWIO", "NHWC") if n == 2 else ("NHWDC", "HWDIO", "NHWDC")
        )
        steps = (strides,) * n if isinstance(strides, int) else strides
        return lax.conv_general_dilated(x[None], kernel, steps, padding, dimension_numbers=layout, precision="highest")

    out_shape = jax.eval_shape(convolved, kernel).shape
    cotangent = jnp.float32(normal(*out_shape, seed=2))

    @jax.jit
    def run(kernel):
        values_and_pulls = jax.vjp(convolved, kernel), jax.vjp(lambda k: shared(k).reshape(out_shape), kernel)
        return [(y, pull(cotangent)[0]) for y, pull in values_and_pulls]

    (expected, gradient), (found, of_shared) = run(kernel)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    # The gradient of the shared kernel is the sum over all positions.
    np.testing.assert_allclose(of_shared, gradient, atol=1e-4)
    matrix = np.outer(np.float64(x), np.float64(cotangent))
    positions = [matrix[index == i].sum() for i in range(kernel.size)]
    np.testing.assert_allclose(of_shared.ravel(), positions, atol=1e-4)


@pytest.mark.parametrize(("shape", "space", "strides"), [((4, 2, 3), (7, 2), 2), ((3, 2, 1, 2), (3, 5, 1), (1, 3))])
def test_conv_index_of_circular_padding_is_the_layer(shape, space, strides):
    x, kernel = jnp.float32(normal(*space)), jnp.float32(normal(*shape, seed=1))
    layer = nn.Conv(shape[-1], shape[:-2], strides, "CIRCULAR", use_bias=False)
    index = jw.conv_index(shape, space, strides=strides, padding="CIRCULAR")
    found = jax.jit(lambda k: jnp.dot(x.ravel(), jw.share(k.ravel(), index), precision="highest"))(kernel)
    expected = jax.jit(layer.apply)({"params": {"kernel": kernel}}, x)
    np.testing.assert_allclose(found, expected.ravel(), atol=1e-5)


# cluster

cluster = jax.jit(jw.cluster, static_argnums=1)


def nearest(values, codebook):
    return np.abs(values[..., None] - codebook).argmin(-1)


@pytest.mark.parametrize(("shape", "n_clusters"), [((200,), 1), ((200,), 2), ((20, 10), 5), ((4, 5, 10), 16)])
def test_cluster_is_a_fixed_point_of_lloyd(shape, n_clusters):
    w = np.float32(normal(*shape))
    codebook, index = cluster(w, n_clusters)
    assert codebook.shape == (n_clusters,) and index.shape == shape and index.dtype == jnp.int8
    exact, codebook, index = w.astype(np.float64), np.float64(codebook), np.asarray(index)
    assert (np.diff(codebook) >= 0).all()
    np.testing.assert_array_equal(index, nearest(exact, codebook))
    for i in range(n_clusters):
        if (index == i).any():
            np.testing.assert_allclose(codebook[i], exact[index == i].mean(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("draw", "n_clusters"), [("normal", 2), ("laplace", 8), ("uniform", 64), ("exponential", 16)])
def test_cluster_is_no_worse_than_even_spacing(draw, n_clusters):
    w = np.float32(getattr(np.random.default_rng(0), draw)(size=2000))
    even = np.linspace(w.min(), w.max(), n_clusters)
    codebook, index = cluster(w, n_clusters)
    error = lambda codebook, index: np.sum((w.astype(np.float64) - np.float64(codebook)[index]) ** 2)
    assert error(codebook, np.asarray(index)) <= error(even, nearest(w, even)) * (1 + 1e-6)


def test_cluster_of_few_values_finds_them():
    values = np.float32([-2, -0.5, 2, 4])
    w = np.random.default_rng(0).choice(values, (30, 20))
    codebook, index = cluster(w, 4)
    np.testing.assert_array_equal(codebook, values)
    np.testing.assert_array_equal(jw.share(codebook, index), w)


@pytest.mark.parametrize(
    ("dtype", "value"), [(jnp.float32, 0.0), (jnp.float32, 0.3), (jnp.bfloat16, 0.3), (jnp.float16, 6e4)]
)
def test_cluster_of_a_constant(dtype, value):
    w = jnp.full((9, 7), value, dtype)
    codebook, index = cluster(w, 3)
    np.testing.assert_array_equal(jw.share(codebook, index), w)


@pytest.mark.parametrize(("dtype", "size"), [(jnp.float32, 1e38), (jnp.bfloat16, 1e38), (jnp.float16, 3e4)])
def test_cluster_of_huge_weights(dtype, size):
    w = jnp.asarray(np.array([-2.0, -1.9, 0.1, 0.1, 1.9, 2.1]) * size, dtype)
    codebook, index = cluster(w, 3)
    np.testing.assert_array_equal(index, [0, 0, 1, 1, 2, 2])
    np.testing.assert_allclose(
        np.float64(codebook), np.float64(w).reshape(3, 2).mean(1), rtol=float(jnp.finfo(dtype).eps)
    )


def test_cluster_does_not_lose_a_long_sum():
    # A sequential float32 sum of ones saturates at 2²⁴.
    w = jnp.concatenate([jnp.ones(2**24 + 2**22), jnp.full(8, 3.0)])
    codebook, _ = cluster(w, 2)
    np.testing.assert_array_equal(codebook, [1, 3])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_cluster_of_nan(bad):
    codebook, _ = cluster(jnp.array([1.0, bad, 2.0]), 2)
    assert jnp.isnan(codebook).all()


def test_cluster_keeps_empty_clusters():
    w = jnp.array([0.0, 0.0, 9.0])
    codebook, index = jw.cluster(w, 4, start="linear")
    np.testing.assert_allclose(codebook, [0, 3, 6, 9], rtol=1e-6)
    np.testing.assert_array_equal(index, [0, 0, 3])
    np.testing.assert_array_equal(jw.share(*jw.cluster(w, 4)), w)


@pytest.mark.parametrize(
    ("n", "kind"), [(128, "int8"), (129, "int16"), (256, "int16"), (2**15, "int16"), (2**15 + 1, "int32")]
)
def test_an_index_is_as_small_as_it_can_be(n, kind):
    w = jnp.arange(n, dtype=jnp.float32)
    if n <= 256:  # every value is a cluster of its own
        codebook, index = cluster(w, n)
        assert index.dtype == kind
        np.testing.assert_array_equal(index, np.arange(n))
        np.testing.assert_array_equal(jw.share(codebook, index), w)
    index = jw.hash_index((3 * n,), n)
    assert index.dtype == kind and index.min() >= 0 and n * 0.99 < index.max() < n
    state = jw.ShareWeights(jw.sharing.Hashed(n)).init(jnp.zeros(3 * n), jax.random.key(0))
    assert state["index"].dtype == kind
    x = np.random.default_rng(0).normal(size=3 * n).astype(np.float32)
    members = np.bincount(index, minlength=n)
    means = np.bincount(index, x.astype(np.float64), n) / np.maximum(members, 1)
    out = jax.jit(jw.ShareWeights(jw.sharing.Hashed(n)).apply)(x, state)
    np.testing.assert_allclose(out, means[index], rtol=1e-5, atol=1e-6)
    old = {"index": jnp.asarray(index, jnp.int32)}  # as in older checkpoints
    np.testing.assert_array_equal(jax.jit(jw.ShareWeights(jw.sharing.Hashed(n)).apply)(x, old), out)


def test_a_pruned_cluster_index_keeps_its_zeros():
    for n in (4, 128, 129, 256):
        w = jnp.arange(1.0, n + 1)
        codebook, index = cluster(w, n)
        pruned = jnp.where(w % 2 == 0, index, -1)
        assert pruned.dtype == index.dtype
        np.testing.assert_array_equal(jw.share(codebook, pruned), jnp.where(w % 2 == 0, w, 0))


# hash_index


def test_hash_index_is_fixed_for_all_time():
    def splitmix64(x):
        for multiplier, shift in ((0xBF58476D1CE4E5B9, 30), (0x94D049BB133111EB, 27)):
            x = ((x ^ (x >> shift)) * multiplier) % 2**64
        return x ^ (x >> 31)

    for seed, n in ((0, 7), (1, 3), (2**40, 1000)):
        expected = [splitmix64((i + seed * 0x9E3779B97F4A7C15) % 2**64) % n for i in range(24)]
        np.testing.assert_array_equal(jw.hash_index((4, 6), n, seed).ravel(), expected)


def test_hash_index_is_even():
    n, size = 10, 100_000
    for seed in range(5):
        counts = np.bincount(jw.hash_index((size,), n, seed), minlength=n)
        chi2 = np.sum((counts - size / n) ** 2) / (size / n)
        assert chi2 < 35  # nine degrees of freedom: p = 6e-5
    agree = np.mean(jw.hash_index((size,), n, 1) == jw.hash_index((size,), n, 2))
    assert abs(agree - 1 / n) < 5 * np.sqrt(0.09 / size)


# ShareWeights


@pytest.mark.parametrize("groups", [6, jw.sharing.Hashed(6, seed=3)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_share_weights_projects_on_the_means(groups, dtype):
    w, t = jnp.asarray(normal(20, 15), dtype), jw.ShareWeights(groups)
    state, apply = t.init(w, jax.random.key(0)), jax.jit(t.apply)
    out, index, exact = apply(w, state), np.asarray(state["index"]), np.float64(w)
    assert out.dtype == dtype
    means = np.array([exact[index == i].mean() for i in range(6)])
    np.testing.assert_allclose(np.float64(out), means[index], rtol=float(jnp.finfo(dtype).eps), atol=1e-7)
    np.testing.assert_array_equal(apply(out, state), out)
    assert len(np.unique(np.float64(out))) <= 6


@pytest.mark.parametrize("gradient", [None, "mean"])
def test_each_layer_of_a_stack_has_clusters_of_its_own(gradient):
    """The distances are those of the best of all partitions of each layer, whatever the magnitude of the others."""
    w = np.random.default_rng(0).normal(size=(6, 2, 3, 2)) * np.array([1.0, 100.0]).reshape(2, 1, 1)
    w = jnp.asarray(w, jnp.float32)  # (in, layers, experts, out)
    t = jw.ShareWeights(3, codebook_gradient=gradient, axes=jw.Axes(input=0, output=3, batch=(2, 1)))
    state = t.init(w, jax.random.key(0))
    found, stored = t.apply(w, state), t.store(w, state)
    assert isinstance(stored, jw.ClusteredArray) and stored.n_values == 3
    np.testing.assert_array_equal(stored.todense(), found)
    for i, j in np.ndindex(2, 3):
        values = np.sort(np.float64(w[:, i, j]).ravel())
        parts = (np.split(values, cuts) for cuts in itertools.combinations(range(1, 12), 2))
        least = min(sum(((part - part.mean()) ** 2).sum() for part in several) for several in parts)
        assert np.unique(found[:, i, j]).size == 3
        np.testing.assert_allclose(np.sum(np.square(np.float64(found - w)[:, i, j])), least, rtol=1e-4)


def test_share_weights_gradient_is_the_mean_of_the_group():
    w, t = jnp.float32(normal(8, 5)), jw.ShareWeights(jw.sharing.Hashed(4, seed=1))
    state = t.init(w, jax.random.key(0))
    index, cotangent = np.asarray(state["index"]), normal(8, 5, seed=2)
    gradient = jax.vjp(lambda w: t.apply(w, state), w)[1](jnp.float32(cotangent))[0]
    means = np.array([cotangent[index == i].mean() for i in range(4)])
    np.testing.assert_allclose(gradient, means[index], atol=1e-6)


# Errors


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: jw.share(jnp.ones((2, 2)), jnp.array([0])), ValueError, "one-dimensional"),
        (lambda: jw.share(jnp.ones(0), jnp.array([0])), ValueError, "not empty"),
        (lambda: jw.share(jnp.ones(2), jnp.array([0.0])), TypeError, "index must be an integer"),
        (lambda: jw.cluster(jnp.ones(0), 2), ValueError, "no values"),
        (lambda: jw.cluster(jnp.ones(3), 0), ValueError, "n_clusters"),
        (lambda: jw.conv_index((3, 2, 4), (7, 3)), ValueError, "do not fit"),
        (lambda: jw.conv_index((3, 2, 4), (7, 2), padding="FULL"), ValueError, "padding"),
        (lambda: jw.conv_index((3, 2, 4), (7, 2), strides=0), ValueError, "strides"),
        (lambda: jw.conv_index((3, 2, 4), (2, 2), padding="VALID"), ValueError, "does not fit"),
        (lambda: jw.hash_index((3,), 0), ValueError, "n must be"),
    ],
)
def test_errors(make, error, message):
    with pytest.raises(error, match=message):
        make()
