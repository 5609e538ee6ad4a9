"""How much is pruned, and where: a fraction, or N of every M consecutive inputs kept."""

from __future__ import annotations

from jaxweights.core.checks import check_integer, check_scalar
from jaxweights.core.transform import Number

Sparsity = Number | tuple[int, int]
"""The fraction of zeros in [0, 1], or (n, m): of every m consecutive inputs of an output unit, n are kept."""


def check_sparsity(sparsity, rows: int) -> None:
    """Raises unless `sparsity` is a fraction, or an (n, m) that fits so many rows."""
    if not isinstance(sparsity, tuple):
        return check_scalar("sparsity", sparsity, 0, 1)
    if len(sparsity) != 2:
        raise ValueError(f"sparsity must be a fraction or (n, m), got {sparsity!r}: write (2, 4) for 2:4")
    n, m = sparsity
    check_integer("the m of sparsity=(n, m)", m, 1)
    check_integer("the n of sparsity=(n, m)", n, 0, m)
    if rows % m:
        raise ValueError(f"sparsity={sparsity} needs a multiple of {m} inputs, this weight has {rows}: give a fraction")
