"""The optax level: weight decay is a term of the update; clipping and pruning are projections after it.

Trains a linear classifier on scikit-learn's digits. Its weights stay in [-1, 1] and are gradually pruned to 50% zeros.
Both constraints hold exactly after every step, with any optimizer.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import jaxweights as jw

images, labels = load_digits(return_X_y=True)
train_x, test_x, train_y, test_y = train_test_split(images / 16, labels, test_size=0.3, random_state=0)
steps = 400

pruning = optax.polynomial_schedule(0.0, 0.5, power=3, transition_steps=200, transition_begin=100)
tx = optax.chain(
    optax.scale_by_adam(),
    jw.add_weight_decay(0.01),
    optax.scale_by_learning_rate(0.02),
    jw.project(jw.Chain(jw.Prune(pruning), jw.ClipWeights(1.0))),
)
params = {"kernel": jw.xavier_normal(jax.random.key(0), (64, 10)), "bias": jnp.zeros(10)}


def loss(params):
    logits = train_x @ params["kernel"] + params["bias"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, train_y).mean()


@jax.jit
def step(params, state):
    updates, state = tx.update(jax.grad(loss)(params), state, params)
    return optax.apply_updates(params, updates), state


state = tx.init(params)
for i in range(1, steps + 1):
    params, state = step(params, state)
    if i % 50 == 0:
        kernel = params["kernel"]
        zeros, largest = float(jnp.mean(kernel == 0)), float(abs(kernel).max())
        accuracy = float(np.mean(jnp.argmax(test_x @ kernel + params["bias"], -1) == test_y))
        print(f"step {i:3}: zeros {zeros:5.1%}, largest |w| {largest:.4f}, accuracy {accuracy:.1%}")
