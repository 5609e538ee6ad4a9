"""Chart of Deep Compression: how much smaller each stage makes a network, and what it does to the accuracy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

STAGES = {
    "dense": "dense,\nfloat32",
    "pruned": "pruned,\nzeros coded",
    "retrained": "shared,\nplain codes",
    "coded": "entropy-\ncoded",
}


def draw(report: dict[str, Any], path: Path) -> None:
    """Draws a column for each network: ratios above, change of the accuracy of each seed below."""
    names = list(dict.fromkeys(run["network"] for run in report["results"]))
    figure, panels = plt.subplots(
        2, len(names), figsize=(5 * len(names), 6), sharex=True, sharey="row", squeeze=False, layout="constrained"
    )
    for name, (ratios, changes) in zip(names, panels.T, strict=True):
        runs = [run for run in report["results"] if run["network"] == name]
        draw_network(ratios, changes, runs, report["paper"][name])
        ratios.set_title(f"{name}, Fashion-MNIST, {len(runs)} seed{'s' * (len(runs) > 1)}", loc="left", fontsize=10)
    panels[0, 0].set_ylabel("times smaller than the dense file")
    panels[1, 0].set_ylabel("change of test accuracy, points")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_network(ratios: plt.Axes, changes: plt.Axes, runs: list[dict[str, Any]], paper: dict[str, Any]) -> None:
    places = np.arange(len(STAGES))
    stages = [[run["stages"][stage] for stage in STAGES] for run in runs]
    ratio = np.array([[of[0]["bytes"] / s["bytes"] for s in of] for of in stages])
    change = np.array([[100 * (s["accuracy"] - of[0]["accuracy"]) for s in of] for of in stages])
    ratios.bar(places, ratio.mean(0), color="#1f5fa8", width=0.6)
    for place, value in zip(places, ratio.mean(0), strict=True):
        ratios.text(place, value, f"{value:.1f}", ha="center", va="bottom", fontsize=9)
    ratios.axhline(paper["coded"], color="#c0504d", lw=1)
    ratios.text(-0.4, paper["coded"], f"the paper on MNIST: {paper['coded']}", color="#c0504d", va="bottom", fontsize=9)
    ratios.set_ylim(0, 1.15 * max(ratio.max(), paper["coded"]))
    changes.axhline(0, color="0.5", lw=1)
    changes.plot(places, change.T, "o", color="#1f5fa8", alpha=0.45, ms=5)
    changes.plot(places, change.mean(0), "_", color="#1f5fa8", ms=22, mew=2)
    changes.set_xticks(places, STAGES.values(), fontsize=9)
    for panel in (ratios, changes):
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="y", color="0.93")
        panel.set_axisbelow(True)
