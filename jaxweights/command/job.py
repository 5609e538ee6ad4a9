"""Compresses a file, tensor by tensor."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

import jaxweights
from jaxweights.command import source
from jaxweights.command.assemble import assemble
from jaxweights.command.output import check_out
from jaxweights.command.plan import Step, plan
from jaxweights.command.progress import bar
from jaxweights.command.report import print_summary
from jaxweights.command.spool import Spool, fingerprint, restore
from jaxweights.command.statistics import parts
from jaxweights.command.targets import CODECS, entropy_coded, target_of, tensors
from jaxweights.core.calibration import InputStats
from jaxweights.core.stored import is_stored
from jaxweights.models.one_shot.fit import fit
from jaxweights.models.recipe import Recipe


def compress(path: Path, out: Path, recipe: Recipe, *, force: bool = False) -> None:
    """Writes `out` from the model at `path`, and prints a summary.

    Args:
      path: the model.
      out: a .safetensors or .gguf file; or a folder, if `path` is one.
      recipe: what is done.
      force: whether `out` is replaced if it exists.
    """
    restore(out)
    check_out(path, out, (".safetensors", ".gguf", *([""] if path.is_dir() else [])), force)
    model = source.open(path)
    to = target_of(recipe, out.suffix)
    steps = plan(model.items, recipe, to)
    config = _config_of(path) if not out.suffix and to in CODECS else None
    job = {"jaxweights": jaxweights.__version__, "source": fingerprint(model.files), "recipe": recipe.toml(), "to": to}
    with Spool(out, job) as spool:
        with bar("compress", sum(step.entry.nbytes for step in steps if not step.kept)) as advance:
            for i, step in enumerate(steps):
                if step.kept:
                    continue
                if not spool.has(i):
                    spool.put(i, *_made(step, to, recipe.entropy_coding, model.read(step.name)))
                advance(step.entry.nbytes)
        about = [None if step.kept else spool.about(i) for i, step in enumerate(steps)]
        whole = spool.whole(out.suffix)
        if out.suffix:
            assemble(whole, to, steps, spool, model, recipe)
        else:
            shutil.rmtree(whole, ignore_errors=True)
            whole.mkdir()
            quantization = assemble(whole / "model.safetensors", to, steps, spool, model, recipe)
            _copy_rest(path, whole, config, quantization)
        spool.finish(whole)
    print_summary(model, out, to, steps, about)


def _made(step: Step, to: str, coding: bool, w: np.ndarray) -> tuple[Mapping[str, np.ndarray], dict[str, Any]]:
    """(the tensors of the new weight, what there is to tell of it)."""
    new = fit(step.methods, step.name, w, InputStats(axes=step.axes))
    made, coded = tensors(to, step.name, new), {}
    if coding:
        made, coded = entropy_coded(step.name, new, made)
    error = relative_error(w, np.asarray(new.todense() if is_stored(new) else new))
    if not math.isfinite(error):
        raise ValueError(f"{step.name!r} has weights that are not finite: mend them, or give a rule with keep = true")
    return made, {"bytes": sum(a.nbytes for a in made.values()), "error": error, "coded": coded}


def relative_error(w: np.ndarray, new: np.ndarray) -> float:
    """‖new − w‖/‖w‖, in float64."""
    change = size = 0.0
    for a, b in parts(w, new):
        change += float(np.dot(b - a, b - a))
        size += float(np.dot(a, a))
    return math.sqrt(change / size) if size else math.sqrt(change)


def _config_of(path: Path) -> dict[str, Any] | None:
    """What is in the config.json of a folder; None if it has none."""
    told = path / "config.json"
    if not told.exists():
        return None
    try:
        config = json.loads(told.read_text("utf-8"))
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{told} is no JSON: {e}") from e
    if not isinstance(config, dict):
        raise ValueError(f"{told} must be a JSON object, got {type(config).__name__}")
    return config


def _copy_rest(path: Path, folder: Path, config: Mapping[str, Any] | None, quantization: Mapping[str, Any]) -> None:
    """Copies what is no weight from one folder to another; config.json gets the `quantization_config`."""

    def left_out(_: str, names: list[str]) -> list[str]:
        return [n for n in names if Path(n).suffix in _WEIGHTS or n.endswith(".index.json") or n == ".git"]

    shutil.copytree(path, folder, ignore=left_out, copy_function=shutil.copyfile, dirs_exist_ok=True)
    if config is not None and quantization:
        text = json.dumps({**config, "quantization_config": quantization}, indent=2)
        (folder / "config.json").write_text(text + "\n", "utf-8")


_WEIGHTS = (".safetensors", ".gguf", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".npz")
