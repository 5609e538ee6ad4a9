"""The benchmarks run and write what they say; their times are not judged here."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

RUN = Path(__file__).parents[1] / "benchmarks" / "run.py"


def run(*options):
    return subprocess.run([sys.executable, RUN, "--quick", *options], capture_output=True, text=True)


@pytest.mark.parametrize("only", ["apply/ClipWeights", "temporary memory/SpectralNorm*"])
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


def test_products_with_sparse_weights(tmp_path):
    script = RUN.with_name("sparse_matmul.py")
    done = subprocess.run([sys.executable, script, "--quick", "--out", tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "sparse_matmul-quick.json").read_text())
    assert {"device", "jax", "jaxweights"} <= set(report["environment"])
    for result in report["results"]:
        assert result["ratio"]["median"] > 0 and 0 <= result["bytes"] < 1, result
        assert result["format"] in done.stdout
    assert (tmp_path / "sparse_matmul-quick.png").read_bytes().startswith(b"\x89PNG")
