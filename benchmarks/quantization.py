"""Quantization of real models and layers: python benchmarks/quantization.py [--quick].

MiniLM-L6 in every format and by every method: the cosine to the embeddings in float32 on held-out sentences, bytes, and
time per batch. MobileNetV2 with its norms folded: the share of crops with the same first class, and the signal-to-noise
ratio of the logits. Layers of MiniLM by jaxweights, Qwix and torchao side by side. Peers that are not installed are
left out: pip install qwix torchao.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import quantized_layers
import quantized_models
from quantization_chart import draw
from rich.console import Console
from rich.table import Table
from script import environment, parser, terminal, write
from timing import Effort

TABLES = ("mobilenet", "minilm", "layers", "minilm_times", "method_times", "layer_times")


def main(arguments: list[str] | None = None) -> None:
    accepted = parser(__doc__)
    parts = ("mobilenet", "minilm", "layers", "times")
    accepted.add_argument(
        "--only", choices=parts, action="append", help="a part to run; the others keep the results that there are"
    )
    options = accepted.parse_args(arguments)
    sys.path.append(str(Path(__file__).parents[1] / "examples"))  # the models are those of the examples
    quick = options.quick
    effort, console = Effort(2, 0.1) if quick else Effort(30, 3), terminal(150)
    packages = quantized_layers.installed()
    path = options.out / f"quantization{'-quick' if quick else ''}.json"
    earlier = json.loads(path.read_text()) if options.only and path.exists() else {}
    report: dict[str, Any] = {
        "environment": environment(*packages),
        "quick": quick,
        "not_installed": [name for name in quantized_layers.PEERS if name not in packages],
        **{table: earlier.get(table, []) for table in TABLES},
    }
    with console.status("quantization") as status:
        models, layers, say = quantized_models, quantized_layers, status.update
        tables: dict[str, dict[str, Callable[[], Iterable[dict[str, Any]]]]] = {
            "mobilenet": {"mobilenet": lambda: models.mobilenet(quick, say)},
            "minilm": {"minilm": lambda: models.minilm(quick, say)},
            "layers": {"layers": lambda: layers.errors(quick, packages, say)},
            "times": {
                "minilm_times": lambda: models.minilm_times(quick, effort, say),
                "method_times": lambda: layers.method_times(quick, packages, say),
                "layer_times": lambda: layers.times(quick, packages, effort, say),
            },
        }
        for part in options.only or parts:
            for table, rows in tables[part].items():
                report[table] = list(rows())
                write(report, options.out, "quantization", draw)
            jax.clear_caches()  # the programs of all parts are more than a process may map into memory
    show(report, console)


def show(report: dict[str, Any], console: Console) -> None:
    if minilm := report["minilm"]:
        console.print(by_method("MiniLM: mean cosine to the embeddings in float32", minilm, "cosine", "{:.4f}"))
        console.print(by_method("seconds to quantize all kernels, with compiling", minilm[1:], "seconds", "{:.1f}"))
    if times := report["minilm_times"]:
        view = Table(title="MiniLM on stored weights: time over that in float32", title_justify="left")
        for name in ("format", "sentences x tokens", "time", "ms", "float32, ms", "error"):
            view.add_column(name, justify="left" if name == "format" else "right")
        for r in times:
            cells = f"{r['ratio']['median']:.2f}", f"{r['ms']:.2f}", f"{r['float_ms']:.2f}", f"{r['error']:.1e}"
            view.add_row(r["format"], "{} x {}".format(*r["shape"]), *cells)
        console.print(view)
    if report["mobilenet"]:
        agree = "MobileNetV2: crops with the same first class"
        console.print(by_method(agree, report["mobilenet"], "agreement", "{:.1%}"))
        console.print(by_method("MobileNetV2: SNR of the logits, dB", report["mobilenet"], "snr", "{:.1f}"))
    for name in report["not_installed"] if report["layers"] else ():
        console.print(f"{name} is not installed: pip install {name}")
    for layer in dict.fromkeys(r["layer"] for r in report["layers"]):
        view = Table(title=f"{layer}: relative errors", title_justify="left")
        for name in ("format", "package", "method", "bits", "weight", "output", "seconds"):
            view.add_column(name, justify="left" if name in ("format", "package", "method") else "right")
        for r in grouped([r for r in report["layers"] if r["layer"] == layer]):
            numbers = f"{r['bits']:.2f}", f"{r['weight']:.4f}", f"{r['output']:.4f}", f"{r['seconds']:.1f}"
            view.add_row(r["format"], r["package"], r["method"], *numbers)
        console.print(view)
    if report["method_times"]:
        first = report["method_times"][0]
        title = f"seconds to quantize a layer of {first['side']} x {first['side']}, {first['format']}"
        view = Table(title=title, title_justify="left")
        for name in ("package", "method", "with compiling", "again"):
            view.add_column(name, justify="left" if name in ("package", "method") else "right")
        for r in report["method_times"]:
            view.add_row(r["package"], r["method"], f"{r['first_seconds']:.1f}", f"{r['seconds']:.1f}")
        console.print(view)
    if report["layer_times"]:
        view = Table(title="time to round, ms, and of x @ w over the float32 product", title_justify="left")
        for name in ("format", "package", "quantize", *(f"{n} rows" for n in quantized_layers.ROWS), ""):
            view.add_column(name, justify="left" if name in ("format", "package", "") else "right")
        for r in grouped(report["layer_times"]):
            ratios = [r["products"].get(str(n)) for n in quantized_layers.ROWS]
            cells = [f"{q['ratio']['median']:.2f}" if q else "" for q in ratios]
            view.add_row(r["format"], r["package"], f"{r['quantize_ms']:.0f}", *cells, r.get("fails", ""))
        console.print(view)


def grouped(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with those of one format together."""
    formats = list(dict.fromkeys(r["format"] for r in rows))
    return sorted(rows, key=lambda r: formats.index(r["format"]))


def by_method(title: str, rows: list[dict[str, Any]], key: str, form: str) -> Table:
    """A table with a line for each format and a column for each method."""
    view = Table(title=title, title_justify="left")
    methods = list(dict.fromkeys(r["method"] for r in rows if r["method"]))
    view.add_column("format")
    for name in ("bits", *methods):
        view.add_column(name, justify="right")
    for name in dict.fromkeys(r["format"] for r in rows if r["method"]):
        found = {r["method"]: r for r in rows if r["format"] == name}
        best = max(r[key] for r in found.values())
        cells = [form.format(found[m][key]) if m in found else "" for m in methods]
        marked = [f"[bold cyan]{c}[/]" if key != "seconds" and c == form.format(best) else c for c in cells]
        view.add_row(name, f"{found['round to nearest']['bits']:.2f}", *marked)
    return view


if __name__ == "__main__":
    main()
