"""The table of a summary, in any width."""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jaxweights.core.axes import in_words

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions
    from rich.table import Table

    from jaxweights.models.summary import Summary, WeightSummary


def summary_table(summary: Summary, console: Console, options: ConsoleOptions) -> Table:
    """The table. Where it is too wide, the paths get shorter, then the axes, and the numbers stay whole."""
    from rich.measure import Measurement  # a dependency of Flax, imported only to show a table

    paths = [r.path for r in summary.rows]
    wide, heading = options.update(max_width=1000), max(len("weight"), len(_size(summary)))
    for initials in (False, True):
        without = Measurement.get(console, wide, _table(summary, [""] * len(paths), initials)).maximum
        short = shortened(paths, max(options.max_width - without + heading, heading))
        if len(set(short)) == len(paths):
            break
    return _table(summary, short, initials)


def _table(summary: Summary, paths: Sequence[str], initials: bool) -> Table:
    from rich import box
    from rich.table import Table

    rows = summary.rows
    columns = {  # heading: (footer, cells)
        "kB": (_kilobytes(summary.nbytes), [_kilobytes(r.nbytes) for r in rows]),
        "density": (f"{summary.density:.1%}", [f"{r.density:.1%}" for r in rows]),
        "n:m": ("", [r.pattern or "" for r in rows]),
        "values": ("", [f"{r.values:,}" if r.values < 1e5 else f"{r.values / 1e3:,.0f}k" for r in rows]),
        "σ": ("", [f"{r.sigma:.3g}" for r in rows]),
        "‖w‖": (f"{summary.norm:.3g}", [f"{r.norm:.3g}" for r in rows]),
    }
    if not any(r.pattern for r in rows):
        del columns["n:m"]
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, show_footer=True, padding=0)
    table.add_column("weight", _size(summary), no_wrap=True)
    table.add_column("shape", no_wrap=True)
    table.add_column("axes", no_wrap=True)
    table.add_column("form", no_wrap=True)
    for heading, (footer, _) in columns.items():
        table.add_column(heading, footer, justify="right", no_wrap=True)
    numbers = zip(*(cells for _, cells in columns.values()), strict=True)
    for path, row, cells in zip(paths, rows, numbers, strict=True):
        table.add_row(path, "×".join(map(str, row.shape)), _axes(row, initials), row.form, *cells)
    return table


def _axes(row: WeightSummary, initials: bool) -> str:
    """The role of each axis, or its initial: i, o, b(atch), w(indow). A guess ends in a question mark."""
    roles, *groups = in_words(row.axes, row.shape).split(", ")
    if initials:
        roles = " ".join(role[0] for role in roles.split())
    return ", ".join([roles, *groups]) + ("?" if row.guess else "")


def _size(summary: Summary) -> str:
    return f"{summary.size:,} entries"


def _kilobytes(n: int) -> str:
    return f"{n / 1000:,.1f}" if n < 1e6 else f"{n / 1000:,.0f}"


def printed(what: Any) -> str:
    """What rich shows of an object, in the width of the terminal, or in 80 columns without one."""
    from rich.console import Console

    console = Console(width=shutil.get_terminal_size().columns, color_system=None, force_jupyter=False)
    with console.capture() as text:
        console.print(what)
    return text.get()


def shortened(paths: Sequence[str], width: int) -> list[str]:
    """The paths with their names abbreviated, from the first on, as far as `width` needs.

    An abbreviation keeps the number at the end of a name, and what tells the name from the others beside it.

    >>> shortened(["encoder/layer_1/attention/query/kernel", "encoder/layer_12/attention/key/kernel"], 26)
    ['e…/l…1/a…/query/kernel', 'e…/l…12/a…/key/kernel']
    """
    beside: dict[str, set[str]] = defaultdict(set)
    for path in paths:
        names = path.split("/")
        for i, name in enumerate(names):
            beside["/".join(names[:i])].add(name)

    def shorten(path: str) -> str:
        whole = path.split("/")
        names = list(whole)
        for i in range(len(names)):
            if len("/".join(names)) <= width:
                break
            names[i] = _abbreviated(whole[i], beside["/".join(whole[:i])])
        short = "/".join(names)
        if len(short) <= width:
            return short
        head = (width - 1) // 2
        return short[:head] + "…" + short[len(short) - (width - 1 - head) :]

    return [shorten(path) for path in paths]


def _abbreviated(name: str, beside: set[str]) -> str:
    stem, number = _split(name)
    for n in range(1, len(stem) - 1):
        like = [other for other in beside if other.startswith(stem[:n]) and _split(other)[1] == number]
        if like == [name]:
            return f"{stem[:n]}…{number}"
    return name


def _split(name: str) -> tuple[str, str]:
    """A name and the number at its end."""
    stem = name.rstrip("0123456789")
    return stem, name[len(stem) :]
