"""What every benchmark script does: its options, its terminal, the environment of the run, and its files."""

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
    """A console, `width` wide where the output is no terminal."""
    console = Console()
    if not console.is_terminal:
        console.width = width
    return console


def environment(*peers: str) -> dict[str, Any]:
    """The device, and the versions of Python, of what every benchmark uses, and of `peers`."""
    return {
        "device": f"{jax.devices()[0].device_kind}, {os.cpu_count()} CPU cores",
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in (*PACKAGES, *peers)},
    }


def write(report: dict[str, Any], out: Path, name: str, draw: Callable[[dict[str, Any], Path], None]) -> None:
    """The report as `out`/`name`.json and as a chart beside it; `-quick` ends the name of a quick one."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{name}{'-quick' if report['quick'] else ''}"
    path.with_name(f"{path.name}.json").write_text(json.dumps(report, indent=1) + "\n")
    draw(report, path.with_name(f"{path.name}.png"))
