"""Formats of quantized weights: how many bits, what the codes mean, how scales are stored.

A weight w is stored as w ≈ value(code)·scale, or (value(code) − zero)·scale, with a scale for each block of inputs of
an output unit. K is the number of inputs.

| name | values | block | scale | bits per weight |
| --- | --- | --- | --- | --- |
| "int2" to "int8" | integers from −(2^(b−1) − 1) to 2^(b−1) − 1 | K | float32 | b + 32/K |
| "nf4" (`NF4`) | 16 quantiles of a normal distribution | 64 | float32 | 4.5 |
| `NF4_DOUBLE` | the same | 64 | 8 bits times a float32 per 256 blocks | 4.13 |
| "fp4" (`FP4`) | ±0, .5, 1, 1.5, 2, 3, 4, 6 | 64 | float32 | 4.5 |
| "fp8_e4m3", "fp8_e5m2" | 8-bit floats up to 448, 57344 | K | float32 | 8 + 32/K |
| "mxfp4", "mxfp8" | those of fp4, fp8_e4m3 | 32 | powers of two | 4.25, 8.25 |
| "nvfp4" (`NVFP4`) | those of fp4 | 16 | E4M3 times a float32 for all | 4.5 |
| "ternary", "binary" | −1, 0, 1; −1, 1 | K | float32 | 2 + 32/K, 1 + 32/K |

`integers` makes those of other blocks, scales and zero points, and `Format` any other combination.
"""

from jaxweights.core.packing import pack, unpack
from jaxweights.techniques.quantization.formats import (
    BINARY,
    FP4,
    FP8_E4M3,
    FP8_E5M2,
    MXFP4,
    MXFP8,
    NF4,
    NF4_DOUBLE,
    NVFP4,
    TERNARY,
    Format,
    integers,
)
from jaxweights.techniques.quantization.grids import Floats, Integers, Levels
from jaxweights.techniques.quantization.scales import ScaleFormat, Scales

__all__ = [
    "BINARY",
    "FP4",
    "FP8_E4M3",
    "FP8_E5M2",
    "MXFP4",
    "MXFP8",
    "NF4",
    "NF4_DOUBLE",
    "NVFP4",
    "TERNARY",
    "Floats",
    "Format",
    "Integers",
    "Levels",
    "ScaleFormat",
    "Scales",
    "integers",
    "pack",
    "unpack",
]
