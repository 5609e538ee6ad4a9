"""How much is pruned: a fraction of the weights, or all but N of every M consecutive inputs (N:M sparsity)."""

from __future__ import annotations

from jaxweights.core.checks import check_integer, check_scalar
from jaxweights.core.transform import Number

Sparsity = Number | tuple[int, int]
"""The fraction of zeros in [0, 1]; or (n, m), to keep n of every m consecutive inputs of an output unit."""


def check_fraction(name: str, value, *, schedule: bool = False) -> None:
    """Raises unless `value` is a fraction in [0, 1]; the value of a JAX array or a schedule is not checked."""
    if isinstance(value, list) and len(value) == 2:
        raise TypeError(f"{name} must be a fraction or a tuple (n, m), got the list {value!r}: write {tuple(value)!r}")
    if isinstance(value, int | float) and not isinstance(value, bool) and value > 1:
        raise ValueError(f"{name} must be in [0, 1], got {value!r}: for k of n weights or units, write k / n")
    check_scalar(name, value, 0, 1, schedule=schedule)


def check_sparsity(sparsity, n_inputs: int, *, schedule: bool = False) -> None:
    """Raises unless `sparsity` is a fraction, or an (n, m) whose m divides `n_inputs`."""
    if not isinstance(sparsity, tuple):
        check_fraction("sparsity", sparsity, schedule=schedule)
        return
    if len(sparsity) != 2:
        raise ValueError(f"sparsity must be a fraction or (n, m), got {sparsity!r}: write (2, 4) for 2:4")
    n, m = sparsity
    check_integer("the m of sparsity=(n, m)", m, 1)
    check_integer("the n of sparsity=(n, m)", n, 0, m)
    if n_inputs % m:
        raise ValueError(
            f"sparsity={sparsity} needs a multiple of {m} inputs, but this weight has {n_inputs}: give a fraction"
        )
