"""Tensors of MXFP4 as in gpt-oss: blocks of 32 in 16 bytes, the low bits first, and a power of two for each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxweights.files.bits import from_words
from jaxweights.files.codec import Codec, Config, check_part_shape, columns, part, quantized
from jaxweights.techniques.quantization.array import QuantizedArray
from jaxweights.techniques.quantization.formats import MXFP4 as FORMAT


def _reads(parts: Mapping[str, np.ndarray], config: Config) -> bool:
    blocks = parts["_blocks"]
    return blocks.dtype == np.uint8 and blocks.ndim >= 3 and blocks.shape[-1] == 16


def _read(what: str, parts: Mapping[str, np.ndarray], config: Config) -> QuantizedArray:
    """Codes (*batch, N, blocks, 16), scales (*batch, N, blocks)."""
    blocks = parts["_blocks"]
    if not blocks.size:
        raise ValueError(f"{what} is empty: its '_blocks' have shape {blocks.shape}")
    scales = part(what, parts, "_scales", [np.uint8], blocks.ndim - 1)
    check_part_shape(what, "_scales", scales.shape, blocks.shape[:-1])
    codes = np.stack([blocks & 15, blocks >> 4], -1).reshape(*blocks.shape[:-2], blocks.shape[-2] * 32)
    return quantized(codes, FORMAT, columns(scales), "bfloat16")


def _write(what: str, q: QuantizedArray) -> dict[str, np.ndarray]:
    other = [name for name in ("zero", "minimum", "order", "input_scale") if getattr(q, name) is not None]
    if q.format != FORMAT or other or q.rows % 32 or q.layer.axes.groups > 1:
        raise ValueError(
            f"{what} cannot be saved as MXFP4, which has blocks of 32 that divide the inputs, and no more than a power "
            f"of two for each: quantize with 'mxfp4', or leave format=None"
        )
    codes = from_words(np.asarray(q.words), 4, q.rows)
    codes = codes.reshape(*codes.shape[:-1], q.rows // 32, 16, 2)
    return {
        "_blocks": codes[..., 0] | (codes[..., 1] << 4),
        "_scales": columns(
            np.broadcast_to(np.asarray(q.scale.codes), (*codes.shape[:-4], q.rows // 32, codes.shape[-4]))
        ),
    }


def _config(weights: Mapping[str, QuantizedArray]) -> dict[str, Any]:
    return {"quant_method": "mxfp4"}


MXFP4 = Codec(
    "mxfp4",
    lead="_blocks",
    parts=("_blocks", "_scales"),
    replaced="",
    reads=_reads,
    read=_read,
    write=_write,
    config=_config,
)
"""Rouhani et al., Microscaling Data Formats for Deep Learning, arXiv:2310.10537, 2023."""
