"""Measures the slope of a critic and the distance between generated and real images."""

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


def steepest(critic: Callable[[jax.Array], jax.Array], real: jax.Array, fake: jax.Array, key: jax.Array) -> jax.Array:
    """A lower bound of the Lipschitz constant of a critic.

    Takes the largest of the gradient norms at real, generated and mixed images and of the difference quotients between
    real and generated images.
    """
    share = jax.random.uniform(key, (len(real), 1, 1, 1))
    gradients = jax.grad(lambda x: critic(x).sum())(jnp.concatenate([real, fake, share * real + (1 - share) * fake]))
    length = lambda x: jnp.sqrt(jnp.sum(x**2, (1, 2, 3)))
    quotients = jnp.abs(critic(real) - critic(fake)) / length(real - fake)
    return jnp.maximum(length(gradients).max(), quotients.max())


class Features:
    """The hidden layer of a classifier of the real images, and the mean and covariance of their features."""

    def __init__(self, data: image_data.Data, steps: int):
        model = LinenCNN(("none",) * 3, nn.initializers.he_normal())
        tx = optax.adam(2e-3)
        images, labels = jnp.asarray(data.train_images), jnp.asarray(data.train_labels)

        @jax.jit
        def step(params, opt_state, batch):
            def loss(params):
                logits = model.apply(params, images[batch], train=True)
                return optax.softmax_cross_entropy_with_integer_labels(logits, labels[batch]).mean()

            updates, opt_state = tx.update(jax.grad(loss)(params), opt_state)
            return optax.apply_updates(params, updates), opt_state

        params = model.init(jax.random.key(0), images[:1], train=True)
        opt_state = tx.init(params)
        for batch in image_data.batches(len(images), steps, BATCH, seed=0):
            params, opt_state = step(params, opt_state, batch)

        @jax.jit
        def predict(x):
            hidden = lambda module, _: module.name == "hidden"
            logits, seen = model.apply(params, x, train=False, capture_intermediates=hidden)
            return logits.argmax(-1), nn.relu(seen["intermediates"]["hidden"]["__call__"][0])

        self._predict = predict
        self.accuracy = float(np.mean(self._of(data.test_images)[0] == data.test_labels))
        self.real = self.moments(images)
        self.held_out = self.distance(data.test_images)

    def _of(self, images) -> tuple[np.ndarray, ...]:
        """Returns (classes, hidden layer), computed in chunks."""
        chunks = [self._predict(images[i : i + CHUNK]) for i in range(0, len(images), CHUNK)]
        return tuple(np.concatenate(parts) for parts in zip(*chunks, strict=True))

    def moments(self, images) -> tuple[np.ndarray, np.ndarray]:
        features = np.float64(self._of(images)[1])
        return features.mean(0), np.cov(features.T)

    def distance(self, images) -> float:
        """Fréchet distance to the training images, ‖μ − ν‖² + tr(A + B − 2(AB)^½), from means and covariances.

        References: Heusel, Ramsauer, Unterthiner, Nessler and Hochreiter, GANs Trained by a Two Time-Scale Update
        Rule Converge to a Local Nash Equilibrium, arXiv:1706.08500, 2017.
        """
        (mean, a), (other, b) = self.real, self.moments(images)
        values, vectors = np.linalg.eigh(a)
        root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
        cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ b @ root), 0)).sum()
        return float(np.sum((mean - other) ** 2) + np.trace(a) + np.trace(b) - 2 * cross)
