"""Tables of Deep Compression: its stages beside the paper's, and other ways."""

from __future__ import annotations

from typing import Any

import numpy as np
from reports import read, table

STAGES = {
    "dense": "dense, float32",
    "distilled": "dense, distilled",
    "pruned": "pruned, zeros coded",
    "shared": "shared, plain codes",
    "retrained": "codebooks trained, plain codes",
    "coded": "codebooks trained, entropy-coded",
}
IN_PAPER = {"pruned": "pruned", "retrained": "shared", "coded": "coded"}
"""Our stages that the paper has too, and their names there."""


def deep_compression() -> str:
    """A line for each stage: ratio and accuracy over the seeds, and the paper's ratio on MNIST."""
    report = read("deep_compression")
    columns = [["stage", *STAGES.values()]]
    for name in dict.fromkeys(run["network"] for run in report["results"]):
        paper = report["paper"][name]
        runs = [run["stages"] for run in report["results"] if run["network"] == name]
        columns.append([f"{name}: times smaller", *(spread(ratios(runs, stage), 1) for stage in STAGES)])
        columns.append([f"{name}: accuracy, %", *(spread(accuracies(runs, stage), 2) for stage in STAGES)])
        columns.append([f"{name}: change, points", *(change(runs, stage) for stage in STAGES)])
        columns.append(
            [f"{name} in the paper: times smaller", *(str(paper[IN_PAPER[s]]) if s in IN_PAPER else "" for s in STAGES)]
        )
    return table(columns)


def other_ways() -> str:
    """A line for each way: ratio, accuracy, and its change against the dense network of the same seed."""
    report = read("deep_compression")
    others = report["others"]
    run = next(r for r in report["results"] if (r["network"], r["seed"]) == (others["network"], others["seed"]))
    dense = run["stages"]["dense"]
    found = {"pruned, 8 values, codebooks trained": run["stages"]["coded"], **others["ways"]}
    rows = sorted(found.items(), key=lambda item: -dense["bytes"] / item[1]["bytes"])
    return table(
        [
            ["way", *(name for name, _ in rows)],
            ["times smaller", *(f"{dense['bytes'] / r['bytes']:.1f}" for _, r in rows)],
            ["accuracy, %", *(f"{100 * r['accuracy']:.2f}" for _, r in rows)],
            ["change, points", *(f"{100 * (r['accuracy'] - dense['accuracy']):+.2f}" for _, r in rows)],
        ]
    )


def ratios(runs: list[dict[str, Any]], stage: str) -> list[float]:
    return [run["dense"]["bytes"] / run[stage]["bytes"] for run in runs]


def accuracies(runs: list[dict[str, Any]], stage: str) -> list[float]:
    return [100 * run[stage]["accuracy"] for run in runs]


def change(runs: list[dict[str, Any]], stage: str) -> str:
    """Mean change against the dense networks of the same seeds."""
    return f"{np.mean(accuracies(runs, stage)) - np.mean(accuracies(runs, 'dense')):+.2f}"


def spread(values: list[float], digits: int) -> str:
    """Mean and standard deviation."""
    mean = f"{np.mean(values):.{digits}f}"
    return f"{mean} ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else mean
