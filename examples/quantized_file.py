"""Quantized weights in files: save a model in 4 bits, load it, run it, and hand it to other tools.

The model is a network of two layers on scikit-learn's digits: random features, and a ridge regression on them.
"""

import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_digits

import jaxweights as jw

pixels, labels = load_digits(return_X_y=True)
x = jnp.asarray(pixels / 16, jnp.float32)
folder = Path(tempfile.mkdtemp())


def hidden(params, x):
    return jax.nn.relu(x @ params["hidden"]["kernel"] + params["hidden"]["bias"])


@jax.jit
def model(params, x):
    return hidden(params, x) @ params["head"]["kernel"]


def accuracy(params) -> float:
    return float(np.mean(np.argmax(model(params, x), axis=-1) == labels))


w = jax.random.normal(jax.random.key(0), (64, 512)) / 8
params = {"hidden": {"kernel": w, "bias": jnp.zeros(512)}}
h = hidden(params, x)
params["head"] = {"kernel": jnp.linalg.solve(h.T @ h + 10 * jnp.eye(512), h.T @ np.eye(10)[labels])}

# Integers of 4 bits in blocks of 32, with scales in half precision: what llama.cpp calls Q4_0.
format = jw.formats.integers(4, block=32, scale="float16")
quantized = {name: {**layer, "kernel": jw.quantize(layer["kernel"], format)} for name, layer in params.items()}

print(f"{'file':38}{'bytes':>9}{'accuracy':>10}")
sizes, accuracies = {}, {}
for name, tree in {"float32.safetensors": params, "int4.safetensors": quantized, "int4.gguf": quantized}.items():
    jw.files.save(folder / name, tree)
    loaded = jw.files.load(folder / name)
    if name.endswith(".gguf"):  # a matrix of GGUF is (out, in)
        for layer in loaded.values():
            layer["kernel"] = layer["kernel"].transpose((1, 0))
    sizes[name], accuracies[name] = (folder / name).stat().st_size, accuracy(loaded)
    print(f"{name:38}{sizes[name]:9,}{accuracies[name]:10.1%}")

# The hidden layer as GPTQ stores it, for the tools that read that.
layer = {"hidden": quantized["hidden"]}
jw.files.save(folder / "gptq.safetensors", layer, format="gptq")
print("\nas GPTQ:", ", ".join(jw.files.metadata(folder / "gptq.safetensors")))
weight = jw.files.load(folder / "gptq.safetensors")["hidden"]["weight"]
same = bool(jnp.array_equal(weight.astype(jnp.float32).todense().T, quantized["hidden"]["kernel"].todense()))
print(f"loaded again: {weight.shape}, {weight.nbytes:,} bytes, {'the same weights' if same else 'other weights'}")
