"""Product quantization: sub-vectors that share a codebook, and products with them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from techniques.test_shared_patterns import normal

from jaxweights import sharing


@pytest.mark.parametrize("scale", [1.0, 1e30, 1e-30])
def test_product_quantization_is_a_fixed_point_of_lloyd(scale):
    w = normal(2, 12, 60) * np.float32(scale)
    codebook, index = jax.jit(lambda w: sharing.product_quantize(w, 7, 3, key=jax.random.key(1)))(w)
    assert codebook.shape == (2, 4, 7, 3) and index.shape == (2, 4, 60) and index.dtype == jnp.int8
    exact, centroids, index = np.float64(w) / scale, np.float64(codebook) / scale, np.asarray(index)
    error = 0.0
    for b in range(2):
        for m in range(4):
            vectors = exact[b, 3 * m : 3 * m + 3].T
            distances = np.sum((vectors[:, None] - centroids[b, m]) ** 2, -1)
            np.testing.assert_allclose(distances[np.arange(60), index[b, m]], distances.min(1), rtol=1e-4, atol=1e-6)
            for i in np.unique(index[b, m]):
                np.testing.assert_allclose(centroids[b, m, i], vectors[index[b, m] == i].mean(0), rtol=1e-4, atol=1e-5)
            error += distances.min(1).sum() / np.sum((vectors - vectors.mean(0)) ** 2) / 8
    assert error < 0.5  # 7 clusters of normal points in three dimensions leave about .38


def test_product_quantization_finds_what_there_is():
    codebook, index = normal(4, 3, 2), np.random.default_rng(1).integers(0, 3, (4, 50))
    w = np.asarray(sharing.share_vectors(codebook, index))
    for m in range(4):
        for j in range(50):
            np.testing.assert_array_equal(w[2 * m : 2 * m + 2, j], codebook[m, index[m, j]])
    quantized = jax.jit(lambda w: sharing.share_vectors(*sharing.product_quantize(w, 3, 2, key=jax.random.key(0))))
    np.testing.assert_allclose(quantized(w), w, rtol=1e-6)
    np.testing.assert_array_equal(quantized(np.ones_like(w)), np.ones_like(w))  # fewer vectors than clusters
    with_nan = np.where(np.arange(50) == 3, np.float32(np.nan), w)
    assert np.isnan(quantized(with_nan)).all()


def test_the_product_with_shared_vectors():
    codebook, index, x = normal(4, 5, 3), np.random.default_rng(1).integers(0, 5, (4, 20)), normal(2, 6, 12, seed=2)

    @jax.jit
    def run(x, codebook):
        product, pull = jax.vjp(lambda x, c: sharing.vectors_matmul(x, c, index), x, codebook)
        _, pull_weight = jax.vjp(lambda c: sharing.share_vectors(c, index), codebook)
        return product, pull(normal(2, 6, 20, seed=3)), pull_weight(normal(12, 20, seed=4))[0]

    product, (by_x, by_codebook), of_weight = run(x, codebook)
    w = np.float64(sharing.share_vectors(codebook, index))
    cotangent = np.float64(normal(2, 6, 20, seed=3))
    np.testing.assert_allclose(product, x @ w, atol=2e-5)
    np.testing.assert_allclose(by_x, cotangent @ w.T, atol=5e-5)
    for found, by_weight in (
        (by_codebook, np.einsum("abk,abn->kn", x, cotangent)),
        (of_weight, normal(12, 20, seed=4)),
    ):
        expected = np.zeros((4, 5, 3))
        for m in range(4):
            for j in range(20):
                expected[m, index[m, j]] += by_weight[3 * m : 3 * m + 3, j]
        np.testing.assert_allclose(found, expected, atol=1e-4)
    wrong = index.copy()
    wrong[0, 0], wrong[1, 1] = -1, 5
    for columns in (sharing.share_vectors(codebook, wrong).sum(0), sharing.vectors_matmul(x[0, 0], codebook, wrong)):
        np.testing.assert_array_equal(np.isnan(columns), np.arange(20) < 2)
