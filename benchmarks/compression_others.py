"""Other ways to a small network, with the coder of Deep Compression: 2:4, RigL, GPTQ and mixed bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import compression_stages as stages
import jax
import lenets
import numpy as np
import optax
from compression_stages import Recipe
from lenets import Images

import jaxweights as jw

CALIBRATED = 10_000


def two_of_four(recipe: Recipe, dense: Any, data: Images, teacher: np.ndarray, seed: int) -> Any:
    """Keeps 2 of every 4 inputs by magnitude, and trains on within the mask; then clusters."""
    epochs = recipe.epochs[2]
    tx = jw.confine(stages.optimizer(recipe, epochs, data), jw.Prune((2, 4)), where="*/kernel")
    pruned = lenets.fit(recipe.network.forward, dense, tx, data, epochs, seed + 100, teacher, recipe.by_labels)
    return stages.shared_and_retrained(recipe, pruned, data, teacher, seed)


def rigl(recipe: Recipe, dense: Any, data: Images, teacher: np.ndarray, seed: int) -> Any:
    """Trains with few weights from the start, for as many epochs as dense training and pruning; then clusters."""
    epochs = recipe.epochs[0] + recipe.epochs[2]
    fraction = optax.cosine_decay_schedule(0.3, int(0.75 * stages.steps_of(epochs, data)))
    rules = {
        f"{layer}/kernel": jw.Regrow(jw.Prune(sparsity, score=jw.scores.random), fraction=fraction)
        for layer, sparsity in recipe.sparsity.items()
    }
    tx = jw.confine(stages.optimizer(recipe, epochs, data), rules)
    first = recipe.network.init(jax.random.key(seed))
    sparse = lenets.fit(recipe.network.forward, first, tx, data, epochs, seed, teacher, recipe.by_labels)
    return stages.shared_and_retrained(recipe, sparse, data, teacher, seed)


def batches(data: Images) -> list[np.ndarray]:
    """The images that the methods with data see."""
    return [data.images[i : i + 1000] for i in range(0, min(len(data.images), CALIBRATED), 1000)]


def one_shot(recipe: Recipe, weights: Any, data: Images, method: Any) -> Any:
    """Stores weights by a method with data, without training."""
    return stages.short_biases(jw.compress(recipe.network.forward, weights, batches(data), method))


def gptq(bits: int) -> jw.methods.GPTQ:
    return jw.methods.GPTQ(jw.formats.integers(bits, scale="float16"), range=jw.ranges.MSE())


def mixed(recipe: Recipe, dense: Any, data: Images, bits: float) -> Any:
    """Rounds by GPTQ with the bits of each layer chosen so that the logits change least."""
    candidates = [gptq(n) for n in (2, 3, 4, 5, 6)]
    found = jw.mixed_bits(recipe.network.forward, dense, batches(data)[:1], candidates, bits=bits)
    return one_shot(recipe, dense, data, found.rules)


def ways(
    recipe: Recipe, dense: Any, pruned: Any, data: Images, teacher: np.ndarray, seed: int
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The names of the ways, each with the function that makes the stored weights."""
    yield "2:4, 8 values, codebooks trained", lambda: two_of_four(recipe, dense, data, teacher, seed)
    yield "RigL, 8 values, codebooks trained", lambda: rigl(recipe, dense, data, teacher, seed)
    for bits in (4, 3, 2):
        yield f"GPTQ, {bits} bits", lambda bits=bits: one_shot(recipe, dense, data, gptq(bits))
    yield "mixed bits by GPTQ, 3 on average", lambda: mixed(recipe, dense, data, 3.0)
    for bits in (4, 3):
        yield f"pruned, GPTQ, {bits} bits", lambda bits=bits: one_shot(recipe, pruned, data, gptq(bits))
