"""Fixup initialization: residual networks without normalization."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxweights.core.axes import Axes
from jaxweights.core.checks import check_integer
from jaxweights.techniques.initialization.variance_scaling import Mode, variance_scaling


def fixup(
    key: jax.Array,
    shape: Sequence[int],
    dtype=jnp.float32,
    *,
    axes: Axes | None = None,
    n_branches: int,
    n_layers: int,
    mode: Mode = "fan_in",
) -> jax.Array:
    """Fixup initialization of the layers inside residual branches: `he_normal` times L^(−1/(2m − 2)).

    A network of L residual branches of m layers then trains without normalization: an SGD step changes its output by
    the same amount for every L. This initializer is one of several rules; the first that matches a weight applies:

        init = jw.initializers
        inner = functools.partial(init.fixup, n_branches=L, n_layers=m)
        params = jw.reinitialize(params, key, {
            "**/block_*/last/kernel": init.zeros,     # the last layer of every branch
            "head/**": init.zeros,                    # the classifier
            "**/block_*/*/kernel": inner,             # the other layers of the branches
            "**/kernel": jw.he_normal,                # all layers outside the branches
        })

    The only layer of a one-layer branch is its last, so it starts at 0. The rest of Fixup is additional parameters,
    which the module must define: a scalar multiplier (initially 1) in every branch, and a scalar bias (initially 0)
    before each of its convolutions and activations.

    Args:
      key: a `jax.random` key.
      shape: shape of the weight.
      dtype: floating dtype.
      axes: how the weight is read as a matrix; (..., in, out) by default.
      n_branches: L, the number of residual branches of the network.
      n_layers: m, the number of weight layers in a branch, at least 2.
      mode: the fan of `he_normal`.

    Returns:
      Array of the given shape and dtype.

    Raises:
      TypeError: `dtype` is not a real floating dtype, or a count is not an integer.
      ValueError: `axes` does not fit, `n_branches` is below 1, or `n_layers` below 2.

    >>> import jax
    >>> w = fixup(jax.random.key(0), (800, 500), n_branches=25, n_layers=2)
    >>> print(f"{w.std():.3f}")       # √(2/800)/√25
    0.010

    References: Zhang, Dauphin and Ma, Fixup Initialization: Residual Learning Without Normalization, arXiv:1901.09321,
    2019.
    """
    check_integer("n_branches", n_branches, 1)
    check_integer("n_layers", n_layers, 2)
    scale = 2 * n_branches ** (-1 / (n_layers - 1))
    return variance_scaling(key, shape, dtype, axes=axes, scale=scale, mode=mode)
