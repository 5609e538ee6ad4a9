"""Flax Linen: any module with its weights transformed, the norms as modules, and what layers are fed."""

from jaxweights.levels.linen.batch_norm import BatchNorm
from jaxweights.levels.linen.layer_norm import GroupNorm, InstanceNorm, LayerNorm, RMSNorm
from jaxweights.levels.linen.transformed import Transformed, fold, update_state
from jaxweights.models.linen.capture import capture
from jaxweights.models.linen.layout import layout

__all__ = [
    "BatchNorm",
    "GroupNorm",
    "InstanceNorm",
    "LayerNorm",
    "RMSNorm",
    "Transformed",
    "capture",
    "fold",
    "layout",
    "update_state",
]
