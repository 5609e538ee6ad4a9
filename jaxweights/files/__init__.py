"""Models in files: safetensors and GGUF, with stored weights, and quantized weights in the formats of other tools."""

from jaxweights.files.load import load, metadata
from jaxweights.files.save import save

__all__ = ["load", "metadata", "save"]
