"""Gains: factors of initial weights that make up for the effect of an activation on the size of activations."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jaxweights.core.checks import check_choice, check_scalar

_LINEAR = ("linear", *(f"{kind}{n}d" for kind in ("conv", "conv_transpose") for n in (1, 2, 3)))
_CUSTOMARY = dict.fromkeys(_LINEAR, 1.0) | {"sigmoid": 1.0, "tanh": 5 / 3, "relu": math.sqrt(2), "selu": 3 / 4}
_COMPUTED = (  # of jax.nn, under the names of Flax
    *("celu", "elu", "gelu", "hard_sigmoid", "hard_silu", "hard_swish", "hard_tanh", "identity", "log_sigmoid"),
    *("mish", "relu6", "silu", "soft_sign", "softplus", "sparse_plus", "squareplus", "swish"),
)


def gain(activation: Callable[[jax.Array], jax.Array] | str, slope: float | None = None) -> float:
    """The factor of weights that preserves the size of activations: 1/√E[f(z)²], f the activation, z ~ N(0, 1).

    It is computed for a function. A name that torch's `calculate_gain` knows gives the customary value, which differs
    from the formula for tanh, sigmoid and SELU. Any other name of an activation of Flax stands for the function:

    | activation | by name | by function |
    | --- | --- | --- |
    | linear, conv1d ... conv_transpose3d | 1 | 1 |
    | relu | √2 | √2 |
    | leaky_relu | √(2/(1 + slope²)) | √(2/(1 + slope²)) |
    | tanh | 5/3 | 1.5925 |
    | sigmoid | 1 | 1.8462 |
    | selu | 3/4 | 1 |
    | gelu | 1.5336 | 1.5336 |
    | silu, swish | 1.6765 | 1.6765 |

    Args:
      activation: an elementwise function of arrays, such as `jax.nn.gelu`, or a name, such as "gelu".
      slope: the negative slope of "leaky_relu", 0.01 by default. No other activation takes one.

    Returns:
      The gain, a number: `functools.partial(jaxweights.xavier_normal, gain=gain("gelu"))`.

    Raises:
      TypeError: `activation` is neither a function nor a string, or `slope` is not a number.
      ValueError: the name is unknown, `slope` is given for another activation, or E[f(z)²] is 0 or not finite.

    >>> import jax
    >>> print(round(gain("relu"), 4), round(gain("leaky_relu", 0.2), 4), round(gain("gelu"), 4))
    1.4142 1.3868 1.5336
    >>> print(round(gain("tanh"), 4), round(gain(jnp.tanh), 4))
    1.6667 1.5925

    References: He, Zhang, Ren and Sun, Delving Deep into Rectifiers, arXiv:1502.01852, 2015.
    """
    if slope is not None and activation != "leaky_relu":
        raise ValueError(f'slope belongs to "leaky_relu", got it for {activation!r}: leave it out')
    if activation == "leaky_relu":
        slope = 0.01 if slope is None else slope
        check_scalar("slope", slope)
        return math.sqrt(2 / (1 + slope**2))
    if isinstance(activation, str):
        check_choice("activation", activation, (*_CUSTOMARY, "leaky_relu", *_COMPUTED))
        if activation in _CUSTOMARY:
            return _CUSTOMARY[activation]
        activation = getattr(jax.nn, activation)
    if not callable(activation):
        raise TypeError(f"activation must be a function or a name, got {activation!r}: pass one such as jax.nn.gelu")
    # The trapezoidal rule on a grid through 0, where activations have kinks: accurate to float32 for the table.
    z = np.linspace(-12, 12, 24001)
    # Compiled separately, so the gain is a number under jit too.
    with jax.disable_jit(False):
        computed = jax.jit(activation).lower(jax.ShapeDtypeStruct(z.shape, jnp.float32)).compile()
        f = np.asarray(computed(z.astype(np.float32)), np.float64)
    square = np.sum(f**2 * np.exp(-(z**2) / 2)) / np.sum(np.exp(-(z**2) / 2))
    if not (math.isfinite(square) and square > 0):
        raise ValueError(f"activation {activation!r} has E[f(z)²] = {square}: it has no gain")
    return float(square**-0.5)
