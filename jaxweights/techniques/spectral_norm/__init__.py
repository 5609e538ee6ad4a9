"""Spectral normalization: a weight divided by its largest singular value."""

from jaxweights.techniques.spectral_norm.convolution import ConvSpectralNorm, conv_spectral_norm
from jaxweights.techniques.spectral_norm.exact import spectral_norm, spectral_normalize
from jaxweights.techniques.spectral_norm.streaming import SpectralEstimate, SpectralNorm, spectral_estimate

__all__ = [
    "ConvSpectralNorm",
    "SpectralEstimate",
    "SpectralNorm",
    "conv_spectral_norm",
    "spectral_estimate",
    "spectral_norm",
    "spectral_normalize",
]
