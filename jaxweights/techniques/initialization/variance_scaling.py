"""Variance scaling: random weights whose variance follows from the fans of the layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from jaxweights.core.axes import Axes, fans
from jaxweights.core.checks import check_choice, check_scalar
from jaxweights.core.transform import Number
from jaxweights.techniques.initialization.distributions import normal, truncated_normal, uniform

Initializer = Callable[..., jax.Array]
"""`(key, shape, dtype) -> array`. If it has a parameter `axes`, it receives the axes that follow from the tree."""

_TRUNCATED_STD = 0.87962566103423978  # standard deviation of N(0, 1) truncated at ±2
Mode = Literal["fan_in", "fan_out", "fan_avg", "fan_geo_avg"]
Distribution = Literal["normal", "truncated_normal", "uniform"]


def variance_scaling(
    key: jax.Array,
    shape: Sequence[int],
    dtype=jnp.float32,
    *,
    axes: Axes | None = None,
    scale: Number = 1.0,
    mode: Mode = "fan_in",
    distribution: Distribution = "normal",
) -> jax.Array:
    """Random weights of mean 0 and variance scale / n, where n is a fan of the layer or a mean of both fans.

    `xavier_normal`, `he_normal` and `lecun_normal` are special cases.

    `jaxweights.axes.fans` computes the fans. A kernel (*window, 1, out) has n_in = Πwindow, whether depthwise or not.
    Its n_out, which Xavier and "fan_out" use, is out·Πwindow, but out/groups·Πwindow in a depthwise convolution. The
    shape does not distinguish the two: for a depthwise kernel, pass `axes=jaxweights.axes.depthwise(groups)`.

    Args:
      key: a `jax.random` key.
      shape: shape of the weight, with at least one axis.
      dtype: floating dtype. 16-bit values are rounded from a draw in float32.
      axes: how the weight is read as a matrix; (..., in, out) by default. Batch axes do not count as fans.
      scale: the variance times n, at least 0.
      mode: the n to use: "fan_in" (n_in, preserves the size of activations), "fan_out" (n_out, preserves the size of
        gradients), "fan_avg" or "fan_geo_avg" (the arithmetic or geometric mean of both).
      distribution: "normal"; "truncated_normal": truncated at two standard deviations, then rescaled to the same
        variance; "uniform": U(−a, a), a² = 3·scale/n.

    Returns:
      Array of the given shape and dtype.

    Raises:
      TypeError: `dtype` is not a real floating dtype, or `scale` is not a number.
      ValueError: `axes` does not fit, a fan is zero, or `scale` is negative.

    >>> import jax
    >>> kernel = variance_scaling(jax.random.key(0), (3, 3, 64, 128), scale=2.0, mode="fan_out")
    >>> print(f"{kernel.std():.3f}")       # √(2/(9·128))
    0.042

    References: Glorot and Bengio, Understanding the difficulty of training deep feedforward neural networks,
    AISTATS 2010; He, Zhang, Ren and Sun, Delving Deep into Rectifiers, arXiv:1502.01852, 2015.
    """
    check_scalar("scale", scale, 0)
    check_choice("mode", mode, get_args(Mode))
    check_choice("distribution", distribution, get_args(Distribution))
    n_in, n_out = fans(shape, axes)
    if n_in == 0 or n_out == 0:
        raise ValueError(f"shape {tuple(shape)} has fans {n_in} and {n_out}: a weight without inputs has no scale")
    std = (scale / _fan(mode, n_in, n_out)) ** 0.5
    if distribution == "normal":
        return normal(key, shape, dtype, std=std)
    if distribution == "truncated_normal":
        return truncated_normal(key, shape, dtype, std=std / _TRUNCATED_STD)
    limit = math.sqrt(3) * std
    return uniform(key, shape, dtype, low=-limit, high=limit)


def xavier_normal(
    key: jax.Array,
    shape: Sequence[int],
    dtype=jnp.float32,
    *,
    axes: Axes | None = None,
    gain: Number = 1.0,
    truncated: bool = False,
) -> jax.Array:
    """Glorot's normal initialization: N(0, gain²·2/(n_in + n_out)).

    Args:
      key: a `jax.random` key.
      shape: shape of the weight, with at least one axis.
      dtype: floating dtype. 16-bit values are rounded from a draw in float32.
      axes: how the weight is read as a matrix; (..., in, out) by default. Batch axes do not count as fans.
      gain: factor for the activation that follows: see `jaxweights.initializers.gain`.
      truncated: whether to truncate at two standard deviations, then rescale to the same variance.

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
    check_scalar("gain", gain)
    return variance_scaling(
        key, shape, dtype, axes=axes, scale=gain**2, mode="fan_avg", distribution=_normal(truncated)
    )


def xavier_uniform(
    key: jax.Array, shape: Sequence[int], dtype=jnp.float32, *, axes: Axes | None = None, gain: Number = 1.0
) -> jax.Array:
    """Glorot's uniform initialization: U(−a, a), a = gain·√(6/(n_in + n_out)). Arguments as in `xavier_normal`.

    >>> import jax
    >>> round(float(abs(xavier_uniform(jax.random.key(0), (300, 300))).max()), 2)       # √(6/600)
    0.1

    References: Glorot and Bengio, AISTATS 2010.
    """
    check_scalar("gain", gain)
    return variance_scaling(key, shape, dtype, axes=axes, scale=gain**2, mode="fan_avg", distribution="uniform")


def he_normal(
    key: jax.Array,
    shape: Sequence[int],
    dtype=jnp.float32,
    *,
    axes: Axes | None = None,
    mode: Mode = "fan_in",
    negative_slope: Number = 0.0,
    truncated: bool = False,
) -> jax.Array:
    """He's normal initialization, for layers before a (leaky) ReLU: N(0, 2/((1 + negative_slope²)·n_in)).

    Args:
      key: as in `xavier_normal`, and so are the arguments that are not listed here.
      mode: "fan_in", which preserves the size of activations, or "fan_out", which uses n_out and preserves the size of
        gradients. For the others see `variance_scaling`.
      negative_slope: slope of the leaky ReLU.

    >>> import jax
    >>> round(float(he_normal(jax.random.key(0), (800, 500)).std()), 2)       # √(2/800)
    0.05

    References: He, Zhang, Ren and Sun, Delving Deep into Rectifiers, arXiv:1502.01852, 2015.
    """
    check_scalar("negative_slope", negative_slope)
    scale = 2 / (1 + negative_slope**2)
    return variance_scaling(key, shape, dtype, axes=axes, scale=scale, mode=mode, distribution=_normal(truncated))


def he_uniform(
    key: jax.Array,
    shape: Sequence[int],
    dtype=jnp.float32,
    *,
    axes: Axes | None = None,
    mode: Mode = "fan_in",
    negative_slope: Number = 0.0,
) -> jax.Array:
    """He's uniform initialization: U(−a, a), a = √(6/((1 + negative_slope²)·n_in)). Arguments as in `he_normal`.

    >>> import jax
    >>> round(float(abs(he_uniform(jax.random.key(0), (600, 300))).max()), 2)       # √(6/600)
    0.1

    References: He, Zhang, Ren and Sun, arXiv:1502.01852, 2015.
    """
    check_scalar("negative_slope", negative_slope)
    scale = 2 / (1 + negative_slope**2)
    return variance_scaling(key, shape, dtype, axes=axes, scale=scale, mode=mode, distribution="uniform")


def lecun_normal(
    key: jax.Array,
    shape: Sequence[int],
    dtype=jnp.float32,
    *,
    axes: Axes | None = None,
    truncated: bool = False,
) -> jax.Array:
    """LeCun's normal initialization: N(0, 1/n_in). Arguments as in `xavier_normal`.

    >>> import jax
    >>> round(float(lecun_normal(jax.random.key(0), (400, 500)).std()), 2)       # √(1/400)
    0.05

    References: LeCun, Bottou, Orr and Müller, Efficient BackProp, 1998; Klambauer et al., Self-Normalizing Neural
    Networks, arXiv:1706.02515, 2017.
    """
    return variance_scaling(key, shape, dtype, axes=axes, distribution=_normal(truncated))


def lecun_uniform(key: jax.Array, shape: Sequence[int], dtype=jnp.float32, *, axes: Axes | None = None) -> jax.Array:
    """LeCun's uniform initialization: U(−a, a), a = √(3/n_in). Arguments as in `xavier_normal`.

    >>> import jax
    >>> round(float(abs(lecun_uniform(jax.random.key(0), (300, 300))).max()), 2)       # √(3/300)
    0.1

    References: LeCun, Bottou, Orr and Müller, Efficient BackProp, 1998.
    """
    return variance_scaling(key, shape, dtype, axes=axes, distribution="uniform")


def _fan(mode: Mode, n_in: int, n_out: int) -> float:
    match mode:
        case "fan_in":
            return n_in
        case "fan_out":
            return n_out
        case "fan_avg":
            return (n_in + n_out) / 2
        case "fan_geo_avg":
            return math.sqrt(n_in * n_out)


def _normal(truncated: bool) -> Distribution:
    return "truncated_normal" if truncated else "normal"
