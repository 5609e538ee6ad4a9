"""jaxweights: everything that is done to weight matrices in JAX.

Ten techniques, each a small pure function, each at every level where it makes sense: arrays, parameter trees
(`on_tree`), optax (`project`, `add_weight_decay`), Flax Linen (`jaxweights.linen`) and Flax NNX (`jaxweights.nnx`).
"""

import importlib
from typing import TYPE_CHECKING

from jaxweights import (
    axes,
    calibration,
    formats,
    initializers,
    methods,
    plots,
    projections,
    pruning,
    ranges,
    recipes,
    scores,
    sharing,
    sparse,
    typing,
    units,
)
from jaxweights.core.axes import Axes
from jaxweights.core.guesses import AxesWarning
from jaxweights.core.joint import JointTransform
from jaxweights.core.stale import StaleStateWarning
from jaxweights.core.stored import matmul
from jaxweights.core.transform import Transform
from jaxweights.core.wrappers import Around, Chain
from jaxweights.levels.optax.confine import confine
from jaxweights.levels.optax.project import project
from jaxweights.levels.optax.stochastic_rounding import round_stochastically
from jaxweights.levels.optax.weight_decay import add_weight_decay
from jaxweights.levels.tree import TreeState, on_tree
from jaxweights.models.bias_correction import correct_biases
from jaxweights.models.capture import capture
from jaxweights.models.data_init import data_dependent_init
from jaxweights.models.describe import describe
from jaxweights.models.equalize import equalize
from jaxweights.models.fold_batch_norm import fold_batch_norms
from jaxweights.models.layout import layout
from jaxweights.models.mixed_bits import MixedBits, mixed_bits
from jaxweights.models.mup import mup_init, scale_by_mup
from jaxweights.models.norm_folds import norm_folds
from jaxweights.models.one_shot.compress import compress
from jaxweights.models.one_shot.one_shot import one_shot
from jaxweights.models.reinitialize import reinitialize
from jaxweights.models.smooth import smooth
from jaxweights.models.stored import densify, with_stored
from jaxweights.models.summary import summarize
from jaxweights.models.tie import tie, untie
from jaxweights.models.ties import Tied
from jaxweights.programs.norms.folds import Fold
from jaxweights.techniques.batch_norm import (
    batch_norm,
    batch_renorm,
    batch_stats,
    fold_batch_norm,
    merge_stats,
    running_stats,
)
from jaxweights.techniques.initialization import he_normal, he_uniform, xavier_normal, xavier_uniform
from jaxweights.techniques.layer_norm import group_norm, instance_norm, layer_norm, rms_norm
from jaxweights.techniques.quantization import (
    LSQ,
    FakeQuantize,
    QuantizedArray,
    dequantize,
    fake_quantize,
    int8_matmul,
    quantize,
)
from jaxweights.techniques.sparsification import (
    KeepZeros,
    Prune,
    Regrow,
    Sparsify,
    magnitude_mask,
    reconstruct,
    sparsegpt,
    sparsify,
    wanda_mask,
)
from jaxweights.techniques.spectral import (
    ConvSpectralNorm,
    SpectralNorm,
    conv_spectral_norm,
    spectral_estimate,
    spectral_norm,
    spectral_normalize,
)
from jaxweights.techniques.weight_clipping import ClipNorm, ClipWeights, clip_norm, clip_weights
from jaxweights.techniques.weight_decay import weight_decay
from jaxweights.techniques.weight_norm import WeightNorm, WeightStandardization, weight_normalize, weight_standardize
from jaxweights.techniques.weight_sharing import (
    ClusteredArray,
    ShareWeights,
    cluster,
    conv_index,
    hash_index,
    share,
    store_clusters,
)

if TYPE_CHECKING:
    from jaxweights import files, linen, nnx

__version__ = "0.2.0"

__all__ = [
    "LSQ",
    "Around",
    "Axes",
    "AxesWarning",
    "Chain",
    "ClipNorm",
    "ClipWeights",
    "ClusteredArray",
    "ConvSpectralNorm",
    "FakeQuantize",
    "Fold",
    "JointTransform",
    "KeepZeros",
    "MixedBits",
    "Prune",
    "QuantizedArray",
    "Regrow",
    "ShareWeights",
    "Sparsify",
    "SpectralNorm",
    "StaleStateWarning",
    "Tied",
    "Transform",
    "TreeState",
    "WeightNorm",
    "WeightStandardization",
    "add_weight_decay",
    "axes",
    "batch_norm",
    "batch_renorm",
    "batch_stats",
    "calibration",
    "capture",
    "clip_norm",
    "clip_weights",
    "cluster",
    "compress",
    "confine",
    "conv_index",
    "conv_spectral_norm",
    "correct_biases",
    "data_dependent_init",
    "densify",
    "dequantize",
    "describe",
    "equalize",
    "fake_quantize",
    "files",
    "fold_batch_norm",
    "fold_batch_norms",
    "formats",
    "group_norm",
    "hash_index",
    "he_normal",
    "he_uniform",
    "initializers",
    "instance_norm",
    "int8_matmul",
    "layer_norm",
    "layout",
    "linen",
    "magnitude_mask",
    "matmul",
    "merge_stats",
    "methods",
    "mixed_bits",
    "mup_init",
    "nnx",
    "norm_folds",
    "on_tree",
    "one_shot",
    "plots",
    "project",
    "projections",
    "pruning",
    "quantize",
    "ranges",
    "recipes",
    "reconstruct",
    "reinitialize",
    "rms_norm",
    "round_stochastically",
    "running_stats",
    "scale_by_mup",
    "scores",
    "share",
    "sharing",
    "smooth",
    "sparse",
    "sparsegpt",
    "sparsify",
    "spectral_estimate",
    "spectral_norm",
    "spectral_normalize",
    "store_clusters",
    "summarize",
    "tie",
    "typing",
    "units",
    "untie",
    "wanda_mask",
    "weight_decay",
    "weight_normalize",
    "weight_standardize",
    "with_stored",
    "xavier_normal",
    "xavier_uniform",
]


def __getattr__(name: str):
    """`jaxweights.files`, `.linen` and `.nnx`, imported when first asked for: importing Flax takes a while."""
    if name in ("files", "linen", "nnx"):
        return importlib.import_module(f"jaxweights.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
