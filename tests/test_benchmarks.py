"""The benchmarks run and write their reports; times are not checked. All tests but the first are slow."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

RUN = Path(__file__).parents[1] / "benchmarks" / "run.py"


def run(*options):
    return subprocess.run([sys.executable, RUN, "--quick", *options], capture_output=True, text=True)


@pytest.mark.parametrize(
    "only",
    [
        "*y/ClipWeights*",  # a time and a memory case
        pytest.param("Adam step/decay, project: clip, mask", marks=pytest.mark.slow),
        pytest.param("temporary memory/SpectralNorm*", marks=pytest.mark.slow),
    ],
)
def test_a_quick_run_writes_ratios_and_a_chart(tmp_path, only):
    done = run("--only", only, "--rounds", "2", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    (report,) = (json.loads(p.read_text()) for p in tmp_path.glob("*-quick.json"))
    assert {"device", "jax", "jaxweights"} <= set(report["environment"])
    for result in report["results"]:
        ratio = result["ratio"]
        assert 0 <= ratio["low"] <= ratio["median"] <= ratio["high"]
        assert result["theirs"] > 0 and result["rounds"] in (1, 2)
        assert {"group", "name", "against", "goal", "unit", "ours"} <= set(result)
        assert result["name"] in done.stdout
    (chart,) = tmp_path.glob("*-quick.png")
    assert chart.read_bytes().startswith(b"\x89PNG")


def test_a_glob_that_matches_nothing_lists_the_cases(tmp_path):
    done = run("--only", "nothing", "--out", str(tmp_path))
    assert done.returncode != 0
    assert "apply/ClipWeights" in done.stderr


def quick(name, out, *options):
    """Runs a separate benchmark script, which also draws a chart, and returns its report."""
    script = RUN.with_name(f"{name}.py")
    done = subprocess.run([sys.executable, script, "--quick", "--out", out, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads((out / f"{name}-quick.json").read_text())
    assert {"device", "jax", "jaxweights"} <= set(report["environment"])
    assert (out / f"{name}-quick.png").read_bytes().startswith(b"\x89PNG")
    return report, done.stdout


@pytest.mark.slow
def test_products_with_sparse_weights(tmp_path):
    report, out = quick("sparse_matmul", tmp_path)
    for result in report["results"]:
        assert result["ratio"]["median"] > 0 and 0 <= result["bytes"] < 1, result
        assert result["format"] in out


@pytest.mark.slow
def test_selection(tmp_path):
    results = quick("selection", tmp_path)[0]["results"]
    assert {(r["dtype"], r["other"]) for r in results} >= {("float32", "argsort"), ("bfloat16", "top_k")}
    assert all(r["same"] and r["temporary"] <= 2 for r in results)


@pytest.mark.slow
def test_norms(tmp_path):
    pytest.importorskip("torch", reason="PyTorch is one of the peers that are measured")
    report, out = quick("norms", tmp_path, "--only", "layer*256*")
    ((name, result),) = report["results"].items()
    assert name in out and result["stored"]["jaxweights"] < result["stored"]["Flax"]
    assert all(r["ratio"]["median"] > 0 for r in result["times"].values())


@pytest.mark.slow
def test_spectral_norm(tmp_path):
    pytest.importorskip("torch", reason="PyTorch is one of the peers that are measured")
    report, out = quick("spectral_norm", tmp_path)
    errors = report["errors"]
    assert all(errors["jaxweights"][-1] < errors[peer][-1] / 4 and peer in out for peer in ("Flax", "torch"))
    assert np.abs(np.array(report["tracking"]["jaxweights"]) - 1).max() < 0.02
    assert all(ratio["median"] > 0 for ratio in report["stack"].values())


@pytest.mark.slow
def test_tracing(tmp_path):
    script = RUN.with_name("tracing.py")
    subprocess.run([sys.executable, script, "--quick", "--out", tmp_path, "--before", RUN.parents[1]], check=True)
    report = json.loads((tmp_path / "tracing-quick.json").read_text())
    assert set(report["results"]) == {"now", "before"}
    for now, before in zip(*(r.values() for r in report["results"].values()), strict=True):
        assert now["equations"] == before["equations"] > report["weights"]
        assert now["trace_s"] > 0 and now["lower_s"] > 0
