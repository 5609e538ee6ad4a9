"""Models by other authors, as the benchmark of clients builds them: those of the frameworks that the tests have."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "clients.py"


@pytest.mark.slow
def test_spectral_norms_of_clients_are_one_with_their_layout(tmp_path):
    done = subprocess.run(
        [sys.executable, SCRIPT, "--quick", "--only", "[fe]*", "--out", tmp_path], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "clients-quick.json").read_text())
    assert (tmp_path / "clients-quick.png").read_bytes().startswith(b"\x89PNG")
    results = {r["name"]: r for r in report["results"]}
    assert {r["package"] for r in report["results"]} >= {"flax", "equinox"}
    for package, reason in report["skipped"].items():
        assert package not in ("flax", "equinox") and package in done.stdout and reason
    for r in results.values():
        assert r["with"] <= 0.01, r
        assert r["confirmed"] + len(r["not_confirmed"]) == r["kernels"]
        assert r["line"] in done.stdout
    assert results["ViT of Flax layers"]["confirmed"] == results["ViT of Flax layers"]["kernels"] == 8
    assert results["decoder of Flax layers"]["not_confirmed"] == ["embed/embedding"]  # also looked up
    assert results["MultiheadAttention"]["confirmed"] == 4
    assert results["ensemble of MLPs"]["confirmed"] == 3
