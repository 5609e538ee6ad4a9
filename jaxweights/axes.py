"""How a weight is read as a matrix: `Axes`, the readings of the usual layers, and fans."""

from jaxweights.core.axes import (
    ATTENTION_IN,
    ATTENTION_OUT,
    CONV,
    CONV_TRANSPOSE_KERNEL,
    DENSE,
    EMBED,
    WHOLE,
    Axes,
    dense_general,
    depthwise,
    fans,
)
from jaxweights.core.inference import infer_axes

__all__ = [
    "ATTENTION_IN",
    "ATTENTION_OUT",
    "CONV",
    "CONV_TRANSPOSE_KERNEL",
    "DENSE",
    "EMBED",
    "WHOLE",
    "Axes",
    "dense_general",
    "depthwise",
    "fans",
    "infer_axes",
]
