"""What the norms as Linen modules share: a learned scale and bias, named as Flax's."""

from __future__ import annotations

import flax.linen as nn
import jax


def scale_and_bias(
    module: nn.Module, shape: tuple[int, ...], use_scale: bool, use_bias: bool
) -> tuple[jax.Array | None, jax.Array | None]:
    """The parameters of `module`, 1 and 0 at first; None for what it does not use."""
    scale = module.param("scale", nn.initializers.ones, shape) if use_scale else None
    bias = module.param("bias", nn.initializers.zeros, shape) if use_bias else None
    return scale, bias
