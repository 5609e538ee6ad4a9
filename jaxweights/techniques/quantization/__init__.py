"""Quantization: weights on a grid of few levels, simulated or stored."""

from jaxweights.techniques.quantization.array import QuantizedArray
from jaxweights.techniques.quantization.fake import FakeQuantize, fake_quantize
from jaxweights.techniques.quantization.learned_scale import LSQ
from jaxweights.techniques.quantization.products.int8 import int8_matmul
from jaxweights.techniques.quantization.quantize import dequantize, quantize

__all__ = ["LSQ", "FakeQuantize", "QuantizedArray", "dequantize", "fake_quantize", "int8_matmul", "quantize"]
