"""The examples run, print what they promise, and agree between Linen and NNX. Long training runs are slow tests."""

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

import jaxweights as jw

EXAMPLES = Path(__file__).parent.parent / "examples"
STEPS = 60


def run(name, capsys):
    variables = runpy.run_path(str(EXAMPLES / name))
    return variables, capsys.readouterr().out


def test_array_level(capsys):
    variables, out = run("array_level.py", capsys)
    versions = variables["versions"]
    assert jw.spectral_norm(versions["spectral norm: σ = 1"]) == pytest.approx(1, abs=1e-5)
    assert np.abs(versions["clipped to ±0.1"]).max() == np.float32(0.1)
    assert np.unique(versions["shared: 16 values"]).size <= 16
    assert np.mean(versions["sparse: 50% zeros"] == 0) == 0.5
    assert variables["stored"].nbytes < variables["w"].nbytes / 3
    assert "off by 0." in out


def test_tree_level(capsys):
    variables, out = run("tree_level.py", capsys)
    accuracies = variables["accuracies"]
    assert accuracies["as trained"] > 0.9
    assert accuracies["4 bits"] > accuracies["as trained"] - 0.02
    assert "where='**/weight' selects no weight" in out


@pytest.mark.slow
def test_tied_embedding(capsys):
    variables, _ = run("tied_embedding.py", capsys)
    weights, optimizer, saved, losses = zip(*variables["results"].values(), strict=True)
    n = len(variables["letters"])
    assert np.diff(weights).tolist() == [-64 * n, -3 * (64 * 64 + 64)]
    assert all(8 * w <= o < 8 * w + 100 for w, o in zip(weights, optimizer, strict=True))
    assert all(4 * w < s < 4 * w + 2000 for w, s in zip(weights, saved, strict=True))
    assert max(losses) < 3


@pytest.mark.slow
def test_equivariant_digits(capsys):
    variables, _ = run("equivariant_digits.py", capsys)
    labels, accuracy = variables["test_y"], {}
    for name, (upright, *turned) in variables["logits"].items():
        accuracy[name] = [np.mean(np.argmax(y, -1) == labels) for y in (upright, *turned)]
        assert all(np.allclose(y, upright, atol=1e-3) for y in turned) == (name == "equivariant")
    assert min(accuracy["equivariant"]) > 0.7 > 0.5 > max(accuracy["plain"][1:])


def test_optax_level(capsys):
    variables, _ = run("optax_level.py", capsys)
    kernel = variables["params"]["kernel"]
    assert np.abs(kernel).max() <= 1
    assert np.mean(kernel == 0) == 0.5
    assert variables["accuracy"] > 0.9


def test_linen_level(capsys):
    variables, _ = run("linen_level.py", capsys)
    assert variables["used"] == pytest.approx(1, abs=0.02)
    assert variables["stored"] > 1.5
    assert variables["accuracy"] > 0.94


def test_nnx_level(capsys):
    variables, _ = run("nnx_level.py", capsys)
    assert variables["used"] <= 16 < variables["stored"]
    assert variables["accuracy"] > 0.94


def test_quantized_file(capsys):
    variables, out = run("quantized_file.py", capsys)
    sizes, accuracies = variables["sizes"], variables["accuracies"]
    assert sizes["int4.gguf"] < sizes["float32.safetensors"] / 6
    assert accuracies["int4.gguf"] == accuracies["int4.safetensors"] > accuracies["float32.safetensors"] - 0.01
    assert "the same weights" in out


def test_mup(tmp_path, monkeypatch):
    """After 10 steps, activation sizes do not depend on width under muP, but do under the standard parametrization."""
    monkeypatch.syspath_prepend(EXAMPLES)
    picture = tmp_path / "mup.png"
    slopes = runpy.run_path(str(EXAMPLES / "mup.py"))["main"](
        ["--widths", "64", "128", "512", "--seeds", "1", "--out", str(picture)]
    )
    assert np.abs(slopes["muP"]).max() < 0.2
    assert slopes["standard"][-1] > 1 and slopes["standard"][-2] > 0.3
    assert picture.stat().st_size > 20_000


def test_seeing_sparsity(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(EXAMPLES)
    picture = tmp_path / "picture.png"
    summary, accuracies = runpy.run_path(str(EXAMPLES / "seeing_sparsity.py"))["main"](
        ["--steps", "80", "--out", str(picture)]
    )
    rows = {r.path: r for r in summary.rows}
    assert rows["dense0/kernel"].pattern == "2:4" and rows["dense0/kernel"].form == "PackedArray"
    assert rows["dense2/kernel"].density == pytest.approx(0.1, abs=1e-4)
    assert accuracies["stored"] == accuracies["sparse"] > 0.9
    assert "BlockSparseArray" in capsys.readouterr().out
    assert picture.stat().st_size > 20_000


def test_weight_clipping_and_all_ten_techniques_at_once(tmp_path, monkeypatch):
    """A minimal run; the slow tests below train with every technique."""
    monkeypatch.syspath_prepend(EXAMPLES)
    import ten_techniques

    every, names = ten_techniques.techniques, ("baseline", "weight clipping", "all ten")
    monkeypatch.setattr(ten_techniques, "techniques", lambda steps: [t for t in every(steps) if t.name in names])
    picture = tmp_path / "picture.png"
    results = ten_techniques.main(["--steps", "30", "--out", str(picture)])
    assert tuple(results) == names
    assert all(r.accuracy > 0.6 for r in results.values())
    assert results["weight clipping"].largest == np.float32(0.15)
    assert results["all ten"].bytes < results["baseline"].bytes / 3
    assert picture.stat().st_size > 20_000


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The results of both backends after a few steps."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        import ten_techniques

        out = tmp_path_factory.mktemp("pictures")
        return {
            backend: ten_techniques.main(
                ["--backend", backend, "--steps", str(STEPS), "--out", str(out / f"{backend}.png")]
            )
            for backend in ("linen", "nnx")
        }, out
    finally:
        sys.path.remove(str(EXAMPLES))


@pytest.mark.slow
def test_linen_and_nnx_agree(results):
    linen, nnx = results[0]["linen"], results[0]["nnx"]
    assert list(linen) == list(nnx)
    for name in linen:
        np.testing.assert_allclose(linen[name].curve, nnx[name].curve, atol=0.004, err_msg=name)
        assert linen[name].sigma == pytest.approx(nnx[name].sigma, rel=1e-3), name
        assert linen[name].bytes == nnx[name].bytes, name


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["linen", "nnx"])
def test_promises_are_kept(results, backend):
    r = results[0][backend]
    kernels = {name: list(result.kernels.values()) for name, result in r.items()}
    assert r["baseline"].accuracy > 0.9
    assert r["spectral norm"].sigma == pytest.approx(1, abs=0.1)
    assert r["weight decay"].norm < r["baseline"].norm
    assert max(np.abs(w).max() for w in kernels["weight clipping"]) == np.float32(0.15)
    assert all(np.unique(w).size <= 256 for w in kernels["weight sharing"])
    assert r["weight sharing"].values < r["baseline"].values
    assert all(np.unique(w).size <= 16 for w in kernels["quantization"])
    assert r["quantization"].bytes < r["baseline"].bytes / 3
    for w in kernels["sparsification"]:
        assert np.sum(w == 0) == np.floor(0.8 * w.size + 0.5)
    assert all(result.cost > 0 for result in r.values())


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["linen", "nnx"])
def test_exported_weights_are_those_of_the_model(results, backend):
    """A plain network with the exported weights is as accurate as the transformed one."""
    for name, result in results[0][backend].items():
        if result.technique.stored_bits is None:
            assert result.stored_accuracy == pytest.approx(result.accuracy, abs=0.003), name


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["linen", "nnx"])
def test_the_picture_is_small(results, backend):
    assert 20_000 < (results[1] / f"{backend}.png").stat().st_size < 500_000


@pytest.mark.slow
def test_channel_pruning_leaves_a_smaller_model_with_the_outputs_of_the_masked_one(monkeypatch, capsys):
    monkeypatch.syspath_prepend(EXAMPLES)
    import channel_pruning

    result = channel_pruning.main(["--quick", "--remove", "0.5"])
    assert set(result.groups.values()) == {(96, 48), (48, 24), (128, 64)} and len(result.groups) == 4
    assert result.groups["project0, project1, stem", "expand0, expand1, hidden"] == (48, 24)
    assert result.difference < 1e-5
    assert result.accuracy["masked"] == pytest.approx(result.accuracy["removed"], abs=0.004)
    assert result.entries[1] < result.entries[0] / 3
    assert "Removed and masked differ by" in capsys.readouterr().out


@pytest.mark.slow
def test_a_gan_with_either_critic(tmp_path, monkeypatch, capsys):
    """The slope bounds are valid, and the upper bound with normalized convolutions is 1."""
    monkeypatch.syspath_prepend(EXAMPLES)
    import gan

    picture = tmp_path / "gan.png"
    critics = ["--critics", "clipping", "ConvSpectralNorm"]
    results = gan.main([*critics, "--steps", "20", "--width", "8", "--out", str(picture)])
    for r in results.values():
        assert (np.array(r.curves.lower) <= np.array(r.curves.upper) * (1 + 1e-4)).all()
        assert np.isfinite(r.curves.distance).all() and r.samples.shape == (64, 8, 8, 1)
    clipped, normalized = results["clipping"], results["ConvSpectralNorm"]
    assert normalized.curves.upper[-1] == pytest.approx(1, abs=0.03)
    assert normalized.curves.lower[-1] > 0.1
    assert clipped.curves.upper[-1] < 0.1
    assert picture.stat().st_size > 20_000
    assert "(real, held out)" in capsys.readouterr().out


@pytest.mark.slow
def test_sparse_training_keeps_the_sparsity_exactly(monkeypatch, capsys, tmp_path):
    """RigL only, since compilation dominates the time."""
    monkeypatch.syspath_prepend(EXAMPLES)
    import sparse_training

    for name in ("one-shot", "gradual"):
        monkeypatch.delitem(sparse_training.METHODS, name)
    picture = tmp_path / "sparse.png"
    options = ["--sparsity", "0.9", "--seeds", "1", "--steps", "8", "--out", str(picture)]
    results = sparse_training.main(options)
    kernels = 3 * 3 * 16 + 3 * 3 * 16 * 32 + 128 * 64 + 64 * 10
    assert results["RigL"].sparsity == pytest.approx((kernels - 1358) / kernels, abs=1e-6)
    assert results["dense"].sparsity == 0
    assert picture.stat().st_size > 20_000
    assert "± 0.0%" in capsys.readouterr().out
