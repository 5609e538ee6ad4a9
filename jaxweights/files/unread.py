"""Tensors of formats that are not read: their codes alone are no weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

_PACKED = (".qweight", ".weight_packed", ".W_q", ".q_weight")
"""The ends of names of packed codes, of GPTQ and AWQ, compressed-tensors, HQQ and ExLlamaV2."""
_SCALED = (".weight_scale", ".weight_scale_inv", ".SCB", ".scales")
"""Of scales beside a "weight" of codes: of FP8 and int8, bitsandbytes and MLX."""
_CODES = (
    "int8",
    "uint8",
    "int16",
    "int32",
    "uint32",
    "float8_e4m3fn",
    "float8_e4m3fnuz",
    "float8_e5m2",
    "float8_e5m2fnuz",
)


def check_no_codes(file: str, tensors: Mapping[str, Any], config: Callable[[], Mapping[str, Any]]) -> None:
    """Raises if among the tensors that make up no weight are codes of one in a format that is not read."""
    for name in tensors:
        end = next((end for end in (*_PACKED, *_SCALED) if name.endswith(end)), None)
        if end is None:
            continue
        weight = name if end in _PACKED else name.removesuffix(end) + ".weight"
        codes = tensors.get(weight)
        if not isinstance(codes, np.ndarray) or codes.dtype.name not in _CODES:
            continue  # a parameter of such a name, as the W_q of an attention
        told = [f"{key}={str(value)[:99]!r}" for key, value in config().items() if key in ("quant_method", "format")]
        raise ValueError(
            f"{file}: {weight!r} has codes in {codes.dtype.name} of a format that is not read "
            f"({', '.join(told) or 'of which no config tells'}). Those that are read are GPTQ, AWQ, compressed-tensors "
            f"(pack-quantized and 2:4), bitsandbytes (4 bits) and MXFP4: dequantize with the tool that wrote the file"
        )
