"""Quantization: weights on a grid of few levels, simulated or stored."""

from jaxweights.techniques.quantization.fake import FakeQuantize, fake_quantize
from jaxweights.techniques.quantization.stored import QuantizedArray, dequantize, quantize

__all__ = ["FakeQuantize", "QuantizedArray", "dequantize", "fake_quantize", "quantize"]
