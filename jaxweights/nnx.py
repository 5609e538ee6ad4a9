"""Flax NNX: any module with its weights transformed, the norms as modules, and what layers are fed."""

from jaxweights.levels.nnx.batch_norm import BatchNorm
from jaxweights.levels.nnx.layer_norm import GroupNorm, InstanceNorm, LayerNorm, RMSNorm
from jaxweights.levels.nnx.state import TransformVariable, init_state, update_state
from jaxweights.levels.nnx.transformed import StoredWeightsWarning, fold, store, transformed
from jaxweights.models.nnx.capture import capture
from jaxweights.models.nnx.compress import compress
from jaxweights.models.nnx.fold_batch_norm import fold_batch_norms, norm_folds
from jaxweights.models.nnx.layout import layout

__all__ = [
    "BatchNorm",
    "GroupNorm",
    "InstanceNorm",
    "LayerNorm",
    "RMSNorm",
    "StoredWeightsWarning",
    "TransformVariable",
    "capture",
    "compress",
    "fold",
    "fold_batch_norms",
    "init_state",
    "layout",
    "norm_folds",
    "store",
    "transformed",
    "update_state",
]
