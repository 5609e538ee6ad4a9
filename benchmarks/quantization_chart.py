"""The chart of quantization.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLORS = {
    "round to nearest": "#9a9a9a",
    "MSE range": "#6fb08e",
    "HQQ": "#b08bd0",
    "AWQ": "#3f86c6",
    "AWQ, MSE range": "#1d4a73",
    "GPTQ": "#c8501e",
    "GPTQ, MSE range": "#7a2a0c",
    "HQQ scales": "#b08bd0",
}
MARKERS = {"jaxweights": "o", "Qwix": "s", "torchao": "^"}


def draw(report: dict[str, Any], path: Path) -> None:
    """Draws a panel for each part that was run: MiniLM, its times, MobileNetV2, and layers by package."""
    panels = [
        (report["minilm"], draw_minilm),
        (report["layers"], draw_layers),
        (report["mobilenet"], draw_mobilenet),
        (report["minilm_times"], draw_times),
    ]
    panels = [(rows, draw_panel) for rows, draw_panel in panels if rows]
    figure, axes = plt.subplots(
        (len(panels) + 1) // 2, min(2, len(panels)), figsize=(15, 11), squeeze=False, layout="constrained"
    )
    for axis in axes.ravel()[len(panels) :]:
        axis.remove()
    for axis, (rows, draw_panel) in zip(axes.ravel(), panels, strict=False):
        draw_panel(axis, rows)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="x", color="0.92")
        axis.set_axisbelow(True)
        axis.tick_params(labelsize=8)
    e = report["environment"]
    peers = ", ".join(f"{name} {e[name]}" for name in ("qwix", "torchao") if name in e)
    figure.suptitle(f"Quantization\n{e['device']}, jax {e['jax']}{', ' + peers if peers else ''}", fontsize=11)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def names(rows: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(r["format"] for r in rows))


def rows_of(axis: plt.Axes, labels: list[str]) -> None:
    """Names the rows, from the top."""
    axis.set_yticks(range(len(labels)), labels)
    axis.set_ylim(len(labels) - 0.5, -0.5)


def head(axis: plt.Axes, title: str, columns: int) -> None:
    """A title, and under it the legend in so many columns."""
    n_lines = -(-len(axis.get_legend_handles_labels()[1]) // columns)
    axis.set_title(title, fontsize=10, loc="left", weight="bold", pad=6 + 15 * n_lines)
    axis.legend(fontsize=8, frameon=False, ncols=columns, loc="lower left", bbox_to_anchor=(-0.02, 0.99))


def beside(axis: plt.Axes, text: str, x: float, y: float) -> None:
    """Writes to the right of a point."""
    axis.annotate(text, (x, y), (4, 0), textcoords="offset points", va="center", fontsize=7.5)


def draw_minilm(axis: plt.Axes, rows: list[dict[str, Any]]) -> None:
    rows = [r for r in rows if r["method"]]
    formats = names(rows)
    for method, color in COLORS.items():
        of = [r for r in rows if r["method"] == method]
        x, y = [1 - r["cosine"] for r in of], [formats.index(r["format"]) for r in of]
        if of:
            axis.plot(x, y, "o", color=color, ms=7, label=method)
    bits = {r["format"]: r["bits"] for r in reversed(rows)}
    rows_of(axis, [f"{name}  ({bits[name]:.2f} bits)" for name in formats])
    axis.set_xscale("log")
    axis.set_xlabel("1 − mean cosine to the embeddings in float32 (less is better)", fontsize=9)
    head(axis, "MiniLM-L6, held-out sentences", columns=5)


def draw_layers(axis: plt.Axes, rows: list[dict[str, Any]]) -> None:
    layer = rows[0]["layer"]
    rows = [r for r in rows if r["layer"] == layer]
    formats = names(rows)
    lanes = list(MARKERS)
    for package, marker in MARKERS.items():
        for method, color in COLORS.items():
            of = [r for r in rows if (r["package"], r["method"]) == (package, method)]
            if of:
                x = [r["output"] for r in of]
                y = [formats.index(r["format"]) + 0.25 * (lanes.index(package) - 1) for r in of]
                axis.plot(x, y, marker, color=color, ms=7, label=f"{package}, {method}")
    rows_of(axis, formats)
    axis.set_xscale("log")
    axis.set_xlabel("relative error of the outputs on held-out sentences (less is better)", fontsize=9)
    head(axis, f"A layer of MiniLM ({layer}) by package", columns=3)


def draw_mobilenet(axis: plt.Axes, rows: list[dict[str, Any]]) -> None:
    formats, methods = names(rows), list(dict.fromkeys(r["method"] for r in rows))
    height = 0.84 / len(methods)
    for i, method in enumerate(methods):
        of = [r for r in rows if r["method"] == method]
        y = [formats.index(r["format"]) + (i - (len(methods) - 1) / 2) * height for r in of]
        plain = method.removesuffix(", biases corrected")
        hatch = None if method == plain else "////"
        values = [r["snr"] for r in of]
        axis.barh(y, values, height * 0.9, color=COLORS[plain], hatch=hatch, edgecolor="white", lw=0, label=method)
        for r, lane in zip(of, y, strict=True):
            beside(axis, f"{r['snr']:.1f} dB, {r['agreement']:.0%}", max(r["snr"], 0), lane)
    rows_of(axis, formats)
    axis.margins(x=0.15)
    axis.set_xlabel("SNR of the logits (more is better), and share of crops with the same first class", fontsize=9)
    head(axis, "MobileNetV2, norms folded, one scale per channel", columns=3)


def draw_times(axis: plt.Axes, rows: list[dict[str, Any]]) -> None:
    formats, shapes = names(rows), list(dict.fromkeys(tuple(r["shape"]) for r in rows))
    height = 0.8 / len(shapes)
    for i, (shape, color) in enumerate(zip(shapes, ("#1f5fa8", "#8fbfe0"), strict=False)):
        of = [r for r in rows if tuple(r["shape"]) == shape]
        y = [formats.index(r["format"]) + (i - (len(shapes) - 1) / 2) * height for r in of]
        ratios = [r["ratio"] for r in of]
        error = [[q["median"] - q["low"] for q in ratios], [q["high"] - q["median"] for q in ratios]]
        label = "{} sentence{} of {} tokens".format(shape[0], "s" if shape[0] > 1 else "", shape[1])
        axis.barh(y, [q["median"] for q in ratios], height * 0.9, xerr=error, color=color, ecolor="0.4", label=label)
        for q, lane in zip(ratios, y, strict=True):
            beside(axis, f"{q['median']:.2f}", q["high"], lane)
    axis.axvline(1, color="black", lw=1)
    rows_of(axis, formats)
    axis.margins(x=0.12)
    axis.set_xlabel("time on stored weights over that in float32", fontsize=9)
    head(axis, "MiniLM-L6, time per batch", columns=2)
