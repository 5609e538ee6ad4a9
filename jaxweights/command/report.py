"""The summary of `jaxweights compress`."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxweights.command.plan import Step
from jaxweights.command.source import Source
from jaxweights.command.table import count, nbytes, print_table, shown
from jaxweights.command.targets import read_by
from jaxweights.core.axes import in_words
from jaxweights.techniques.quantization.array import QuantizedArray
from jaxweights.techniques.sparsification.one_shot.magnitude import Magnitude
from jaxweights.techniques.weight_sharing.clustered import ClusteredArray

if TYPE_CHECKING:
    from rich.table import Table


def print_summary(
    model: Source, out: Path, to: str, steps: Sequence[Step], about: Sequence[Mapping[str, Any] | None]
) -> None:
    """Prints bytes and error of each tensor, what stayed as it was and why, and totals.

    Args:
      model: the source.
      out: the output.
      to: its layout.
      steps: what was done to each tensor.
      about: what there is to tell of each new weight; None of what stayed as it was.
    """
    rows, kept = [], defaultdict(list)
    before = after = 0
    for step, told in zip(steps, about, strict=True):
        n = step.entry.nbytes if told is None else told["bytes"]
        before, after = before + step.entry.nbytes, after + n
        if told is None:
            kept[step.kept].append(step)
        else:
            shape = "×".join(map(str, step.entry.shape))
            error = (
                [f"{told['error']:.2%}", f"{-20 * math.log10(told['error']):.1f} dB"] if told["error"] else ["0", ""]
            )
            rows.append([shown(step.name), shape, _form(step), *_sizes(step.entry.nbytes, n), *error])
    for why, of in kept.items():
        n = sum(step.entry.nbytes for step in of)
        name = shown(of[0].name) if len(of) == 1 else count(len(of), "tensor")
        rows.append([name, "", f"as it was: {why}", *_sizes(n, n), "", ""])
    rows.append([count(len(steps), "tensor"), "", "", *_sizes(before, after), "", ""])

    def table(names: Sequence[str]) -> Table:
        from rich import box
        from rich.table import Table

        view = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), pad_edge=False)
        for heading in ("tensor", "shape", "stored as"):
            view.add_column(heading)
        for heading in ("before", "after", "ratio", "error", "SNR"):
            view.add_column(heading, justify="right")
        changed = len(rows) - len(kept) - 1
        for i, (name, row) in enumerate(zip(names, rows, strict=True)):
            view.add_row(name, *row[1:], end_section=i in (changed - 1, len(rows) - 2))
        return view

    print_table([row[0] for row in rows], table)
    readers = read_by(to, [step.new for step in steps if not step.kept], model.metadata)
    sizes = f"{out}: {_size(out):,} bytes, {model.path}: {_size(model.path):,}"
    print(f"\n{sizes}. The layout is {to}, read by {readers}.")
    guessed = [step for step in steps if step.guess and not step.kept]
    if guessed:
        reading = in_words(guessed[0].axes, guessed[0].entry.shape)
        print(
            f"Names alone tell the axes of {count(len(guessed), 'weight')}: {shown(guessed[0].name)} is {reading!r}. "
            f"If that is wrong, a recipe says so with input = -1 or -2."
        )


def _form(step: Step) -> str:
    """What was done, in few words."""
    words = []
    for method in step.methods:
        if isinstance(method, Magnitude):
            s = method.sparsity
            words.append(f"{s[0]}:{s[1]} sparse" if isinstance(s, tuple) else f"{s:.0%} zeros")
    if isinstance(step.new, QuantizedArray):
        words.append(str(step.new.format))
    if isinstance(step.new, ClusteredArray):
        words.append(f"{step.new.n_values} values")
    return ", ".join(words)


def _sizes(before: int, after: int) -> list[str]:
    return [nbytes(before), nbytes(after), f"{before / max(after, 1):.2f}×"]


def _size(path: Path) -> int:
    """Bytes of a file, or of all in a folder."""
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file()) if path.is_dir() else path.stat().st_size
