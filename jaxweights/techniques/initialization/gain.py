"""Gains: factors of initial weights that make up for the effect of an activation on the size of activations."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxweights.core.checks import check_choice

_CUSTOMARY = {"linear": 1.0, "sigmoid": 1.0, "tanh": 5 / 3, "relu": math.sqrt(2), "selu": 3 / 4}


def gain(activation: Callable[[jax.Array], jax.Array] | str) -> float:
    """The factor of weights that preserves the size of activations: 1/√E[f(z)²], f the activation, z ~ N(0, 1).

    It is computed for a function. A name gives the customary value of torch's `calculate_gain`, which differs from the
    formula for tanh, sigmoid and SELU:

    | activation | by name | by function |
    | --- | --- | --- |
    | linear | 1 | 1 |
    | relu | √2 | √2 |
    | leaky_relu | | √(2/(1 + slope²)) |
    | tanh | 5/3 | 1.5925 |
    | sigmoid | 1 | 1.8462 |
    | selu | 3/4 | 1 |
    | gelu | | 1.5335 |
    | silu | | 1.6765 |

    Args:
      activation: an elementwise function of arrays, such as `jax.nn.gelu`, or one of the names in the table.

    Returns:
      The gain, a number: `functools.partial(jaxweights.xavier_normal, gain=gain(jax.nn.gelu))`.

    Raises:
      TypeError: `activation` is neither a function nor a string.
      ValueError: the name is not in the table, or E[f(z)²] is 0 or not finite.

    >>> import jax
    >>> print(round(gain(jax.nn.relu), 4), round(gain(lambda x: jax.nn.leaky_relu(x, 0.2)), 4))
    1.4142 1.3868
    >>> print(round(gain("tanh"), 4), round(gain(jnp.tanh), 4))
    1.6667 1.5925

    References: He, Zhang, Ren and Sun, Delving Deep into Rectifiers, arXiv:1502.01852, 2015.
    """
    if isinstance(activation, str):
        check_choice("activation", activation, tuple(_CUSTOMARY))
        return _CUSTOMARY[activation]
    if not callable(activation):
        raise TypeError(f"activation must be a function or a name, got {activation!r}: pass one such as jax.nn.gelu")
    # The trapezoidal rule on a grid through 0, where activations have kinks: accurate to float32 for the table.
    z = np.linspace(-12, 12, 24001)
    # Compiled separately, so the gain is a number under jit too.
    computed = jax.jit(activation).lower(jax.ShapeDtypeStruct(z.shape, jnp.float32)).compile()
    f = np.asarray(computed(z.astype(np.float32)), np.float64)
    square = np.sum(f**2 * np.exp(-(z**2) / 2)) / np.sum(np.exp(-(z**2) / 2))
    if not (math.isfinite(square) and square > 0):
        raise ValueError(f"activation {activation!r} has E[f(z)²] = {square}: it has no gain")
    return float(square**-0.5)
