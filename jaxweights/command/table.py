"""Tables and JSON on standard output."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

NARROW = 12
"""Columns that names keep in a narrow terminal, whatever becomes of the rest."""


def shown(text: str) -> str:
    """A name of a file, which may hold anything, with escapes for what would move the cursor."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def chosen(names: Iterable[str], globs: Sequence[str] | None) -> list[str]:
    """The names that match one of `globs`, all without any. Raises a ValueError if a glob matches nothing."""
    from jaxweights.models.recipe import matches

    names = list(names)
    for glob in globs or ():
        if not any(matches(glob, name) for name in names):
            listed = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
            raise ValueError(f"--where {glob!r} matches nothing. The names are: {listed}")
    return [name for name in names if not globs or any(matches(glob, name) for glob in globs)]


def print_table(names: Sequence[str], table: Callable[[Sequence[str]], Table]) -> None:
    """Prints the table of these names, whole where it goes to a file or a pipe. A terminal may have too few columns:
    then names get shorter, and after them lines wrap."""
    from rich.console import Console
    from rich.measure import Measurement

    from jaxweights.models.summary_table import shortened

    console = Console(highlight=False, markup=False)
    wide = console.options.update(max_width=10**6)
    width = Measurement.get(console, wide, table(names)).maximum
    if console.is_terminal and width > console.width:
        longest = max(map(len, names), default=0)
        room = max(NARROW, longest - (width - console.width))
        names = _dotted(shortened([name.replace(".", "/") for name in names], room), names)
        width = Measurement.get(console, wide, table(names)).maximum
    console.width = max(width, 1)
    console.print(table(names), soft_wrap=True)


def _dotted(short: Sequence[str], names: Sequence[str]) -> list[str]:
    """The short names with "." between their parts, where the long ones have no "/"."""
    return [one if "/" in name else one.replace("/", ".") for one, name in zip(short, names, strict=True)]


def print_json(report: Any) -> None:
    """Prints JSON, with null for numbers that are not finite."""
    json.dump(_finite(report), sys.stdout, indent=2)
    print()


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(below) for key, below in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(below) for below in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def percent(fraction: float) -> str:
    """A fraction in percent, to three digits where it is small: 0 and 100% mean exactly so."""
    if fraction in (0, 1):
        return f"{fraction:.0%}"
    if fraction < 0.001:
        return f"{100 * fraction:.1g}%"
    return f"{min(fraction, 0.999):.1%}"


def count(n: int, what: str) -> str:
    """A number of things in words."""
    return f"{n:,} {what}" if n == 1 else f"{n:,} {what}s"


def nbytes(n: float) -> str:
    """Bytes in three digits."""
    for unit in ("B", "kB", "MB"):
        if n < 999.5:
            return f"{n:.3g} {unit}"
        n = n / 1000
    return f"{n:.3g} GB" if n < 999.5 else f"{n:,.0f} GB"
