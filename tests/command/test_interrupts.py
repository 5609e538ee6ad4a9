"""`jaxweights compress` that is interrupted: it goes on where it stopped, and the output is whole or not there."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from command.models import compress, torch_like

from jaxweights import files
from jaxweights.command import job


class Killed(BaseException):
    """Not an error that anything catches."""


@pytest.mark.parametrize("stage", ["first", "second", "written", "moved"])
def test_a_run_that_was_interrupted_goes_on(stage, model, tmp_path, monkeypatch):
    whole, out = tmp_path / "whole.safetensors", tmp_path / "small.safetensors"
    assert compress(model, "-o", whole, "--bits", 4, "--block", 32) == 0
    made = []
    original = job._made

    def counted(step, *rest):
        made.append(step.name)
        if (stage, len(made)) in {("first", 1), ("second", 3)}:
            raise Killed
        return original(step, *rest)

    monkeypatch.setattr(job, "_made", counted)
    if stage in ("written", "moved"):
        replace = os.replace

        def killed(source, target):
            last = str(target) == str(out) if stage == "moved" else str(target).endswith("whole.safetensors")
            if last:
                raise Killed
            replace(source, target)

        monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(Killed):
        compress(model, "-o", out, "--bits", 4, "--block", 32)
    assert not out.exists()
    finished = {"first": 0, "second": 2}.get(stage, 4)
    monkeypatch.undo()
    monkeypatch.setattr(job, "_made", lambda *a: (made.append(""), original(*a))[1])
    made.clear()
    assert compress(model, "-o", out, "--bits", 4, "--block", 32) == 0
    assert len(made) == 4 - finished
    assert out.read_bytes() == whole.read_bytes()
    assert {p.name for p in tmp_path.iterdir()} == {"model.safetensors", "whole.safetensors", "small.safetensors"}


def test_another_recipe_or_source_starts_anew(model, tmp_path, monkeypatch):
    out = tmp_path / "small.safetensors"
    original, stop = job._made, []

    def two(step, *rest):
        if len(stop) == 2:
            raise Killed
        stop.append(step.name)
        return original(step, *rest)

    for change in ("recipe", "source"):
        stop.clear()
        monkeypatch.setattr(job, "_made", two)
        with pytest.raises(Killed):
            compress(model, "-o", out, "--bits", 4)
        monkeypatch.undo()
        if change == "source":
            files.save(model, torch_like(seed=1), metadata={"format": "pt"})
        assert compress(model, "-o", out, "--bits", 3 if change == "recipe" else 4) == 0
        once = out.read_bytes()
        assert compress(model, "-o", out, "--bits", 3 if change == "recipe" else 4, "--force") == 0
        assert out.read_bytes() == once
        out.unlink()


def test_an_old_folder_comes_back(model, tmp_path, monkeypatch, capsys):
    folder, out, replace = tmp_path / "model", tmp_path / "small", os.replace
    folder.mkdir()
    model.rename(folder / "model.safetensors")
    assert compress(folder, "-o", out, "--bits", 4) == 0
    old = {p.name: p.read_bytes() for p in out.iterdir()}

    def killed(source, target):
        if target == out:
            raise KeyboardInterrupt
        replace(source, target)

    for again in (["--bits", 3], ["--bits", 3, "--where", "none", "--force"]):
        monkeypatch.setattr(os, "replace", killed)
        assert compress(folder, "-o", out, "--bits", 8, "--force") == 130
        assert not out.exists()
        monkeypatch.undo()
        assert compress(folder, "-o", out, *again) == 2
        assert {p.name: p.read_bytes() for p in out.iterdir()} == old


@pytest.mark.slow
def test_killed_at_ten_random_moments(tmp_path):
    """Moments are drawn from the time of the work itself, without the start of Python and JAX."""
    rng = np.random.default_rng(0)
    tree = {f"layer{i}": {"weight": rng.normal(size=(1024, 1024)).astype("f4")} for i in range(24)}
    files.save(tmp_path / "model.safetensors", tree)
    whole, out = tmp_path / "whole.safetensors", tmp_path / "small.safetensors"
    command = [sys.executable, "-m", "jaxweights", "compress", str(tmp_path / "model.safetensors"), "--prune", "0.3"]
    command += ["--bits", "4", "--block", "64", "-o"]

    def start(path):
        """Starts the command and waits until it has opened the model."""
        done = subprocess.DEVNULL
        process = subprocess.Popen([*command, path], stdout=done, stderr=done, env=os.environ | {"XLA_FLAGS": ""})
        maps = Path(f"/proc/{process.pid}/maps")
        while "model.safetensors" not in maps.read_text() and process.poll() is None:
            time.sleep(0.005)
        return process

    process = start(whole)
    begin = time.perf_counter()
    assert process.wait() == 0
    seconds = time.perf_counter() - begin
    finished = killed = 0
    moments = random.Random(0)
    for _ in range(10):
        process = start(out)
        try:
            process.wait(moments.uniform(0, 0.4) * seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            killed += process.wait() == -signal.SIGKILL
        left = {p.name for p in tmp_path.iterdir()} - {"model.safetensors", "whole.safetensors", "small.safetensors"}
        assert left <= {".small.safetensors.jaxweights"}
        n = len(list((tmp_path / ".small.safetensors.jaxweights").glob("0*.safetensors")))
        if out.exists():  # it was done before it was killed, or killed in its last instant
            assert out.read_bytes() == whole.read_bytes()
            out.unlink()
            finished = 0
        else:
            assert n >= finished
            finished = n
    assert killed > 5  # 9 if all runs are as fast as the first, 7 if they are twice as fast
    assert start(out).wait() == 0
    assert out.read_bytes() == whole.read_bytes()
    assert {p.name for p in tmp_path.iterdir()} == {"model.safetensors", "whole.safetensors", "small.safetensors"}
