"""Benchmark jaxweights against its peers: python benchmarks/run.py [--only GLOB] [--quick].

Ours and the peer's run alternately in one process, and ratios are taken within each round. Ratios are comparable across
machines; times are not.
"""

from __future__ import annotations

import fnmatch
from typing import Any

import chart
import jax
from cases import CASES
from programs import FULL, QUICK
from rich.table import Table
from script import environment, parser, terminal, write
from timing import Effort


def main() -> None:
    accepted = parser(__doc__)
    accepted.add_argument("--only", default="*", metavar="GLOB", help='cases by "group/name", such as "apply/Clip*"')
    accepted.add_argument("--rounds", type=int, help="most rounds per case")
    options = accepted.parse_args()
    console = terminal(140)
    cases = [case for case in CASES if fnmatch.fnmatchcase(f"{case.group}/{case.name}", options.only)]
    if not cases:
        names = "\n  ".join(f"{case.group}/{case.name}" for case in CASES)
        raise SystemExit(f"--only {options.only!r} matches none of\n  {names}")
    report: dict[str, Any] = {"environment": environment(), "quick": options.quick, "results": []}
    console.print(" ".join(f"{name}: {value}." for name, value in report["environment"].items()))
    effort = Effort(options.rounds or (2 if options.quick else 20), seconds=1 if options.quick else 4)
    for case in cases:
        with console.status(f"{case.group}/{case.name} against {case.against}"):
            measured = case.measure(QUICK if options.quick else FULL, effort)
        fields = {name: getattr(case, name) for name in ("group", "name", "against", "goal", "unit")}
        report["results"].append(fields | measured)
    console.print(table(report["results"]))
    write(report, options.out, jax.default_backend(), chart.draw)
    console.print(f"Written to {options.out}")


def table(results: list[dict[str, Any]]) -> Table:
    out = Table(title="ratio ours / other: median \\[quartiles]")
    for name in ("group", "case", "against"):
        out.add_column(name)
    for name in ("ratio", "goal", "ours", "other", "rounds"):
        out.add_column(name, justify="right", no_wrap=True)
    previous = None
    for r in results:
        if previous not in (None, r["group"]):
            out.add_section()
        previous = r["group"]
        q = r["ratio"]
        color = "default" if r["goal"] is None else "green" if q["median"] <= r["goal"] else "red"
        out.add_row(
            r["group"],
            r["name"],
            r["against"],
            f"[{color}]{q['median']:.3f}[/] \\[{q['low']:.3f}, {q['high']:.3f}]",
            "" if r["goal"] is None else f"{r['goal']:g}",
            f"{r['ours']:.2f} {r['unit']}",
            f"{r['theirs']:.2f} {r['unit']}",
            str(r["rounds"]),
        )
    return out


if __name__ == "__main__":
    main()
