"""Patterns of shared weights, product quantization, and matrices of low displacement rank.

A pattern says by place which positions of a weight share a value. `share(codebook, pattern)` is the weight, and
`ShareWeights(pattern)` the transform. Where a product needs no dense weight, the pattern has a `matmul`.
"""

from jaxweights.techniques.weight_sharing.convolution import Convolution
from jaxweights.techniques.weight_sharing.equivariance import GroupConvolution
from jaxweights.techniques.weight_sharing.patterns import Hashed, Symmetric
from jaxweights.techniques.weight_sharing.shifts import Circulant, Toeplitz, displacement, displacement_matmul
from jaxweights.techniques.weight_sharing.vectors import (
    ProductQuantized,
    product_quantize,
    share_vectors,
    vectors_matmul,
)

__all__ = [
    "Circulant",
    "Convolution",
    "GroupConvolution",
    "Hashed",
    "ProductQuantized",
    "Symmetric",
    "Toeplitz",
    "displacement",
    "displacement_matmul",
    "product_quantize",
    "share_vectors",
    "vectors_matmul",
]
