"""Weight sharing by place: a classifier that gives a digit the same logits however it is turned.

An ordinary network, whose kernels are shared over rotations by 90 degrees. It is trained on upright digits alone.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import jaxweights as jw

images, labels = load_digits(return_X_y=True)
images = np.float32(images.reshape(-1, 8, 8, 1) / 16)
train_x, test_x, train_y, test_y = train_test_split(images, labels, train_size=512, random_state=0)


class CNN(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4 * 4, (3, 3), use_bias=False, name="lift")(x))
        x = nn.relu(nn.Conv(4 * 8, (3, 3), use_bias=False, name="conv")(x))
        x = x.reshape(*x.shape[:-1], 4, 8).max((1, 2, 3))  # over all positions and the four poses
        return nn.Dense(10)(x)


lift, conv = jw.sharing.GroupConvolution("p4", lifts=True), jw.sharing.GroupConvolution("p4")
shared = {"lift/kernel": jw.ShareWeights(lift), "conv/kernel": jw.ShareWeights(conv)}
tx, logits = optax.adam(1e-2), {}
for name, model in {"plain": CNN(), "equivariant": jw.linen.Transformed(CNN(), shared)}.items():
    fixed = model.init(jax.random.key(0), train_x[:1])
    params = fixed.pop("params")

    def loss(params, x, y, model=model, fixed=fixed):
        logits = model.apply({"params": params, **fixed}, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    @jax.jit
    def step(params, tx_state, x, y, loss=loss):
        updates, tx_state = tx.update(jax.grad(loss)(params, x, y), tx_state, params)
        return optax.apply_updates(params, updates), tx_state

    tx_state = tx.init(params)
    for i in range(120):
        batch = slice(i % 8 * 64, i % 8 * 64 + 64)
        params, tx_state = step(params, tx_state, train_x[batch], train_y[batch])
    turned = [np.rot90(test_x, turns, (1, 2)) for turns in range(4)]
    logits[name] = [model.apply({"params": params, **fixed}, x) for x in turned]
    accuracies = [f"{float(jnp.mean(y.argmax(-1) == test_y)):.1%}" for y in logits[name]]
    print(f"{name:12} accuracy on digits turned by 0°, 90°, 180°, 270°: {', '.join(accuracies)}")
