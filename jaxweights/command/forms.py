"""Names of dtypes and formats in few words."""

from __future__ import annotations

from typing import Any

from jaxweights.command.source import Item
from jaxweights.core.stored import is_stored
from jaxweights.files.gguf import BLOCK_TYPES
from jaxweights.files.load import OURS
from jaxweights.techniques.quantization.array import QuantizedArray
from jaxweights.techniques.quantization.formats import Format
from jaxweights.techniques.sparsification.storage.blocks import BlockSparseArray
from jaxweights.techniques.sparsification.storage.packed import PackedArray
from jaxweights.techniques.weight_sharing.clustered import ClusteredArray

_TOOLS = {"gptq": "GPTQ", "gptq_v2": "GPTQ", "awq": "AWQ"}


def form(item: Item, value: Any) -> str:
    """The dtype of an array, the type of GGUF, or the format of a stored weight after the tool whose it is.

    "g128" means that 128 inputs share a scale; "zp", that there are zero points.
    """
    if item.form in BLOCK_TYPES:
        return item.form
    if not is_stored(value):
        return str(value.dtype)
    words = _stored(value)
    tool = "" if item.form == OURS or item.form.lower() in words else _TOOLS.get(item.form, item.form)
    return f"{tool} {words}".strip()


def _stored(value: Any) -> str:
    if isinstance(value, QuantizedArray):
        return _format(value.format)
    if isinstance(value, PackedArray):
        return f"{value.n}:{value.m} {value.dtype}"
    if isinstance(value, ClusteredArray):
        return f"clustered {value.n_values}"
    assert isinstance(value, BlockSparseArray)
    rows, columns = value.blocks.shape[-2:]
    return f"blocks {rows}×{columns} {value.dtype}"


def _format(format: Format) -> str:
    name, *rest = str(format).split(", ")
    words = [name]
    if format.block is not None and rest:
        words.append(f"g{format.block}")
    if format.zero_point and rest:
        words.append("zp")
    return " ".join(words)
