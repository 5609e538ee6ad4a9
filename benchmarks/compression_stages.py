"""The stages of Deep Compression for the two LeNets: training, pruning, sharing, training of the codebooks, storing."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import lenets
import numpy as np
import optax
from lenets import Images, Network

import jaxweights as jw


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a network is trained and compressed.

    Attributes:
      network: the network.
      epochs: of the dense training, of the control, of pruning, and of training the codebooks.
      sparsity: the fraction of zeros of each layer.
      values: the number of shared values of each layer, besides 0.
      by_labels: the part of the loss that is by labels where there is a teacher; the rest is by its logits.
      decay: weight decay of the dense training and of pruning, in units of the learning rate.
      rate: the highest learning rate; a quarter of it for codebooks, which do not decay.
    """

    network: Network
    epochs: tuple[int, int, int, int]
    sparsity: dict[str, float]
    values: dict[str, int]
    by_labels: float
    decay: float
    rate: float = 2e-3


RECIPES = {
    "LeNet-300-100": Recipe(
        lenets.LENET_300_100,
        (30, 120, 120, 16),
        {"fc1": 0.907, "fc2": 0.87, "fc3": 0.5},
        {"fc1": 8, "fc2": 8, "fc3": 8},
        by_labels=0.5,
        decay=0.1,
    ),
    "LeNet-5": Recipe(
        lenets.LENET_5,
        (12, 16, 40, 8),
        {"conv1": 0.34, "conv2": 0.84, "fc1": 0.906, "fc2": 0.8},
        {"conv1": 16, "conv2": 16, "fc1": 8, "fc2": 8},
        by_labels=0.0,
        decay=1e-4,
    ),
}


def optimizer(
    recipe: Recipe, epochs: int, data: Images, scale: float = 1.0, decay: float | None = None
) -> optax.GradientTransformation:
    """Adam with weight decay. The learning rate rises for a twentieth of the steps, and falls along a cosine."""
    steps = steps_of(epochs, data)
    rate = optax.warmup_cosine_decay_schedule(0, scale * recipe.rate, steps // 20, steps)
    return optax.adamw(rate, weight_decay=recipe.decay if decay is None else decay)


def steps_of(epochs: int, data: Images) -> int:
    return max(epochs * (len(data.labels) // lenets.BATCH), 1)


def train_dense(recipe: Recipe, data: Images, seed: int) -> Any:
    """Trains from He's initialization, without a teacher."""
    first = recipe.network.init(jax.random.key(seed))
    epochs = recipe.epochs[0]
    return lenets.fit(recipe.network.forward, first, optimizer(recipe, epochs, data), data, epochs, seed)


def train_on(recipe: Recipe, dense: Any, data: Images, teacher: np.ndarray, seed: int) -> Any:
    """The control: trains the dense weights on with the teacher. It shows what the teacher alone gives."""
    epochs = recipe.epochs[1]
    tx = optimizer(recipe, epochs, data)
    return lenets.fit(recipe.network.forward, dense, tx, data, epochs, seed + 100, teacher, recipe.by_labels)


def prune(recipe: Recipe, dense: Any, data: Images, teacher: np.ndarray, seed: int) -> Any:
    """Prunes by magnitude, from a tenth to six tenths of the steps."""
    epochs = recipe.epochs[2]
    steps = steps_of(epochs, data)
    rules = {
        f"{layer}/kernel": jw.Prune(
            jw.pruning.PolynomialSparsity(sparsity, steps // 10, 6 * steps // 10, every=max(steps // 50, 1))
        )
        for layer, sparsity in recipe.sparsity.items()
    }
    tx = jw.confine(optimizer(recipe, epochs, data), rules)
    return lenets.fit(recipe.network.forward, dense, tx, data, epochs, seed + 100, teacher, recipe.by_labels)


def share(recipe: Recipe, weights: Any) -> tuple[Any, Any]:
    """({layer: codebook, bias}, {layer: index}): k-means of the weights that are not 0."""
    shared, index = {}, {}
    for layer, w in weights.items():
        codebook, index[layer] = jw.cluster(w["kernel"], recipe.values[layer], start="optimal", keep_zeros=True)
        shared[layer] = {"codebook": codebook, "bias": w["bias"]}
    return shared, index


def looked_up(shared: Any, index: Any) -> Any:
    """The weights of codebooks."""
    return {layer: {"kernel": jw.share(w["codebook"], index[layer]), "bias": w["bias"]} for layer, w in shared.items()}


def retrain(recipe: Recipe, shared: Any, index: Any, data: Images, teacher: np.ndarray, seed: int) -> Any:
    """Trains the codebooks and biases. The gradient of a value is the sum over the weights that share it."""
    epochs = recipe.epochs[3]

    def forward(shared, images):
        return recipe.network.forward(looked_up(shared, index), images)

    tx = optimizer(recipe, epochs, data, 0.25, decay=0.0)
    return lenets.fit(forward, shared, tx, data, epochs, seed + 200, teacher, recipe.by_labels)


def stored(shared: Any, index: Any) -> Any:
    """The weights as they are saved: codes, and codebooks and biases of 16 bits."""
    codebook = lambda w: w["codebook"].astype(jnp.float16)
    return short_biases(
        {
            layer: {"kernel": jw.store_clusters(codebook(w), index[layer], has_zeros=True), "bias": w["bias"]}
            for layer, w in shared.items()
        }
    )


def short_biases(weights: Any) -> Any:
    return {layer: {**w, "bias": w["bias"].astype(jnp.float16)} for layer, w in weights.items()}


def shared_and_retrained(recipe: Recipe, weights: Any, data: Images, teacher: np.ndarray, seed: int) -> Any:
    """Pruned weights as they are saved."""
    shared, index = share(recipe, weights)
    return stored(retrain(recipe, shared, index, data, teacher, seed), index)


def logits_of(network: Network, weights: Any, data: Images) -> np.ndarray:
    """The logits of all images and of their mirror images, in float32: (2, n, classes)."""
    return np.stack([lenets.logits(network.forward, weights, x) for x in (data.images, data.images[:, :, ::-1])])
