"""Tensors of compressed-tensors for 2:4 sparse weights: the kept values, and a bit for each weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from jaxweights.core.axes import Reading
from jaxweights.files.codec import Codec, Config, check_part_shape, columns, layer_of, part
from jaxweights.files.mapping import on_device
from jaxweights.techniques.sparsification.storage.packed import PackedArray

_DTYPES = (np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))


def _reads(parts: Mapping[str, np.ndarray], config: Config) -> bool:
    return ".bitmask" in parts or ".shape" in parts


def _read(what: str, parts: Mapping[str, np.ndarray], config: Config) -> PackedArray:
    """Values (N, K/2), bits (N, K/8) with the first input lowest, and the shape (N, K) as a column."""
    values = part(what, parts, ".compressed", _DTYPES, 2)
    shape = part(what, parts, ".shape", ["i4", "i8"], 2).reshape(-1)[:3].tolist()  # of more, 3 tell
    if len(shape) != 2 or min(shape) < 1 or shape[1] % 4 or values.shape != (shape[0], shape[1] // 2):
        raise ValueError(f"{what}: '.compressed' {values.shape} is not half of a weight of shape {shape}")
    n, rows = shape
    bitmask = part(what, parts, ".bitmask", ["u1"], 2)
    check_part_shape(what, ".bitmask", bitmask.shape, (n, -(-rows // 8)))
    kept = np.unpackbits(bitmask, axis=-1, count=rows, bitorder="little").reshape(n, rows // 4, 4)
    if np.any(kept.sum(-1) != 2):
        raise ValueError(f"{what}: '.bitmask' must keep 2 of every 4 inputs")
    positions = np.nonzero(kept)[2].astype(np.uint8).reshape(n, rows // 2)
    positions = np.pad(positions, [(0, 0), (0, -positions.shape[1] % 4)]).reshape(n, -1, 4)
    codes = np.bitwise_or.reduce(positions << np.array([0, 2, 4, 6], np.uint8), -1)
    return PackedArray(on_device(columns(values)), on_device(columns(codes)), 2, 4, layer_of((n, rows)))


def _write(what: str, p: PackedArray) -> dict[str, np.ndarray]:
    r = Reading.of(p.axes, p.shape)
    if (p.n, p.m) != (2, 4) or r.batch or r.groups > 1 or np.dtype(p.dtype) not in _DTYPES:
        raise ValueError(
            f"{what} is {p.n}:{p.m} of shape {p.shape} and dtype {p.dtype}, sparse-24-bitmask has 2:4 matrices of "
            f"{', '.join(map(str, _DTYPES))}: leave format=None"
        )
    values, codes = columns(np.asarray(p.values)), columns(np.asarray(p.codes))
    n, half = values.shape
    positions = (codes[..., None] >> np.array([0, 2, 4, 6], np.uint8) & 3).reshape(n, -1)[:, :half].reshape(n, -1, 2)
    if np.any(positions[..., 0] >= positions[..., 1]):
        raise ValueError(f"{what} has positions that do not ascend: pack it again with jaxweights.sparse.pack")
    kept = (positions[..., None] == np.arange(4)).any(-2).reshape(n, half * 2)
    return {
        ".compressed": values,
        ".bitmask": np.packbits(kept, axis=-1, bitorder="little"),
        ".shape": np.array([[n], [half * 2]], np.int64),
    }


def _config(weights: Mapping[str, PackedArray]) -> dict[str, Any]:
    sparsity = {"format": "sparse-24-bitmask", "sparsity_structure": "2:4", "targets": list(weights), "ignore": []}
    return {"quant_method": "compressed-tensors", "format": "dense", "sparsity_config": sparsity}


SPARSE_24 = Codec(
    "sparse-24-bitmask",
    lead=".compressed",
    parts=(".compressed", ".bitmask", ".shape"),
    replaced=".weight",
    reads=_reads,
    read=_read,
    write=_write,
    config=_config,
    holds=PackedArray,
)
"""Mishra et al., Accelerating Sparse Deep Neural Networks, arXiv:2104.08378, 2021."""
