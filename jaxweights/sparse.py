"""Sparse weights and masks in storage: packed N:M, blocks, coordinates, bits."""

from jaxweights.techniques.sparsification.packed import pack_mask, unpack_mask
from jaxweights.techniques.sparsification.storage import (
    BlockSparseArray,
    PackedArray,
    pack,
    pack_blocks,
    to_bcoo,
    to_csr,
)

__all__ = [
    "BlockSparseArray",
    "PackedArray",
    "pack",
    "pack_blocks",
    "pack_mask",
    "to_bcoo",
    "to_csr",
    "unpack_mask",
]
