"""The NNX level: a module of the same class that computes with transformed weights and stores the plain ones.

Trains with weights on a grid of 16 values (4 bits): the forward pass rounds, the gradient is straight-through, and the
parameters stay in float32.
"""

import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import jaxweights as jw

images, labels = load_digits(return_X_y=True)
train_x, test_x, train_y, test_y = train_test_split(np.float32(images / 4 - 2), labels, test_size=0.3, random_state=0)


class MLP(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.hidden = nnx.Linear(64, 64, kernel_init=jw.he_normal, rngs=rngs)
        self.norm = jw.nnx.BatchNorm(64, momentum=0.9)
        self.head = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.norm(self.hidden(x))))

    def kernel(self):
        """Returns the hidden kernel. Methods see the transformed weights."""
        return self.hidden.kernel[...]


model = jw.nnx.transformed(MLP(rngs=nnx.Rngs(0)), jw.FakeQuantize(4))
print(f"{type(model).__name__} is an MLP: {isinstance(model, MLP)}")
optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)


@nnx.jit
def step(model, optimizer):
    def loss(model):
        return optax.softmax_cross_entropy_with_integer_labels(model(train_x), train_y).mean()

    value, grads = nnx.value_and_grad(loss)(model)
    optimizer.update(model, grads)
    return value


for i in range(1, 151):
    model.train()
    value = step(model, optimizer)
    if i % 50 == 0:
        model.eval()
        accuracy = float(np.mean(model(test_x).argmax(-1) == test_y))
        print(f"step {i:3}: loss {value:.3f}, test accuracy {accuracy:.1%}")

stored, used = np.unique(model.hidden.kernel[...]).size, np.unique(model.kernel()).size
print(f"values of the hidden kernel: {stored:,} as stored, {used} as the model computes with them")
