"""Memory and time of the command on a model of 4 GB: python benchmarks/command_memory.py [--quick].

The model has 64 matrices of 64 MB, in float32. Each command has a process of its own. Its peak is what the system gave
it at most, mapped pages of files included, less what it takes on a model of a few kB: Python, JAX and the compiler.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from rich import box
from rich.table import Table
from script import environment, parser, terminal

from jaxweights.files.safetensors import write as write_safetensors
from jaxweights.files.writing import Entry, Piece

ROOT = Path(__file__).parent.parent
MODEL = "model.safetensors"
COMMANDS = {
    "compress --bits 4 --block 128": f"compress {MODEL} -o ints.safetensors --bits 4 --block 128",
    "compress --prune .5 --format nf4": f"compress {MODEL} -o nf4.safetensors --prune .5 --format nf4",
    "compress --bits 8 --to gguf": f"compress {MODEL} -o small.gguf --bits 8 --to gguf",
    "compress --cluster 64": f"compress {MODEL} -o clusters.safetensors --cluster 64",
    "expand": "expand ints.safetensors -o back.safetensors",
    "inspect": f"inspect {MODEL}",
    "diff": f"diff {MODEL} ints.safetensors",
}


def write_model(path: Path, n: int, size: int) -> None:
    """Writes n matrices (size, size): one with normally distributed weights, shifted by some rows in each."""
    w = np.random.default_rng(0).standard_normal((size, size), dtype=np.float32) / size**0.5

    def piece(i: int) -> Piece:
        name = f"layers.{i}.weight"
        return Piece({name: Entry.of(w)}, lambda: {name: np.roll(w, i * size)})

    write_safetensors(path, [piece(i) for i in range(n)], {})


RUN = """
import re, sys
from jaxweights.command.main import main
code = main(sys.argv[1:])
print(re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1], file=sys.stderr)
sys.exit(code)
"""


def run(line: str, folder: Path) -> tuple[float, int]:
    """Runs the command; returns seconds and the peak of its memory in bytes."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    start = time.perf_counter()
    command = [sys.executable, "-c", RUN, *line.split()]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    if done.returncode not in (0, 1):  # diff exits with 1 where files differ
        sys.exit(f"jaxweights {line} failed: {done.stderr}")
    return time.perf_counter() - start, int(done.stderr.split()[-1]) * 1024


def main() -> None:
    options = parser(__doc__).parse_args()
    n, size = (4, 256) if options.quick else (64, 4096)
    largest = 4 * size**2
    results: dict[str, dict[str, float]] = {}
    table = Table(title=f"{n} tensors of {largest / 2**20:g} MB", title_justify="left", box=box.SIMPLE_HEAD)
    for heading in ("command", "seconds", "MB/s", "peak less start, in tensors"):
        table.add_column(heading, justify="left" if heading == "command" else "right")
    folder = Path(tempfile.mkdtemp())
    try:
        for name, shape in {"small": (4, 64), "large": (n, size)}.items():
            (folder / name).mkdir()
            write_model(folder / name / MODEL, *shape)
        for name, line in COMMANDS.items():
            start, least = run(line, folder / "small")
            seconds, peak = run(line, folder / "large")
            tensors = (peak - least) / largest
            results[name] = {"seconds": seconds, "start": start, "peak": peak, "least": least, "tensors": tensors}
            table.add_row(name, f"{seconds:.0f}", f"{n * largest / 1e6 / seconds:.0f}", f"{tensors:.1f}")
    finally:
        shutil.rmtree(folder)
    terminal().print(table)
    model = {"bytes": n * largest, "largest_tensor": largest}
    report = {"command": "python benchmarks/command_memory.py", "quick": options.quick, "environment": environment()}
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"command_memory{'-quick' if options.quick else ''}.json"
    path.write_text(json.dumps(report | {"model": model, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
