"""The two LeNets of Deep Compression (Caffe's), and their training on Fashion-MNIST."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxweights as jw

Forward = Callable[[Any, jax.Array], jax.Array]
BATCH = 128


class Images(NamedTuple):
    """Standardized images (n, 28, 28, 1), and their classes."""

    images: np.ndarray
    labels: np.ndarray


@dataclasses.dataclass(frozen=True)
class Network:
    """A network.

    Attributes:
      name: that of the paper.
      shapes: the shape of the kernel of each layer.
      forward: (params, images) -> logits.
    """

    name: str
    shapes: dict[str, tuple[int, ...]]
    forward: Forward

    def init(self, key: jax.Array) -> Any:
        """The first weights: He's."""
        keys = jax.random.split(key, len(self.shapes))
        return {
            name: {"kernel": jw.he_normal(key, shape), "bias": jnp.zeros(shape[-1])}
            for key, (name, shape) in zip(keys, self.shapes.items(), strict=True)
        }


def lenet_300_100(params: Any, images: jax.Array) -> jax.Array:
    """Three linear layers."""
    x = images.reshape(len(images), -1)
    x = jax.nn.relu(x @ params["fc1"]["kernel"] + params["fc1"]["bias"])
    x = jax.nn.relu(x @ params["fc2"]["kernel"] + params["fc2"]["bias"])
    return x @ params["fc3"]["kernel"] + params["fc3"]["bias"]


def lenet_5(params: Any, images: jax.Array) -> jax.Array:
    """Two convolutions, each with a pooling, and two linear layers. Only the hidden one has an activation."""
    x = convolve_and_pool(images, params["conv1"]["kernel"]) + params["conv1"]["bias"]
    x = convolve_and_pool(x, params["conv2"]["kernel"]) + params["conv2"]["bias"]
    x = x.reshape(len(x), -1)
    x = jax.nn.relu(x @ params["fc1"]["kernel"] + params["fc1"]["bias"])
    return x @ params["fc2"]["kernel"] + params["fc2"]["bias"]


def convolve_and_pool(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """A convolution without padding, and the maximum of every 2x2 outputs.

    On CPU, 1.6 times faster than XLA's: each row of outputs is the product of the rows of inputs that it sees with a
    Toeplitz matrix. Its columns have the even outputs first, so that the maximum is over halves.
    """
    height, width, _, n_out = kernel.shape
    n, rows, columns, _ = x.shape
    rows, columns = rows - height + 1, columns - width + 1
    starts = [*range(0, columns, 2), *range(1, columns, 2)]
    pads = [((0, 0), (j, columns - 1 - j), (0, 0), (0, 0)) for j in starts]
    matrix = jnp.stack([jnp.pad(kernel, pad) for pad in pads], -2).reshape(-1, columns * n_out)
    seen = jnp.concatenate([x[:, i : i + rows] for i in range(height)], 2)
    y = seen.reshape(n * rows, -1) @ matrix
    return largest(y.reshape(n, rows // 2, 2, 2, -1)).reshape(n, rows // 2, columns // 2, n_out)


@jax.custom_vjp
def largest(y: jax.Array) -> jax.Array:
    """The maximum over axes 2 and 3. All entries that are equal to it get its gradient."""
    return y.max((2, 3))


def _largest_forward(y: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    top = largest(y)
    return top, (y, top)


def _largest_backward(saved: tuple[jax.Array, jax.Array], grad: jax.Array) -> tuple[jax.Array]:
    y, top = saved
    return (jnp.where(y == top[:, :, None, None], grad[:, :, None, None], 0),)


largest.defvjp(_largest_forward, _largest_backward)

LENET_300_100 = Network("LeNet-300-100", {"fc1": (784, 300), "fc2": (300, 100), "fc3": (100, 10)}, lenet_300_100)
LENET_5 = Network(
    "LeNet-5",
    {"conv1": (5, 5, 1, 20), "conv2": (5, 5, 20, 50), "fc1": (800, 500), "fc2": (500, 10)},
    lenet_5,
)


def fit(
    forward: Forward, weights: Any, tx: optax.GradientTransformation, data: Images, epochs: int, seed: int,
    teacher: np.ndarray | None = None, by_labels: float = 0.5,
) -> Any:  # fmt: skip
    """Trains `weights`: images are mirrored at random. With a teacher, `by_labels` of the loss is by labels.

    The rest is by the logits of `teacher` for the images, and for the mirrored ones: (2, n, classes).
    """
    images, labels = jnp.asarray(data.images), jnp.asarray(data.labels)
    known = None if teacher is None else jnp.asarray(teacher)

    def loss(weights, batch, mirrored):
        x = images[batch]
        logits = forward(weights, jnp.where(mirrored[:, None, None, None], x[:, :, ::-1], x))
        hard = optax.softmax_cross_entropy_with_integer_labels(logits, labels[batch]).mean()
        if known is None:
            return hard
        soft = jax.nn.softmax(known[mirrored.astype(int), batch] / HEAT)
        by_teacher = HEAT**2 * optax.softmax_cross_entropy(logits / HEAT, soft).mean()
        return by_labels * hard + (1 - by_labels) * by_teacher

    @jax.jit
    def epoch(state, batches):
        def step(state, batch):
            weights, opt = state
            grads = jax.grad(loss)(weights, *batch)
            updates, opt = tx.update(grads, opt, weights)
            return (optax.apply_updates(weights, updates), opt), None

        return jax.lax.scan(step, state, batches)[0]

    rng = np.random.default_rng(seed)
    n = len(labels) // BATCH * BATCH
    state = (weights, tx.init(weights))
    for _ in range(epochs):
        batches = rng.permutation(len(labels))[:n].reshape(-1, BATCH)
        state = epoch(state, (jnp.asarray(batches), jnp.asarray(rng.random(batches.shape) < 0.5)))
    return state[0]


HEAT = 2.0
"""The temperature at which logits are compared with the teacher's."""


def logits(forward: Forward, weights: Any, images: np.ndarray) -> np.ndarray:
    """The logits of all images, a thousand at a time."""
    run = jax.jit(forward)
    return np.concatenate([run(weights, images[i : i + 1000]) for i in range(0, len(images), 1000)])


def accuracy(forward: Forward, weights: Any, data: Images) -> float:
    """The fraction of images whose class is found."""
    return float(np.mean(logits(forward, weights, data.images).argmax(-1) == data.labels))
