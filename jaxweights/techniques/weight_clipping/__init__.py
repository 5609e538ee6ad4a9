"""Weight clipping and the other projections: of values, of norms, to the simplex and the L1 ball, around a centre."""

from jaxweights.techniques.weight_clipping.around import Around
from jaxweights.techniques.weight_clipping.norm import BoundNorm, ClipNorm, bound_norm, clip_norm
from jaxweights.techniques.weight_clipping.simplex import L1Ball, Simplex, project_l1_ball, project_simplex
from jaxweights.techniques.weight_clipping.value import ClipRange, ClipWeights, clip_range, clip_weights

__all__ = [
    "Around",
    "BoundNorm",
    "ClipNorm",
    "ClipRange",
    "ClipWeights",
    "L1Ball",
    "Simplex",
    "bound_norm",
    "clip_norm",
    "clip_range",
    "clip_weights",
    "project_l1_ball",
    "project_simplex",
]
