"""Tie a head to its embedding and all layers to one, and train, optimize and save each weight once.

The model reads 8 letters of the descriptions of scikit-learn's data sets, and guesses the next one.
"""

import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn import datasets

import jaxweights as jw

CONTEXT, WIDTH, DEPTH, STEPS = 8, 64, 4, 600

texts = [load().DESCR for load in (datasets.load_iris, datasets.load_wine, datasets.load_breast_cancer)]
letters, codes = np.unique(list("".join(texts)), return_inverse=True)
windows = np.lib.stride_tricks.sliding_window_view(codes, CONTEXT + 1)
held_out = np.arange(len(windows)) // 100 % 10 == 9  # every tenth hundred of letters
train, test = windows[~held_out], windows[held_out]


def init(key):
    sizes = {"mix": (CONTEXT * WIDTH, WIDTH), **{f"layer_{i}": (WIDTH, WIDTH) for i in range(DEPTH)}}
    params = {"embed": {"table": (len(letters), WIDTH)}, "head": {"kernel": (WIDTH, len(letters))}}
    params |= {name: {"kernel": size, "bias": size[1:]} for name, size in sizes.items()}
    sizes, treedef = jax.tree.flatten(params, lambda x: isinstance(x, tuple))
    keys = jax.random.split(key, len(sizes))
    draw = lambda key, size: jax.random.normal(key, size) * (len(size) - 1) / size[0] ** 0.5
    return treedef.unflatten(map(draw, keys, sizes))


def loss(params, batch):
    dense = lambda name, h: jax.nn.relu(h @ params[name]["kernel"] + params[name]["bias"])
    h = dense("mix", params["embed"]["table"][batch[:, :-1]].reshape(len(batch), -1))
    for i in range(DEPTH):
        h = h + dense(f"layer_{i}", h)
    h = h / jnp.sqrt(jnp.mean(h**2, -1, keepdims=True) + 1e-6)
    logits = h @ params["head"]["kernel"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, -1]).mean()


head = {"head/kernel": "embed/table"}  # (letters, WIDTH) at (WIDTH, letters): its transpose
layers = {f"layer_{i}": "layer_0" for i in range(1, DEPTH)}  # subtrees: kernel to kernel, bias to bias
ways = {"nothing tied": {}, "head tied": head, "head and layers tied": head | layers}
size = lambda tree: sum(a.nbytes for a in jax.tree.leaves(tree))
results = {}

print(f"{'':22}{'weights':>10}{'Adam, bytes':>14}{'file, bytes':>14}{'loss':>8}")
for name, ties in ways.items():
    params = init(jax.random.key(0))
    free, whole = jw.untie(params, ties) if ties else (params, lambda free: free)
    tx = optax.adam(optax.cosine_decay_schedule(2e-3, STEPS))

    @jax.jit
    def step(free, state, key, whole=whole, tx=tx):
        batch = jnp.asarray(train)[jax.random.randint(key, (128,), 0, len(train))]
        updates, state = tx.update(jax.grad(lambda free: loss(whole(free), batch))(free), state, free)
        return optax.apply_updates(free, updates), state

    state = tx.init(free)
    for key in jax.random.split(jax.random.key(1), STEPS):
        free, state = step(free, state, key)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        jw.files.save(path, free)
        loaded = whole(jw.files.load(path))  # every weight in each of its places
        n, saved = size(free) // 4, path.stat().st_size
    results[name] = n, size(state), saved, float(loss(loaded, test))
    print(f"{name:22}{n:10,}{results[name][1]:14,}{saved:14,}{results[name][3]:8.3f}")
