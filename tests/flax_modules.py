"""Shared Flax helpers: stacks made by `nn.scan`, and random parameters for any module."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

KEY = jax.random.key(0)


def random_params(module, x_shape):
    """Random parameters with the shapes of the Linen module's own `init`."""
    rng = np.random.default_rng(0)
    draw = lambda s: jnp.asarray(rng.normal(size=s.shape), s.dtype)
    return jax.tree.map(draw, jax.eval_shape(module.init, KEY, jnp.zeros(x_shape)))["params"]


class Layer(nn.Module):
    kind: str = "dense"

    @nn.compact
    def __call__(self, x, _=None):
        if self.kind == "dense":
            x = nn.Dense(x.shape[-1], name="d")(x)
        elif self.kind == "conv":
            x = nn.Conv(x.shape[-1], (2,), name="d")(x)
        elif self.kind == "general":
            x = nn.DenseGeneral((3, 2), name="d")(x).reshape(*x.shape[:-1], 6)
        else:
            x = nn.MultiHeadDotProductAttention(2, name="a")(x)
        return x, None


def scanned(kind="dense", length=5, axis=0):
    return nn.scan(Layer, variable_axes={"params": axis}, split_rngs={"params": True}, length=length)(kind)
