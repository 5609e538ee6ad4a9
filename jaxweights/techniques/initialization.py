"""Weight initialization: the scale of random weights, from the fans of the layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from jaxweights.axes import Axes, fans
from jaxweights.numerics import wide

_TRUNCATED_STD = 0.87962566103423978  # standard deviation of a normal distribution cut at ±2
Initializer = Callable[..., jax.Array]


def xavier_normal(
    key: jax.Array,
    shape: Sequence[int],
    dtype=jnp.float32,
    *,
    axes: Axes | None = None,
    truncated: bool = False,
) -> jax.Array:
    """Glorot's normal initialization: N(0, 2/(n_in + n_out)).

    Args:
      key: a `jax.random` key.
      shape: shape of the weight, of at least one axis.
      dtype: floating dtype.
      axes: how the weight is read as a matrix; (..., in, out) by default. Batch axes do not count as fans.
      truncated: cut at two standard deviations, and widen so that the variance stays.

    Returns:
      Array of the given shape and dtype.

    Raises:
      TypeError: `dtype` is not a real floating dtype.
      ValueError: `axes` does not fit, or a fan is zero.

    >>> import jax
    >>> round(float(xavier_normal(jax.random.key(0), (300, 500)).std()), 2)       # √(2/800)
    0.05

    References: Glorot and Bengio, Understanding the difficulty of training deep feedforward neural networks,
    AISTATS 2010.
    """
    n_in, n_out = _checked_fans(shape, axes)
    return _normal(key, shape, dtype, math.sqrt(2 / (n_in + n_out)), truncated)


def xavier_uniform(key: jax.Array, shape: Sequence[int], dtype=jnp.float32, *, axes: Axes | None = None) -> jax.Array:
    """Glorot's uniform initialization: U(−a, a), a = √(6/(n_in + n_out)). Arguments as `xavier_normal`.

    >>> import jax
    >>> round(float(abs(xavier_uniform(jax.random.key(0), (300, 300))).max()), 2)       # √(6/600)
    0.1

    References: Glorot and Bengio, AISTATS 2010.
    """
    n_in, n_out = _checked_fans(shape, axes)
    return _uniform(key, shape, dtype, math.sqrt(2 / (n_in + n_out)))


def he_normal(
    key: jax.Array,
    shape: Sequence[int],
    dtype=jnp.float32,
    *,
    axes: Axes | None = None,
    truncated: bool = False,
) -> jax.Array:
    """He's normal initialization, for layers before a ReLU: N(0, 2/n_in). Arguments as `xavier_normal`.

    >>> import jax
    >>> round(float(he_normal(jax.random.key(0), (800, 500)).std()), 2)       # √(2/800)
    0.05

    References: He, Zhang, Ren and Sun, Delving Deep into Rectifiers, arXiv:1502.01852, 2015.
    """
    n_in, _ = _checked_fans(shape, axes)
    return _normal(key, shape, dtype, math.sqrt(2 / n_in), truncated)


def he_uniform(key: jax.Array, shape: Sequence[int], dtype=jnp.float32, *, axes: Axes | None = None) -> jax.Array:
    """He's uniform initialization: U(−a, a), a = √(6/n_in). Arguments as `xavier_normal`.

    >>> import jax
    >>> round(float(abs(he_uniform(jax.random.key(0), (600, 300))).max()), 2)       # √(6/600)
    0.1

    References: He, Zhang, Ren and Sun, arXiv:1502.01852, 2015.
    """
    n_in, _ = _checked_fans(shape, axes)
    return _uniform(key, shape, dtype, math.sqrt(2 / n_in))


def lecun_normal(
    key: jax.Array,
    shape: Sequence[int],
    dtype=jnp.float32,
    *,
    axes: Axes | None = None,
    truncated: bool = False,
) -> jax.Array:
    """LeCun's normal initialization: N(0, 1/n_in). Arguments as `xavier_normal`.

    >>> import jax
    >>> round(float(lecun_normal(jax.random.key(0), (400, 500)).std()), 2)       # √(1/400)
    0.05

    References: LeCun, Bottou, Orr and Müller, Efficient BackProp, 1998; Klambauer et al., Self-Normalizing Neural
    Networks, arXiv:1706.02515, 2017.
    """
    n_in, _ = _checked_fans(shape, axes)
    return _normal(key, shape, dtype, math.sqrt(1 / n_in), truncated)


def lecun_uniform(key: jax.Array, shape: Sequence[int], dtype=jnp.float32, *, axes: Axes | None = None) -> jax.Array:
    """LeCun's uniform initialization: U(−a, a), a = √(3/n_in). Arguments as `xavier_normal`.

    >>> import jax
    >>> round(float(abs(lecun_uniform(jax.random.key(0), (300, 300))).max()), 2)       # √(3/300)
    0.1

    References: LeCun, Bottou, Orr and Müller, Efficient BackProp, 1998.
    """
    n_in, _ = _checked_fans(shape, axes)
    return _uniform(key, shape, dtype, math.sqrt(1 / n_in))


def _checked_fans(shape: Sequence[int], axes: Axes | None) -> tuple[int, int]:
    n_in, n_out = fans(shape, axes)
    if n_in == 0 or n_out == 0:
        raise ValueError(f"shape {tuple(shape)} has fans {n_in} and {n_out}: a weight without inputs has no scale")
    return n_in, n_out


def _normal(key, shape, dtype, std: float, truncated: bool) -> jax.Array:
    dtype = _checked_dtype(dtype)
    draw_dtype = wide(dtype)
    if truncated:
        draw = jax.random.truncated_normal(key, -2, 2, shape, draw_dtype) * (std / _TRUNCATED_STD)
    else:
        draw = jax.random.normal(key, shape, draw_dtype) * std
    return draw.astype(dtype)


def _uniform(key, shape, dtype, std: float) -> jax.Array:
    dtype = _checked_dtype(dtype)
    limit = math.sqrt(3) * std
    return jax.random.uniform(key, shape, wide(dtype), -limit, limit).astype(dtype)


def _checked_dtype(dtype) -> jnp.dtype:
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"dtype must be a real floating dtype, got {dtype}: use jnp.float32")
    return jnp.dtype(dtype)
