"""The Linen level: any module with its weights transformed, the norms as modules, and what layers are fed."""

from jaxweights.lifts.linen.batch_norm import BatchNorm
from jaxweights.lifts.linen.capture import capture
from jaxweights.lifts.linen.layer_norm import GroupNorm, InstanceNorm, LayerNorm, RMSNorm
from jaxweights.lifts.linen.transformed import Transformed, fold

__all__ = ["BatchNorm", "GroupNorm", "InstanceNorm", "LayerNorm", "RMSNorm", "Transformed", "capture", "fold"]
