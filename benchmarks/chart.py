"""Chart of all ratios and goals."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

MET, MISSED, NO_GOAL = "#2a9d6f", "#d1495b", "#7a8ca3"


def draw(report: dict[str, Any], path: Path) -> None:
    """Draws median ratios as horizontal bars with whiskers at the quartiles, one panel per group."""
    groups = [(name, list(rows)) for name, rows in itertools.groupby(report["results"], key=lambda r: r["group"])]
    heights = [len(rows) + 1.6 for _, rows in groups]
    figure, panels = plt.subplots(
        len(groups),
        figsize=(10, 0.3 * sum(heights) + 1),
        gridspec_kw={"height_ratios": heights},
        squeeze=False,
        layout="constrained",
    )
    for panel, (name, rows) in zip(panels[:, 0], groups, strict=True):
        draw_group(panel, name, rows)
    e = report["environment"]
    title = "jaxweights: median ratio to the other, quartiles, and the goal as a black bar (less is better)"
    figure.suptitle(f"{title}\n{e['device']}, jax {e['jax']}, flax {e['flax']}, optax {e['optax']}", fontsize=10)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_group(panel: plt.Axes, name: str, rows: list[dict[str, Any]]) -> None:
    medians = [r["ratio"]["median"] for r in rows]
    spread = [
        [r["ratio"]["median"] - r["ratio"]["low"] for r in rows],
        [r["ratio"]["high"] - r["ratio"]["median"] for r in rows],
    ]
    places = range(len(rows))
    panel.barh(places, medians, xerr=spread, color=[color(r) for r in rows], height=0.68, ecolor="#333333", capsize=2)
    right = max([*(r["ratio"]["high"] for r in rows), *(r["goal"] or 0 for r in rows), 1])
    for place, r in zip(places, rows, strict=True):
        panel.text(
            max(r["ratio"]["high"], r["goal"] or 0) + right * 0.015,
            place,
            f"{r['ratio']['median']:.3f}",
            va="center",
            fontsize=8,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
        )
        if r["goal"] is not None:
            panel.plot([r["goal"]] * 2, [place - 0.45, place + 0.45], color="black", linewidth=2)
    panel.axvline(1, color="black", linewidth=0.8, linestyle=":")
    panel.set_yticks(list(places), [f"{r['name']}  vs  {r['against']}" for r in rows], fontsize=8)
    panel.set_xlim(0, right * 1.12)
    panel.tick_params(axis="x", labelsize=8)
    panel.invert_yaxis()
    panel.set_title(name, loc="left", fontsize=9, fontweight="bold")
    panel.spines[["top", "right"]].set_visible(False)


def color(row: dict[str, Any]) -> str:
    if row["goal"] is None:
        return NO_GOAL
    return MET if row["ratio"]["median"] <= row["goal"] else MISSED
