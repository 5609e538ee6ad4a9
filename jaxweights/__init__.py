"""jaxweights: everything that is done to weight matrices in JAX.

Ten techniques, each a small pure function, each at every level where it makes sense: arrays, parameter trees
(`on_tree`), optax (`project`, `add_weight_decay`), Flax Linen (`jaxweights.linen`) and Flax NNX (`jaxweights.nnx`).
"""

import importlib
from typing import TYPE_CHECKING

from jaxweights import axes
from jaxweights.axes import Axes, fans
from jaxweights.calibration import InputStats
from jaxweights.lifts.capture import capture
from jaxweights.lifts.data_init import data_dependent_init
from jaxweights.lifts.fold_batch_norm import fold_batch_norms
from jaxweights.lifts.mup import mup_init
from jaxweights.lifts.optax import add_weight_decay, confine, project, scale_by_mup
from jaxweights.lifts.plots import plot_density, plot_mask
from jaxweights.lifts.rewrite import reinitialize, tie
from jaxweights.lifts.summary import Summary, WeightSummary, summarize
from jaxweights.lifts.tree import TreeState, TreeTransform, on_tree
from jaxweights.lifts.units import UnitGroup, UnitSlot, mask_units, remove_units, unit_groups, unit_norms
from jaxweights.stored import Stored, matmul
from jaxweights.techniques import initialization as initializers
from jaxweights.techniques.batch_norm import (
    batch_norm,
    batch_renorm,
    batch_stats,
    fold_batch_norm,
    merge_stats,
    running_stats,
)
from jaxweights.techniques.initialization import (
    he_normal,
    he_uniform,
    lecun_normal,
    lecun_uniform,
    xavier_normal,
    xavier_uniform,
)
from jaxweights.techniques.layer_norm import group_norm, instance_norm, layer_norm, rms_norm
from jaxweights.techniques.orthogonalization import Orthogonalize, orthogonalize
from jaxweights.techniques.quantization import (
    FakeQuantize,
    QuantizedArray,
    dequantize,
    fake_quantize,
    quantize,
)
from jaxweights.techniques.sparsification import (
    AlternatingSparsity,
    Blocks,
    ErdosRenyi,
    Global,
    InputUnits,
    OutputUnits,
    PolynomialSparsity,
    Prune,
    Regrow,
    Sparsify,
    drop_and_grow,
    keep_largest,
    magnitude_mask,
    pack_mask,
    repair,
    scores,
    sparsegpt,
    sparsify,
    unpack_mask,
    wanda_mask,
)
from jaxweights.techniques.sparsification.storage import (
    BlockSparseArray,
    PackedArray,
    pack,
    pack_blocks,
    to_bcoo,
    to_csr,
)
from jaxweights.techniques.spectral_clipping import ClipSingularValues, clip_singular_values
from jaxweights.techniques.spectral_norm import (
    ConvSpectralNorm,
    SpectralEstimate,
    SpectralNorm,
    conv_spectral_norm,
    spectral_estimate,
    spectral_norm,
    spectral_normalize,
)
from jaxweights.techniques.weight_clipping import (
    Around,
    BoundNorm,
    BoundSum,
    ClipNorm,
    ClipRange,
    ClipWeights,
    L1Ball,
    L1Sphere,
    Simplex,
    bound_norm,
    bound_sum,
    clip_norm,
    clip_range,
    clip_weights,
    project_l1_ball,
    project_l1_sphere,
    project_simplex,
)
from jaxweights.techniques.weight_decay import weight_decay
from jaxweights.techniques.weight_norm import (
    Center,
    WeightNorm,
    WeightStandardization,
    center,
    weight_normalize,
    weight_standardize,
)
from jaxweights.techniques.weight_sharing import ShareWeights, cluster, conv_index, hash_index, share
from jaxweights.transform import Chain, Transform

if TYPE_CHECKING:
    from jaxweights.lifts import linen, nnx

__version__ = "0.1.0"

__all__ = [
    "AlternatingSparsity",
    "Around",
    "Axes",
    "BlockSparseArray",
    "Blocks",
    "BoundNorm",
    "BoundSum",
    "Center",
    "Chain",
    "ClipNorm",
    "ClipRange",
    "ClipSingularValues",
    "ClipWeights",
    "ConvSpectralNorm",
    "ErdosRenyi",
    "FakeQuantize",
    "Global",
    "InputStats",
    "InputUnits",
    "L1Ball",
    "L1Sphere",
    "Orthogonalize",
    "OutputUnits",
    "PackedArray",
    "PolynomialSparsity",
    "Prune",
    "QuantizedArray",
    "Regrow",
    "ShareWeights",
    "Simplex",
    "Sparsify",
    "SpectralEstimate",
    "SpectralNorm",
    "Stored",
    "Summary",
    "Transform",
    "TreeState",
    "TreeTransform",
    "UnitGroup",
    "UnitSlot",
    "WeightNorm",
    "WeightStandardization",
    "WeightSummary",
    "add_weight_decay",
    "axes",
    "batch_norm",
    "batch_renorm",
    "batch_stats",
    "bound_norm",
    "bound_sum",
    "capture",
    "center",
    "clip_norm",
    "clip_range",
    "clip_singular_values",
    "clip_weights",
    "cluster",
    "confine",
    "conv_index",
    "conv_spectral_norm",
    "data_dependent_init",
    "dequantize",
    "drop_and_grow",
    "fake_quantize",
    "fans",
    "fold_batch_norm",
    "fold_batch_norms",
    "group_norm",
    "hash_index",
    "he_normal",
    "he_uniform",
    "initializers",
    "instance_norm",
    "keep_largest",
    "layer_norm",
    "lecun_normal",
    "lecun_uniform",
    "linen",
    "magnitude_mask",
    "mask_units",
    "matmul",
    "merge_stats",
    "mup_init",
    "nnx",
    "on_tree",
    "orthogonalize",
    "pack",
    "pack_blocks",
    "pack_mask",
    "plot_density",
    "plot_mask",
    "project",
    "project_l1_ball",
    "project_l1_sphere",
    "project_simplex",
    "quantize",
    "reinitialize",
    "remove_units",
    "repair",
    "rms_norm",
    "running_stats",
    "scale_by_mup",
    "scores",
    "share",
    "sparsegpt",
    "sparsify",
    "spectral_estimate",
    "spectral_norm",
    "spectral_normalize",
    "summarize",
    "tie",
    "to_bcoo",
    "to_csr",
    "unit_groups",
    "unit_norms",
    "unpack_mask",
    "wanda_mask",
    "weight_decay",
    "weight_normalize",
    "weight_standardize",
    "xavier_normal",
    "xavier_uniform",
]


def __getattr__(name: str):
    """`jaxweights.linen` and `jaxweights.nnx`, imported when first asked for: importing Flax takes a while."""
    if name in ("linen", "nnx"):
        return importlib.import_module(f"jaxweights.lifts.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
