"""`jaxweights inspect` against float64 NumPy, on files of every kind, and its errors."""

import contextlib
import io
import json
import re
import struct
import sys
import zipfile

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from numpy.lib import format as npy

import jaxweights as jw
from jaxweights import files
from jaxweights.command.main import main
from jaxweights.command.portrait import BITS, EDGES, portrait
from jaxweights.command.statistics import largest_singular_value, statistics

RNG = np.random.default_rng(0)


def planted(*shape, dtype=np.float32):
    """Normal entries, a fifth of them 0, and a few far out."""
    w = RNG.normal(size=shape) * (RNG.random(shape) < 0.8) + 0.1
    w[w == 0.1] = 0
    w.reshape(-1)[:3] = 40, -50, 60
    return w.astype(dtype)


TREE = {
    "dense": {"kernel": planted(96, 64), "bias": np.zeros(64, np.float32)},
    "conv": {"weight": planted(16, 8, 3, 3), "bias": np.ones(16, np.float32)},
    "half": {"weight": planted(64, 96, dtype=np.float16)},
    "stack": {"kernel": planted(3, 32, 48), "bias": np.ones((3, 48), np.float32)},
    "steps": np.array([0, 3, 0, 7]),
    "scale": np.float32([[2.0]]).reshape(()),
}
MATRICES = {
    "dense.kernel": lambda w: [w],
    "conv.weight": lambda w: [w.reshape(16, -1)],
    "half.weight": lambda w: [w],
    "stack.kernel": list,
}


def flat(tree, above=""):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flat(value, f"{above}{key}.")
        else:
            yield above + key, value


def inspected(path, capsys, *options):
    """{name: what `--json` tells of it}, and the totals."""
    assert main(["inspect", str(path), "--json", *options]) == 0
    found = json.loads(capsys.readouterr().out)
    return {row["name"]: row for row in found["tensors"]}, found["totals"]


def write(kind, folder):
    if kind == "npz":
        np.savez_compressed(folder / "m.npz", **dict(flat(TREE)))
        return folder / "m.npz"
    if kind == "orbax":
        ocp = pytest.importorskip("orbax.checkpoint")
        with ocp.PyTreeCheckpointer() as checkpointer:
            checkpointer.save(folder / "m", TREE)
        return folder / "m"
    if kind == "folder":
        files.save(folder / "model.safetensors", TREE)
        return folder
    files.save(folder / f"m.{kind}", TREE)
    return folder / f"m.{kind}"


@pytest.mark.parametrize("kind", ["safetensors", "gguf", "npz", "folder", "orbax"])
def test_numbers_are_those_of_numpy(kind, tmp_path, capsys):
    rows, totals = inspected(write(kind, tmp_path), capsys)
    assert set(rows) == {name for name, _ in flat(TREE)}
    for name, w in flat(TREE):
        row, x = rows[name], np.asarray(w, np.float64)
        assert (row["shape"], row["dtype"], row["nbytes"]) == (list(w.shape), str(w.dtype), w.nbytes), name
        np.testing.assert_allclose(row["density"], np.mean(x != 0), rtol=1e-12)
        if w.dtype.kind == "f":
            far = np.abs(x - x.mean()) > 6 * x.std()
            expected = x.mean(), x.std(), np.abs(x).max(), far.mean()
            got = [row[key] for key in ("mean", "std", "largest", "outliers")]
            np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-15)
        if name in MATRICES:
            sigma = max(np.linalg.norm(m, 2) for m in MATRICES[name](x))
            np.testing.assert_allclose(row["sigma"], sigma, rtol=1e-9)
            assert far.any() and not row["is_bound"]
        else:
            assert row.get("sigma") is None
    assert totals["size"] == sum(w.size for _, w in flat(TREE))
    assert totals["nbytes"] == sum(w.nbytes for _, w in flat(TREE))
    np.testing.assert_allclose(totals["density"] * totals["size"], sum((w != 0).sum() for _, w in flat(TREE)))


def test_stored_weights_are_shown_as_what_they_stand_for(tmp_path, capsys):
    w = planted(128, 64)
    codebook, index = jnp.linspace(-1, 1, 16), RNG.integers(0, 16, (128, 64))
    halves = jw.formats.integers(4, block=64, scale="float16")
    weights = {
        "int4 g64": jw.quantize(w, jw.formats.integers(4, block=64)),
        "int3 g32 zp": jw.quantize(w, jw.formats.integers(3, block=32, symmetric=False)),
        "nf4": jw.quantize(w, "nf4"),
        "2:4 float32": jw.sparse.pack(w * (np.arange(128) % 4 < 2)[:, None]),
        "blocks 16×16 float32": jw.sparse.pack_blocks(jnp.asarray(w), block=(16, 16)),
        "clustered 16": jw.store_clusters(codebook, jnp.asarray(index)),
    }
    tree = {f"w{i}": stored for i, stored in enumerate(weights.values())}
    files.save(tmp_path / "ours.safetensors", tree)
    files.save(tmp_path / "g.safetensors", {"a": {"kernel": jw.quantize(w, halves)}}, format="gptq")
    files.save(tmp_path / "b.safetensors", {"a": {"kernel": weights["nf4"]}}, format="bitsandbytes")
    files.save(tmp_path / "m.gguf", {"a": jw.quantize(w, jw.formats.integers(4, block=32, scale="float16"))})
    rows, _ = inspected(tmp_path / "ours.safetensors", capsys)
    assert [row["dtype"] for row in rows.values()] == list(weights)
    for name, stored in tree.items():
        dense = np.asarray(stored.todense(), np.float64)
        assert rows[name]["shape"] == [128, 64]
        assert rows[name]["nbytes"] == stored.nbytes
        np.testing.assert_allclose(rows[name]["density"], np.mean(dense != 0))
        np.testing.assert_allclose(rows[name]["sigma"], np.linalg.norm(dense, 2), rtol=1e-6)
    for file, dtype in (("g.safetensors", "GPTQ int4 g64"), ("b.safetensors", "bitsandbytes nf4"), ("m.gguf", "Q4_0")):
        (row,) = inspected(tmp_path / file, capsys)[0].values()
        assert (row["dtype"], row["shape"]) == (dtype, [64, 128])


def test_sigma_of_large_matrices_is_a_close_bound():
    """The spectrum of noise is the hardest: no gap below its edge."""
    for w in (RNG.normal(size=(700, 900)), RNG.normal(size=(600, 2000)) * 1e30, RNG.normal(size=(2, 600, 600)) + 0.1):
        w = w.astype(np.float32)
        axes = jw.Axes(-2, -1, batch=tuple(range(w.ndim - 2)))
        sigma, is_bound = largest_singular_value(w, axes, float(np.abs(w).max()))
        exact = np.linalg.norm(w.astype(np.float64), 2, (-2, -1)).max()
        assert 0.99 * exact <= sigma <= exact * (1 + 1e-6)
        assert is_bound or sigma >= exact * (1 - 1e-3)
    low_rank = np.outer(np.arange(700.0), np.ones(600)).astype(np.float32)
    sigma, is_bound = largest_singular_value(low_rank, jw.Axes(), 700.0)
    assert not is_bound
    np.testing.assert_allclose(sigma, np.linalg.norm(np.arange(700.0)) * 600**0.5, rtol=1e-6)


@pytest.mark.parametrize("value", [1e-42, 1e30, 3e38, 1e-300])
def test_extreme_values_neither_overflow_nor_vanish(value):
    dtype = np.float32 if 1e-45 < value < 3.5e38 else np.float64
    w = np.full((8, 4), value, dtype) * np.array([1, -1, 1, -1], dtype)
    s = statistics(w, jw.Axes())
    np.testing.assert_allclose([s.std, s.largest, s.sigma], [float(w[0, 0])] * 2 + [float(w[0, 0]) * 32**0.5])


def test_what_is_not_finite_or_empty(tmp_path, capsys):
    tree = {"nan": np.float32([1, np.nan, 0]), "inf": np.float32([[np.inf, 1]]), "empty": np.zeros((0, 4), np.float32)}
    files.save(tmp_path / "m.safetensors", tree)
    rows, totals = inspected(tmp_path / "m.safetensors", capsys)
    assert [rows[name]["not_finite"] for name in tree] == [1, 1, 0] and totals["not_finite"] == 2
    assert rows["nan"]["density"] == 2 / 3 and rows["inf"]["sigma"] is None and rows["empty"]["shape"] == [0, 4]
    assert main(["inspect", str(tmp_path / "m.safetensors")]) == 0
    assert "NaN or infinity in 2 tensors: nan, ..." in capsys.readouterr().out


def test_where_and_sort(tmp_path, capsys):
    files.save(tmp_path / "m.safetensors", TREE)
    rows, _ = inspected(tmp_path / "m.safetensors", capsys, "--where", "*weight", "--where", "dense.*")
    assert set(rows) == {"conv.weight", "half.weight", "dense.kernel", "dense.bias"}
    for order, key in (("bytes", "nbytes"), ("density", "density"), ("sigma", "sigma"), ("outliers", "outliers")):
        rows, _ = inspected(tmp_path / "m.safetensors", capsys, "--sort", order)
        values = [row[key] for row in rows.values() if row.get(key) is not None]
        assert values == sorted(values, reverse=True) and len(set(values)) > 2
    rows, _ = inspected(tmp_path / "m.safetensors", capsys, "--sort", "name")
    assert list(rows) == sorted(rows)


LONG = "encoder.layer.11.attention.self.query_projection.kernel"


def test_a_pipe_gets_whole_names_and_no_escapes(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    files.save(tmp_path / "m.safetensors", {f"{'very_' * 50}long": np.ones((2, 2)), LONG.replace(".", "_"): np.ones(3)})
    assert main(["inspect", str(tmp_path / "m.safetensors")]) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert "\x1b" not in out and f"{'very_' * 50}long" in out
    assert lines[-1].split() == ["2", "tensors", "7", "100%", "56", "B"]
    assert [line.split()[1:3] for line in lines[2:4]] == [["2×2", "float64"], ["3", "float64"]]


def test_a_narrow_terminal_gets_short_names_and_whole_numbers(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    tree = {"encoder": {"layer": [{"attention": {"self": {"query_projection": {"kernel": np.ones((64, 32))}}}}] * 2}}
    files.save(tmp_path / "m.safetensors", tree)
    assert main(["inspect", str(tmp_path / "m.safetensors")]) == 0
    lines = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out).splitlines()
    rows = [line for line in lines if "64×32" in line]
    assert len(rows) == 2 and all("…" in row and len(row) <= 80 and "16.4 kB" in row for row in rows)
    assert len({row.split()[0] for row in rows}) == 2


def test_names_cannot_move_the_cursor(tmp_path, capsys):
    np.savez(tmp_path / "m.npz", **{"\x1b[2J[bold]x\n": np.ones(2)})
    assert main(["inspect", str(tmp_path / "m.npz")]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out and r"\x1b[2J[bold]x\n" in out


def test_an_output_without_unicode(tmp_path, monkeypatch):
    np.savez(tmp_path / "m.npz", **{"ä": np.ones((2, 2), np.float32)})
    for encoding in ("ascii", "cp1252"):
        for arguments in (["--help"], ["inspect", str(tmp_path / "m.npz")]):
            out = io.TextIOWrapper(io.BytesIO(), encoding, write_through=True)
            monkeypatch.setattr(sys, "stdout", out)
            with contextlib.suppress(SystemExit):
                assert main(arguments) == 0
            assert "?" in out.buffer.getvalue().decode(encoding)  # σ
    out = io.TextIOWrapper(io.BytesIO(), "ascii", write_through=True)
    monkeypatch.setattr(sys, "stdout", out)
    assert main(["inspect", str(tmp_path / "m.npz"), "--json"]) == 0
    (row,) = json.loads(out.buffer.getvalue())["tensors"]
    assert row["name"] == "ä"


def test_a_guess_is_marked(tmp_path, capsys):
    files.save(tmp_path / "m.safetensors", {"a": {"kernel": np.ones((2, 4, 8), np.float32)}})
    assert main(["inspect", str(tmp_path / "m.safetensors")]) == 0
    out = capsys.readouterr().out
    assert "8?" in out.split() and "1 weight could be read otherwise: a.kernel was read as win in out" in out


def pickled(path):
    np.savez(path, a=np.array([{}], dtype=object))


def shrunk(path, n):
    path.write_bytes(path.read_bytes()[:n])


def index(path):
    path.write_text(json.dumps({"weight_map": {"a": "../a.safetensors"}}))


def pointer(path):
    path.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{64 * '0'}\nsize 123\n")


def pointers(path):
    path.mkdir()
    pointer(path / "model-1.safetensors")
    weights = {"weight_map": {"a": "model-1.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(weights))


def bomb(path):
    """A small file that tells of a petabyte."""
    with zipfile.ZipFile(path, "w") as archive, archive.open("a.npy", "w") as file:
        npy.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": (2**48,)})


BAD = {
    "missing.safetensors": (lambda path: None, "missing.safetensors: no such file"),
    "empty.safetensors": (lambda path: path.write_bytes(b""), "empty.safetensors is empty"),
    "noise.safetensors": (lambda path: path.write_bytes(b"x" * 100), "it is truncated, or no safetensors file"),
    "short.safetensors": (lambda path: (files.save(path, TREE), shrunk(path, 9000)), "the file is truncated"),
    "version.gguf": (lambda path: path.write_bytes(b"GGUF" + struct.pack("<IQQ", 9, 0, 0)), "is GGUF version 9"),
    "short.gguf": (lambda path: (files.save(path, TREE), shrunk(path, 9000)), "the file is truncated"),
    "pickle.npz": (pickled, "of Python objects"),
    "noise.npz": (lambda path: path.write_bytes(b"PK" + bytes(99)), "damaged, or no .npz file"),
    "short.npz": (lambda path: (np.savez(path, a=np.ones(99)), shrunk(path, 500)), "damaged, or no .npz file"),
    "bomb.npz": (bomb, "needs 1125899906842624 bytes"),
    "model.pt": (lambda path: path.write_bytes(b"PK"), "save it with safetensors.torch.save_file. What is read: .safe"),
    "w.npy": (lambda path: path.write_bytes(b""), "save it with numpy.savez"),
    "model.h5": (lambda path: path.write_bytes(b""), "no kind that is read. What is read: .safetensors, .gguf,"),
    "lfs.safetensors": (pointer, "lfs.safetensors is a pointer of Git LFS"),
    "lfs.gguf": (pointer, "lfs.gguf is a pointer of Git LFS"),
    "lfs.npz": (pointer, "lfs.npz is a pointer of Git LFS"),
    "shards": (pointers, "model-1.safetensors is a pointer of Git LFS"),
    "m.safetensors.index.json": (index, "which is no safetensors file beside it"),
    "folder": (lambda path: path.mkdir(), "has no model.safetensors. What is read: "),
    "orbax": (lambda path: (path.mkdir(), (path / "_METADATA").write_text("{")), "is damaged"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_one_line_on_stderr(name, tmp_path, capfd):
    make, message = BAD[name]
    make(tmp_path / name)
    assert main(["inspect", str(tmp_path / name)]) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("jaxweights inspect: error: ") and err.count("\n") == 1
    assert message in err and "Traceback" not in err


def test_bad_options(tmp_path, capsys):
    files.save(tmp_path / "m.safetensors", TREE)
    for options, message in (
        (["--where", "*.kernels"], "--where '*.kernels' matches nothing. The names are: steps, dense.kernel"),
        (["--plot", "page.jpg"], "--plot must end in .png, .svg, .pdf, got 'page.jpg'"),
        (["--plot", str(tmp_path / "no" / "page.png")], "is no folder: make it first"),
    ):
        assert main(["inspect", str(tmp_path / "m.safetensors"), *options]) == 2
        out, err = capsys.readouterr()
        assert out == "" and message in err


def test_portraits():
    """The counts, singular values and errors of a picture, by NumPy and by `quantize`."""
    w = planted(96, 64)
    p = portrait("w", w, jw.Axes())
    kept = w[w != 0].astype(np.float64)
    counts = np.histogram(np.clip(kept / kept.std(), EDGES[0], EDGES[-1]), EDGES)[0]
    np.testing.assert_array_equal(p.counts, counts)
    singular = np.linalg.svd(w.astype(np.float64), compute_uv=False)
    np.testing.assert_allclose(p.singular_values * np.abs(w).max(), singular, rtol=1e-4)
    for bits, error in zip(BITS, p.errors, strict=True):
        q = np.asarray(jw.quantize(w, bits).todense())
        np.testing.assert_allclose(error, np.linalg.norm(q - w) / np.linalg.norm(w), rtol=1e-4)
    assert portrait("w", np.zeros((4, 4), np.float32), jw.Axes()) is None


def test_the_page(tmp_path, capsys):
    files.save(tmp_path / "m.safetensors", TREE | {"b": np.ones((4, 4), ml_dtypes.bfloat16)})
    page = tmp_path / "page.svg"
    assert main(["inspect", str(tmp_path / "m.safetensors"), "--plot", str(page)]) == 0
    assert page.read_text().startswith("<?xml") and "dense.kernel" in capsys.readouterr().out
    files.save(tmp_path / "v.safetensors", {"bias": np.zeros(3)})
    assert main(["inspect", str(tmp_path / "v.safetensors"), "--plot", str(tmp_path / "v.png")]) == 0
    assert (tmp_path / "v.png").read_bytes()[:4] == b"\x89PNG"


def test_coded_tensors_are_shown_as_what_they_stand_for(tmp_path, capsys):
    pytest.importorskip("constriction")
    w = planted(128, 64) * (RNG.random((128, 64)) < 0.2)
    tree = {"a": {"kernel": jw.quantize(w, 4)}, "b": {"kernel": w.astype(np.float32)}}
    files.save(tmp_path / "plain.safetensors", tree)
    files.save(tmp_path / "m.safetensors", tree, entropy_coding=True)
    rows, totals = inspected(tmp_path / "m.safetensors", capsys)
    plain, total = inspected(tmp_path / "plain.safetensors", capsys)
    sizes = [{name: row.pop("nbytes") for name, row in of.items()} for of in (rows, plain)]
    assert rows == plain and totals["nbytes"] < total["nbytes"] and sizes[0]["a.kernel"] < sizes[1]["a.kernel"]
    assert main(["diff", str(tmp_path / "plain.safetensors"), str(tmp_path / "m.safetensors")]) == 0
