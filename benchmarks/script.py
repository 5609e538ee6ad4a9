"""Shared parts of the benchmark scripts: options, console, environment and output files."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

PACKAGES = ("jaxweights", "jax", "jaxlib", "flax", "optax")


def parser(doc: str | None) -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    out.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="where the results go")
    out.add_argument("--quick", action="store_true", help="small sizes and few rounds: does it run?")
    return out


def terminal(width: int = 110) -> Console:
    """Returns a console, `width` wide if the output is not a terminal."""
    console = Console()
    if not console.is_terminal:
        console.width = width
    return console


def environment(*peers: str) -> dict[str, Any]:
    """Returns the device and the versions of Python, of the common dependencies and of `peers`."""
    return {
        "device": f"{jax.devices()[0].device_kind}, {os.cpu_count()} CPU cores",
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in (*PACKAGES, *peers)},
    }


def write(report: dict[str, Any], out: Path, name: str, draw: Callable[[dict[str, Any], Path], None]) -> None:
    """Writes the report to `out`/`name`.json with a chart next to it. Quick runs add the suffix `-quick`."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name}{'-quick' if report['quick'] else ''}"
    path.with_name(f"{path.name}.json").write_text(json.dumps(report, indent=1) + "\n")
    draw(report, path.with_name(f"{path.name}.png"))
