"""Projections on sets of weights: ranges, norms, sums, the simplex, L1 balls, singular values.

Each is a function of an array and a transform, as the ten techniques are: `jw.project(jw.projections.Simplex())`.
"""

from jaxweights.techniques.spectral.clipping import ClipSingularValues, clip_singular_values
from jaxweights.techniques.spectral.orthogonalization import Orthogonalize, orthogonalize
from jaxweights.techniques.weight_clipping.norm import BoundNorm, bound_norm
from jaxweights.techniques.weight_clipping.simplex import (
    L1Ball,
    L1Sphere,
    Simplex,
    project_l1_ball,
    project_l1_sphere,
    project_simplex,
)
from jaxweights.techniques.weight_clipping.sum import BoundSum, bound_sum
from jaxweights.techniques.weight_clipping.value import ClipRange, clip_range
from jaxweights.techniques.weight_norm.centering import Center, center

__all__ = [
    "BoundNorm",
    "BoundSum",
    "Center",
    "ClipRange",
    "ClipSingularValues",
    "L1Ball",
    "L1Sphere",
    "Orthogonalize",
    "Simplex",
    "bound_norm",
    "bound_sum",
    "center",
    "clip_range",
    "clip_singular_values",
    "orthogonalize",
    "project_l1_ball",
    "project_l1_sphere",
    "project_simplex",
]
