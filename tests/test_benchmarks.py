"""The benchmarks run and write their reports; times are not checked. All tests but the first are slow."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

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
def test_products_with_low_bit_weights(tmp_path):
    report, out = quick("low_bit", tmp_path)
    for result in report["results"]:
        assert result["error"] < (0.02 if result["format"].endswith("int8 x") else 1e-5)
        assert 0 < result["bytes"] < 0.3 and result["format"] in out


@pytest.mark.slow
def test_deep_compression(tmp_path):
    pytest.importorskip("constriction", reason="needs the package constriction")
    if not Path("/usr/share/datasets/fashion-mnist").exists():
        pytest.skip("Fashion-MNIST is missing: install it with `apt install dataset-fashion-mnist`")
    report, out = quick("deep_compression", tmp_path)
    (run,) = report["results"]
    assert run["same"] and run["ratio"] > 35  # the sizes follow from the sparsities, however short the training
    assert set(run["stages"]) == {"dense", "distilled", "pruned", "shared", "retrained", "coded"}
    for name, way in report["others"]["ways"].items():
        assert name in out and way["bytes"] < run["stages"]["dense"]["bytes"] / 7


@pytest.mark.slow
def test_clustering(tmp_path, monkeypatch):
    pytest.importorskip("sklearn", reason="scikit-learn is one of the peers that are measured")
    report, out = quick("clustering", tmp_path)
    monkeypatch.syspath_prepend(RUN.parent)
    import figures

    monkeypatch.setitem(figures.FILES, "clustering", tmp_path / "clustering-quick.json")
    _, _, *rows = figures.written("clustering").splitlines()
    for result, row in zip(report["results"], rows, strict=True):
        assert result["error"] > 0.999 and result["method"] in out  # none is better than the optimum
        assert result["ratio"]["median"] > 0
        assert row.startswith(f"| {result['method']} | 20,000 | 8 |") and f"| {result['error']:.4f} |" in row


@pytest.mark.slow
def test_sharing(tmp_path):
    report, out = quick("sharing", tmp_path)
    for result in report["products"]:
        assert result["error"] < 1e-6 and result["pattern"] in out
    assert {r["learned"] for r in report["apply"]} == {True, False}
    assert all(r["ratio"]["median"] > 0 for r in report["apply"])


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
def test_training_in_bfloat16(tmp_path):
    report, out = quick("bf16_training", tmp_path)
    assert all(name in out and np.isfinite(r["held_out"]).all() for name, r in report["results"].items())
    first, last = np.mean(report["results"]["float32"]["train"], 0)[[0, -1]]
    assert last < first / 2


@pytest.mark.slow
def test_quantization(tmp_path, monkeypatch, capsys):
    """One format, by every method but a range of its own, which GPTQ has, too."""
    monkeypatch.syspath_prepend(RUN.parents[1] / "examples")
    monkeypatch.syspath_prepend(RUN.parent)
    import minilm_model

    if lacking := minilm_model.missing():
        pytest.skip(f"MiniLM needs packages that are not installed: {'; '.join(lacking)}")
    import quantization
    import quantized_models

    monkeypatch.setattr(quantized_models, "QUICK", ("4 bits, zero points",))
    monkeypatch.delitem(quantized_models.METHODS, "MSE range")
    parts = [f"--only={part}" for part in ("minilm", "layers", "times")]
    quantization.main(["--quick", "--out", str(tmp_path), *parts])
    out, report = capsys.readouterr().out, json.loads((tmp_path / "quantization-quick.json").read_text())
    assert (tmp_path / "quantization-quick.png").read_bytes().startswith(b"\x89PNG")
    found = {(r["format"], r["method"]): r for r in report["minilm"]}
    dense = found.pop(("float32", ""))
    assert {method for _, method in found} == {"round to nearest", "HQQ", "AWQ", "GPTQ"}
    for (name, method), r in found.items():
        nearest = found[name, "round to nearest"]
        assert method in ("round to nearest", "HQQ") or nearest["cosine"] < r["cosine"] < 1, (name, method)
        assert r["bits"] < 5 and r["file"] < dense["file"] / 4 and method in out
    assert all(r["ratio"]["median"] > 0 and r["error"] < 1e-4 for r in report["minilm_times"])
    assert set(report["not_installed"]) == {peer for peer in ("qwix", "torchao") if peer not in report["environment"]}
    ours = {r["method"]: r for r in report["layers"] if r["package"] == "jaxweights"}
    assert ours["round to nearest"]["bits"] == ours["GPTQ"]["bits"] == 4 + 32 / 128
    assert ours["GPTQ"]["output"] < ours["round to nearest"]["output"] < ours["round to nearest"]["weight"] * 3


@pytest.mark.slow
def test_tracing(tmp_path):
    script = RUN.with_name("tracing.py")
    subprocess.run([sys.executable, script, "--quick", "--out", tmp_path, "--before", RUN.parents[1]], check=True)
    report = json.loads((tmp_path / "tracing-quick.json").read_text())
    assert set(report["results"]) == {"now", "before"}
    for now, before in zip(*(r.values() for r in report["results"].values()), strict=True):
        assert now["equations"] == before["equations"] > report["weights"]
        assert now["trace_s"] > 0 and now["lower_s"] > 0


@pytest.mark.slow
def test_startup(tmp_path, monkeypatch):
    """The first case, compiled, and the last, eager."""
    monkeypatch.syspath_prepend(RUN.parent)
    import startup

    monkeypatch.setattr(startup, "CASES", (startup.CASES[0], startup.CASES[-1]))
    monkeypatch.setattr(sys, "argv", ["", "--quick", "--out", str(tmp_path), "--before", str(RUN.parents[1])])
    startup.main()
    report = json.loads((tmp_path / "startup-quick.json").read_text())
    assert set(report["results"]) == {"now", "before"} and len(report["results"]["now"]) == 2
    assert all(r["seconds"] > 0 and r["cpu_seconds"] > 0 for r in report["results"]["now"].values())


@pytest.fixture
def remake(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(RUN.parent), *sys.path])
    import remake

    return remake


def test_an_example_is_recorded_beside_its_picture(remake, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(remake, "folders", lambda: (tmp_path, tmp_path))
    command = "examples/mup.py --widths 64 128 --seeds 1 --steps 2"
    monkeypatch.setitem(remake.EXAMPLES, "mup", (command, remake.EXAMPLES["mup"][1]))
    remake.example("mup")
    assert {path.name for path in tmp_path.iterdir()} == {"mup.json", "mup.png"}
    record = json.loads((tmp_path / "mup.json").read_text())
    assert record["command"] == f"python {command}" and {"device", "jax"} <= set(record["environment"])
    assert record["picture_sha256"] == hashlib.sha256((tmp_path / "mup.png").read_bytes()).hexdigest()
    assert np.shape(record["results"]["muP"]) == (4,)
    assert f"{record['results']['muP'][1]:+.2f}" in capsys.readouterr().out


def test_a_benchmark_is_recorded_beside_its_chart(remake, tmp_path, monkeypatch):
    script = tmp_path / "script.py"
    script.write_text(
        "import pathlib, sys\n"
        "option, out = sys.argv[1], pathlib.Path(sys.argv[2])\n"
        "(out / 'cpu.json').write_text('{\"results\": [1.5]}') and (out / 'cpu.png').write_text(option)\n"
    )
    monkeypatch.setattr(remake, "folders", lambda: (tmp_path, tmp_path))
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setitem(remake.BENCHMARKS, "run", str(script))
    remake.benchmark("run")
    record = json.loads((tmp_path / "cpu.json").read_text())
    digest = hashlib.sha256(b"--out").hexdigest()
    assert record == {"command": f"python {script}", "seconds": 0, "picture_sha256": digest, "results": [1.5]}


def test_results_of_another_device_lie_apart(remake, monkeypatch):
    benchmarks, examples = remake.folders()
    assert benchmarks == RUN.parent / "results" and examples == RUN.parents[1] / "examples"
    monkeypatch.setattr(remake.jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(remake.jax, "devices", lambda: [SimpleNamespace(device_kind="NVIDIA H100 80GB HBM3")])
    assert remake.folders() == (benchmarks / "nvidia-h100-80gb-hbm3",) * 2


def test_a_part_that_fails_does_not_stop_the_others(remake, tmp_path, monkeypatch, capsys):
    pages = tmp_path / "README.md", tmp_path / "speed.md"
    for page in pages:
        page.write_text("1\n<!-- figures: versions -->\n2\n<!-- end of figures -->\n3\n")
    monkeypatch.setattr(remake, "PAGES", pages)
    ran = []
    monkeypatch.setattr(remake, "succeeds", lambda name: ran.append(name) or name != "norms")
    with pytest.raises(SystemExit, match=r"^failed: norms$"):
        remake.main([])
    assert ran == [*remake.BENCHMARKS, *remake.EXAMPLES]
    first, *_, versions, _, _, last = pages[0].read_text().splitlines()
    assert first == "1" and "jax 0." in versions and last == "3"
    assert pages[1].read_text() == pages[0].read_text()
    with pytest.raises(SystemExit):
        remake.main(["nothing"])
    assert "no part is called nothing; the parts are run, spectral_norm" in capsys.readouterr().err


@pytest.mark.slow
def test_a_part_has_a_process_of_its_own(remake, monkeypatch, capfd):
    monkeypatch.setattr(remake, "example", int)  # what the new process calls: it raises for a name, not for a number
    assert remake.succeeds("3") and not remake.succeeds("three")
    assert "invalid literal for int" in capfd.readouterr().err


@pytest.mark.slow
def test_command_memory(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(RUN.parent))
    import command_memory

    commands = dict(list(command_memory.COMMANDS.items())[:2])
    monkeypatch.setattr(command_memory, "COMMANDS", commands)
    monkeypatch.setattr(sys, "argv", ["command_memory.py", "--quick", "--out", str(tmp_path)])
    command_memory.main()
    report = json.loads((tmp_path / "command_memory-quick.json").read_text())
    assert set(report["results"]) == set(commands)
    assert all(min(r["least"], r["peak"]) > 10**8 for r in report["results"].values())
