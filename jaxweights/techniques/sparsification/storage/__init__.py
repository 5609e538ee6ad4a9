"""Sparse storage: the kept entries of a weight and their positions."""

from jaxweights.techniques.sparsification.storage.blocks import BlockSparseArray, pack_blocks
from jaxweights.techniques.sparsification.storage.coordinates import to_bcoo, to_csr
from jaxweights.techniques.sparsification.storage.packed import PackedArray, pack

__all__ = ["BlockSparseArray", "PackedArray", "pack", "pack_blocks", "to_bcoo", "to_csr"]
