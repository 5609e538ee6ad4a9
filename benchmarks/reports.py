"""Committed results, and what tables of them are made with."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

EXAMPLES, RESULTS = (Path(__file__).parents[1] / folder for folder in ("examples", "benchmarks/results"))
FILES = {
    **{
        name: RESULTS / f"{name}.json"
        for name in (
            "cpu",
            "spectral_norm",
            "norms",
            "selection",
            "bf16_training",
            "clients",
            "quantization",
            "low_bit",
            "low_bit_tpu",
            "clustering",
            "sharing",
            "command_memory",
            "deep_compression",
        )
    },
    **{
        name: EXAMPLES / f"{name}.json"
        for name in ("minilm", "compress_minilm", "sparse_training", "gan_digits", "gan_fashion_mnist")
    },
}
"""The results that the README and the pages of docs/measurements quote."""


def read(name: str) -> dict[str, Any]:
    return json.loads(FILES[name].read_text())


def table(columns: list[list[str]], words: int = 1) -> str:
    """Returns a Markdown table of columns that start with their headings. The first `words` columns are text."""
    heading, *rows = zip(*columns, strict=True)
    sides = ["---"] * words + ["---:"] * (len(columns) - words)
    return "\n".join(f"| {' | '.join(row)} |" for row in (heading, sides, *rows))


def column(heading: str, values: Iterable[float], form: str, best: Callable) -> list[str]:
    """Returns a column with its best values in bold."""
    shown = [format(v, form) for v in values]
    return [heading, *(f"**{s}**" if float(s) == best(map(float, shown)) else s for s in shown)]


def number(x: float) -> str:
    """Returns two digits, or all before the point."""
    return f"{x:,.0f}" if x >= 100 else f"{x:.2g}".replace("e-0", "e-")
