"""Flax NNX: any module with its weights transformed, the norms as modules, and what layers are fed."""

from jaxweights.levels.nnx.batch_norm import BatchNorm
from jaxweights.levels.nnx.layer_norm import GroupNorm, InstanceNorm, LayerNorm, RMSNorm
from jaxweights.levels.nnx.transformed import TransformVariable, fold, transformed, update_state
from jaxweights.models.nnx.capture import capture
from jaxweights.models.nnx.fold_batch_norm import fold_batch_norms
from jaxweights.models.nnx.layout import layout

__all__ = [
    "BatchNorm",
    "GroupNorm",
    "InstanceNorm",
    "LayerNorm",
    "RMSNorm",
    "TransformVariable",
    "capture",
    "fold",
    "fold_batch_norms",
    "layout",
    "transformed",
    "update_state",
]
