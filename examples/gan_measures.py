"""How steep a critic is, and how far a generator's images are from real ones."""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import image_data
import jax
import jax.numpy as jnp
import numpy as np
import optax
from small_cnn import LinenCNN

BATCH = 128
CHUNK = 1000


def steepest(judge: Callable[[jax.Array], jax.Array], real: jax.Array, fake: jax.Array, key: jax.Array) -> jax.Array:
    """The largest gradient of a critic, in norm, at real and generated images and at mixtures: a lower bound."""
    share = jax.random.uniform(key, (len(real), 1, 1, 1))
    images = jnp.concatenate([real, fake, share * real + (1 - share) * fake])
    slopes = jax.grad(lambda x: judge(x).sum())(images)
    return jnp.sqrt(jnp.sum(slopes**2, (1, 2, 3))).max()


class Features:
    """The hidden layer of a classifier of the real images, and what the images look like there: mean and covariance."""

    def __init__(self, data: image_data.Data, steps: int):
        model = LinenCNN(("none",) * 3, nn.initializers.he_normal())
        params = model.init(jax.random.key(0), data.train_images[:1], train=True)
        tx = optax.adam(2e-3)

        def step(state, batch):
            params, tx_state = state

            def loss(params):
                logits = model.apply(params, data.train_images[batch], train=True)
                return optax.softmax_cross_entropy_with_integer_labels(logits, data.train_labels[batch]).mean()

            updates, tx_state = tx.update(jax.grad(loss)(params), tx_state)
            return (optax.apply_updates(params, updates), tx_state), None

        batches = image_data.batches(len(data.train_labels), steps, BATCH, seed=0)
        data = data._replace(train_images=jnp.asarray(data.train_images), train_labels=jnp.asarray(data.train_labels))
        (params, _), _ = jax.jit(lambda state: jax.lax.scan(step, state, batches))((params, tx.init(params)))
        hidden = lambda module, _: module.name == "hidden"

        @jax.jit
        def predict(x):
            logits, seen = model.apply(params, x, train=False, capture_intermediates=hidden)
            return logits.argmax(-1), nn.relu(seen["intermediates"]["hidden"]["__call__"][0])

        self._predict = predict
        self.accuracy = float(np.mean(predict(data.test_images)[0] == data.test_labels))
        self.real = self.moments(data.train_images)

    def moments(self, images: jax.Array) -> tuple[np.ndarray, np.ndarray]:
        chunks = np.split(images, range(CHUNK, len(images), CHUNK))
        features = np.float64(np.concatenate([self._predict(x)[1] for x in chunks]))
        return features.mean(0), np.cov(features.T)

    def distance(self, images: jax.Array) -> float:
        """Fréchet distance to the real images: ‖μ − ν‖² + tr(A + B − 2(AB)^½), of means and covariances."""
        (mean, a), (other, b) = self.real, self.moments(images)
        values, vectors = np.linalg.eigh(a)
        root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
        cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ b @ root), 0)).sum()
        return float(np.sum((mean - other) ** 2) + np.trace(a) + np.trace(b) - 2 * cross)
