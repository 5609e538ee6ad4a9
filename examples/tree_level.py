"""The tree level: apply a technique to the weights of a whole network, selected by path.

The network was trained by scikit-learn on its digits: jaxweights works on any tree of arrays.
"""

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier

import jaxweights as jw

images, labels = load_digits(return_X_y=True)
train_x, test_x, train_y, test_y = train_test_split(images / 16, labels, test_size=0.3, random_state=0)
trained = MLPClassifier(64, early_stopping=True, random_state=0).fit(train_x, train_y)
layers = zip(trained.coefs_, trained.intercepts_, strict=True)
hidden, head = ({"kernel": jnp.float32(kernel), "bias": jnp.float32(bias)} for kernel, bias in layers)
params = {"hidden": hidden, "head": head}


def accuracy(params) -> float:
    h = jax.nn.relu(test_x @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    logits = h @ params["head"]["kernel"] + params["head"]["bias"]
    return float(np.mean(logits.argmax(-1) == test_y))


lifts = {
    "4 bits": jw.on_tree(jw.FakeQuantize(4)),
    "16 values": jw.on_tree(jw.ShareWeights(16)),
    "50% pruned": jw.on_tree(jw.Prune(0.5)),
    "50% pruned, but the head in 4 bits": jw.on_tree({"head/kernel": jw.FakeQuantize(4), "**/kernel": jw.Prune(0.5)}),
    "4 bits, then 50% pruned": jw.on_tree(jw.Chain(jw.FakeQuantize(4), jw.Prune(0.5))),
}
accuracies = {"as trained": accuracy(params)}
print(f"{'as trained':36} accuracy {accuracies['as trained']:.1%}")
for name, lifted in lifts.items():
    state = lifted.init(params, jax.random.key(0))
    new = lifted.apply(params, state)
    accuracies[name] = accuracy(new)
    zeros = {path: f"{float(jnp.mean(new[path]['kernel'] == 0)):.0%}" for path in new}
    print(f"{name:36} accuracy {accuracies[name]:.1%}, zeros {zeros}")

stored = jax.tree.map(lambda a: jw.quantize(a, 8) if a.ndim == 2 else a, params)
size = lambda tree: sum(a.nbytes for a in jax.tree.leaves(tree))
print(f"\n8 bits stored: {size(stored):,} bytes for {size(params):,}")

try:
    jw.on_tree(jw.FakeQuantize(4), where="**/weight").init(params, jax.random.key(0))
except ValueError as error:
    print(f"\nA path that is not there is an error:\n  {error}")
