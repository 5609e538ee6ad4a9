"""The NNX level: any module with its weights transformed, the norms as modules, and what layers are fed."""

from jaxweights.lifts.nnx.batch_norm import BatchNorm
from jaxweights.lifts.nnx.capture import capture
from jaxweights.lifts.nnx.fold_batch_norm import fold_batch_norms
from jaxweights.lifts.nnx.layer_norm import GroupNorm, InstanceNorm, LayerNorm, RMSNorm
from jaxweights.lifts.nnx.transformed import TransformVariable, fold, transformed

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
    "transformed",
]
