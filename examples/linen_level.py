"""The Linen level: a module that computes with transformed weights and stores the plain ones.

The state of the transform (here singular vectors) lives in its own collection. Parameter names do not change, so a
checkpoint of the plain module loads into the wrapped one.
"""

import flax.linen as nn
import jax
import numpy as np
import optax
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import jaxweights as jw

images, labels = load_digits(return_X_y=True)
train_x, test_x, train_y, test_y = train_test_split(images / 4 - 2, labels, test_size=0.3, random_state=0)

mlp = nn.Sequential([nn.Dense(64, kernel_init=jw.he_normal), jw.linen.LayerNorm(), nn.relu, nn.Dense(10)])
model = jw.linen.Transformed(mlp, {"layers_0/kernel": jw.SpectralNorm(), "layers_3/kernel": jw.WeightNorm()})
variables = model.init(jax.random.key(0), train_x)
params, state = variables["params"], {"weight_transform": variables["weight_transform"]}
print("parameters: ", jax.tree.map(np.shape, params))
print("state:      ", jax.tree.map(np.shape, state))

tx = optax.adam(3e-3)


@jax.jit
def step(params, state, tx_state):
    def loss(params):
        logits, new = model.apply({"params": params, **state}, train_x, mutable=["weight_transform"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, train_y).mean(), new

    (value, state), grads = jax.value_and_grad(loss, has_aux=True)(params)
    updates, tx_state = tx.update(grads, tx_state, params)
    return optax.apply_updates(params, updates), state, tx_state, value


tx_state = tx.init(params)
for i in range(1, 201):
    params, state, tx_state, value = step(params, state, tx_state)
    if i % 50 == 0:
        accuracy = float(np.mean(model.apply({"params": params, **state}, test_x).argmax(-1) == test_y))
        print(f"step {i:3}: loss {value:.3f}, test accuracy {accuracy:.1%}")

w, vectors = params["layers_0"]["kernel"], state["weight_transform"]["layers_0"]["kernel"]
stored = float(jw.spectral_norm(w))
used = float(jw.spectral_norm(jw.SpectralNorm().apply(w, vectors)))
print(f"σ of the first kernel: {stored:.3f} as stored, {used:.3f} as the model computes with it")
