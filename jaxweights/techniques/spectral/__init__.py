"""Spectral normalization, clipping of singular values, and orthogonalization."""

from jaxweights.techniques.spectral.clipping import ClipSingularValues, clip_singular_values
from jaxweights.techniques.spectral.convolution import ConvSpectralNorm, conv_spectral_norm
from jaxweights.techniques.spectral.exact import spectral_norm, spectral_normalize
from jaxweights.techniques.spectral.orthogonalization import Orthogonalize, orthogonalize
from jaxweights.techniques.spectral.streaming import SpectralEstimate, SpectralNorm, spectral_estimate

__all__ = [
    "ClipSingularValues",
    "ConvSpectralNorm",
    "Orthogonalize",
    "SpectralEstimate",
    "SpectralNorm",
    "clip_singular_values",
    "conv_spectral_norm",
    "orthogonalize",
    "spectral_estimate",
    "spectral_norm",
    "spectral_normalize",
]
