"""Shared by the tests of `jaxweights compress`: a model, and a run of the command."""

import numpy as np

from jaxweights.command.main import main


def torch_like(seed=0, dtype=np.float32):
    """A model as PyTorch names it: matrices (out, in), norms, biases, an embedding, integers."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.normal(size=shape).astype(dtype)

    layers = {
        str(i): {
            "up": {"weight": normal(96, 64), "bias": normal(96)},
            "down": {"weight": normal(64, 96), "bias": normal(64)},
            "norm": {"weight": normal(64)},
        }
        for i in range(2)
    }
    return {"embed_tokens": {"weight": normal(40, 64)}, "layers": layers, "ids": np.arange(12).reshape(1, 12)}


def compress(*arguments):
    return main(["compress", *map(str, arguments)])
