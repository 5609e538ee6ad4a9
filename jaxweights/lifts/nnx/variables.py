"""What the NNX modules share: parameters that may be left out."""

from __future__ import annotations

import jax
from flax import nnx


def value(variable: nnx.Variable | None) -> jax.Array | None:
    """The array of a parameter, None where the module has none."""
    return None if variable is None else variable[...]
