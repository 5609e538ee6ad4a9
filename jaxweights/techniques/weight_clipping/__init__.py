"""Weight clipping and other projections: onto boxes, norm balls, half-spaces, the simplex and the L1 ball."""

from jaxweights.techniques.weight_clipping.norm import BoundNorm, ClipNorm, bound_norm, clip_norm
from jaxweights.techniques.weight_clipping.simplex import (
    L1Ball,
    L1Sphere,
    Simplex,
    project_l1_ball,
    project_l1_sphere,
    project_simplex,
)
from jaxweights.techniques.weight_clipping.sum import BoundSum, bound_sum
from jaxweights.techniques.weight_clipping.value import ClipRange, ClipWeights, clip_range, clip_weights

__all__ = [
    "BoundNorm",
    "BoundSum",
    "ClipNorm",
    "ClipRange",
    "ClipWeights",
    "L1Ball",
    "L1Sphere",
    "Simplex",
    "bound_norm",
    "bound_sum",
    "clip_norm",
    "clip_range",
    "clip_weights",
    "project_l1_ball",
    "project_l1_sphere",
    "project_simplex",
]
