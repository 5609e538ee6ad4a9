"""Ranges of `quantize` and its kin: how the scale of a block of weights is chosen."""

from jaxweights.techniques.quantization.ranges import HQQ, MSE, AbsMax, AbsMean, Percentile, Range

__all__ = ["HQQ", "MSE", "AbsMax", "AbsMean", "Percentile", "Range"]
