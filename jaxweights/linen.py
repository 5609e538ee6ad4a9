"""Flax Linen: any module with its weights transformed, the norms as modules, and what layers are fed."""

from jaxweights.levels.linen.batch_norm import BatchNorm
from jaxweights.levels.linen.layer_norm import GroupNorm, InstanceNorm, LayerNorm, RMSNorm
from jaxweights.levels.linen.transformed import Transformed
from jaxweights.levels.linen.variables import fold, init_state, store, update_state
from jaxweights.models.linen.capture import capture
from jaxweights.models.linen.compress import compress
from jaxweights.models.linen.layout import layout
from jaxweights.models.linen.norm_folds import norm_folds

__all__ = [
    "BatchNorm",
    "GroupNorm",
    "InstanceNorm",
    "LayerNorm",
    "RMSNorm",
    "Transformed",
    "capture",
    "compress",
    "fold",
    "init_state",
    "layout",
    "norm_folds",
    "store",
    "update_state",
]
