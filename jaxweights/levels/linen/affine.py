"""The learned scale and bias that the Linen norms share, named as in Flax."""

from __future__ import annotations

import flax.linen as nn
import jax


def scale_and_bias(
    module: nn.Module, shape: tuple[int, ...], use_scale: bool, use_bias: bool
) -> tuple[jax.Array | None, jax.Array | None]:
    """Creates the parameters of `module`, initially 1 and 0; None for one that it does not use."""
    scale = module.param("scale", nn.initializers.ones, shape) if use_scale else None
    bias = module.param("bias", nn.initializers.zeros, shape) if use_bias else None
    return scale, bias
