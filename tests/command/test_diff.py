"""`jaxweights diff` against float64 NumPy, and its exit codes."""

import contextlib
import json
import os
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

import jaxweights as jw
from jaxweights import files
from jaxweights.command.main import main

RNG = np.random.default_rng(0)
W, V = RNG.normal(size=(128, 64)).astype(np.float32), RNG.normal(size=(3, 3, 4, 8)).astype(np.float32)
A = {"a": {"kernel": W, "bias": np.ones(64, np.float32)}, "c": {"kernel": V}, "same": W, "left": V, "n": np.arange(4)}


@pytest.fixture
def compared(tmp_path, capsys):
    """Gives a function of two trees and of options, which returns the exit code and what is printed."""

    def compare(a, b, *options):
        for name, tree in (("a", a), ("b", b)):
            files.save(tmp_path / f"{name}.safetensors", tree)
        code = main(["diff", str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors"), *options])
        return code, capsys.readouterr().out

    return compare


def rows(out):
    return {row["name"]: row for row in json.loads(out)["tensors"]}


def test_distances_are_those_of_numpy(compared):
    stored = jw.quantize(W, jw.formats.integers(4, block=32))
    b = {**A, "a": {"kernel": stored, "bias": A["a"]["bias"].astype(ml_dtypes.bfloat16)}, "c": {"kernel": V[:1]}}
    del b["left"]
    b |= {"right": V, "n": np.array([0, 1, 2, 5])}
    code, out = compared(A, b, "--json")
    found, totals = rows(out), json.loads(out)["totals"]
    assert code == 1
    changes = {name: row["changes"] for name, row in found.items() if row["changes"]}
    expected = {"a.kernel": ["dtype", "values"], "a.bias": ["dtype"], "c.kernel": ["shape"]}
    assert changes == expected | {"left": ["only in A"], "right": ["only in B"], "n": ["values"]}
    x, y = W.astype(np.float64), np.asarray(stored.todense(), np.float64)
    error = np.linalg.norm(y - x) / np.linalg.norm(x)
    row = found["a.kernel"]
    cosine = np.sum(x * y) / np.linalg.norm(x) / np.linalg.norm(y)
    got = [row[key] for key in ("error", "cosine", "largest", "snr")]
    np.testing.assert_allclose(got, [error, cosine, np.abs(y - x).max(), -20 * np.log10(error)], rtol=1e-9)
    assert row["dtypes"] == ["float32", "int4 g32"] and row["nbytes"] == [W.nbytes, stored.nbytes]
    assert found["c.kernel"]["shapes"] == [[3, 3, 4, 8], [1, 3, 4, 8]] and found["c.kernel"]["error"] is None
    np.testing.assert_allclose(found["n"]["error"], 2 / 14**0.5)
    assert (found["a.bias"]["error"], found["a.bias"]["cosine"]) == (0, pytest.approx(1, abs=1e-12))
    assert {**totals, "nbytes": 0} == {
        **{"tensors": 7, "same": 1, "only_in_A": 1, "only_in_B": 1, "shape": 1, "dtype": 2, "values": 2, "nbytes": 0}
    }


@pytest.mark.parametrize(
    ("a", "b", "same", "error"),
    [
        (np.float64([1e300, -1e300]), np.float64([1e300, 1e300]), False, 2**0.5),
        (np.float64([1e-300, 0]), np.float64([0, 1e-300]), False, 2**0.5),
        (np.zeros(3), np.ones(3), False, None),
        (np.zeros(3), np.zeros(3), True, 0),
        (np.float32([np.nan, 1]), np.float32([np.nan, 1]), True, None),
        (np.float32([np.nan, 1]), np.float32([np.nan, 2]), False, None),
        (np.int64([2**60]), np.int64([2**60 + 1]), False, 0),
        (np.zeros((0, 3)), np.zeros((0, 3)), True, 0),
        (np.complex64([1j]), np.complex64([2j]), False, None),
        (np.float32([3]).reshape(()), np.float32([4]).reshape(()), False, 1 / 3),
    ],
)
def test_extremes(a, b, same, error, compared):
    code, out = compared({"x": a}, {"x": b}, "--json")
    row = rows(out)["x"]
    assert code == (0 if same else 1) and row["changes"] == ([] if same else ["values"])
    assert row["error"] == (None if error is None else pytest.approx(error, rel=1e-12))


def test_the_table_shows_what_differs(compared):
    code, out = compared(A, {**A, "same": W + 1, "left": V})
    assert code == 1 and "a.kernel" not in out
    (line,) = [line for line in out.splitlines() if line.startswith("same")]
    snr = 20 * np.log10(np.linalg.norm(W) / np.linalg.norm((W + 1) - W))
    assert line.split()[1:4] == ["values", "128×64", "float32"] and f"{snr:.1f} dB" in line
    assert "6 tensors: 5 the same, 1 different (1 values)" in out
    code, out = compared(A, {**A, "same": W + 1}, "--where", "a.*")
    assert code == 0 and out.startswith("2 tensors: 2 the same, 0 different\n")


def test_files_of_several_kinds_are_compared(tmp_path, capsys):
    np.savez(tmp_path / "a.npz", x=W)
    files.save(tmp_path / "b.gguf", {"x": W})
    assert main(["diff", str(tmp_path / "a.npz"), str(tmp_path / "b.gguf")]) == 0
    assert capsys.readouterr().out.startswith("1 tensor: 1 the same, 0 different\n")


def test_what_compress_renamed_and_transposed_is_compared(tmp_path, capsys):
    """A kernel (in, out) of Flax is a weight (out, in) in compressed-tensors."""
    files.save(tmp_path / "a.safetensors", {"dense": {"kernel": W, "bias": np.ones(64, np.float32)}})
    small = str(tmp_path / "b.safetensors")
    assert main(["compress", str(tmp_path / "a.safetensors"), "-o", small, "--bits", "8"]) == 0
    capsys.readouterr()
    assert "weight" in files.load(small)["dense"]
    assert main(["diff", str(tmp_path / "a.safetensors"), small, "--json"]) == 1
    row = rows(capsys.readouterr().out)["dense.kernel"]
    assert row["changes"] == ["dtype", "values"] and row["shapes"][0] == row["shapes"][1] == [128, 64]
    q = np.asarray(jw.quantize(W, 8).todense(), np.float64)
    np.testing.assert_allclose(row["error"], np.linalg.norm(q - W) / np.linalg.norm(W), rtol=1e-2)


def test_a_damaged_file_ends_the_process_with_2(tmp_path):
    """The one test of `python -m jaxweights`. The others call `main`, which gives the exit code."""
    files.save(tmp_path / "a.safetensors", {"x": W})
    (tmp_path / "b.safetensors").write_bytes(b"{}")
    command = [sys.executable, "-m", "jaxweights", "diff", *(str(tmp_path / f"{n}.safetensors") for n in "ab")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("jaxweights diff: error: b.safetensors has 2 bytes") and done.stderr.count("\n") == 1


def test_a_reader_that_has_seen_enough_is_no_error(tmp_path, capsys, monkeypatch):
    np.savez(tmp_path / "a.npz", x=W)
    ends = os.pipe()
    os.close(ends[0])
    with contextlib.suppress(BrokenPipeError), os.fdopen(ends[1], "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        code = main(["diff", str(tmp_path / "a.npz"), str(tmp_path / "a.npz")])
    assert code == 141 and capsys.readouterr().err == ""


@pytest.mark.parametrize("command", ["inspect", "diff", "compress", "expand"])
def test_help_teaches(command, capsys):
    with pytest.raises(SystemExit) as info:
        main([command, "--help"])
    out = capsys.readouterr().out
    assert info.value.code == 0 and "examples:" in out and f"jaxweights {command}" in out
    assert max(map(len, out.splitlines())) <= 120
