"""Batch normalization and its variants, its statistics, and folding into the preceding layer."""

from jaxweights.techniques.batch_norm.folding import fold_batch_norm
from jaxweights.techniques.batch_norm.normalization import batch_norm
from jaxweights.techniques.batch_norm.renormalization import batch_renorm
from jaxweights.techniques.batch_norm.statistics import batch_stats, merge_stats, running_stats
from jaxweights.techniques.batch_norm.training import train_batch_norm

__all__ = [
    "batch_norm",
    "batch_renorm",
    "batch_stats",
    "fold_batch_norm",
    "merge_stats",
    "running_stats",
    "train_batch_norm",
]
