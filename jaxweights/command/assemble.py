"""Puts the output of `jaxweights compress` together from the source and from the finished tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxweights.command.plan import Step
from jaxweights.command.source import Source
from jaxweights.command.spool import Spool
from jaxweights.command.targets import CODECS, is_transposed
from jaxweights.files import gguf, gguf_blocks, safetensors
from jaxweights.files.load import CODED_VERSION, CONFIG, OURS
from jaxweights.files.names import check_kinds
from jaxweights.files.stored import describe, is_describable
from jaxweights.files.writing import Piece
from jaxweights.models.recipe import Recipe

RECIPE, ORIGINAL = "jaxweights.recipe", "jaxweights.original"
"""Names in the metadata: the recipe in TOML, and what `expand` needs to give the names and shapes of the source."""


def assemble(path: Path, to: str, steps: Sequence[Step], spool: Spool, model: Source, recipe: Recipe) -> dict[str, Any]:
    """Writes the output, tensor by tensor. Returns the `quantization_config`, which is empty in most layouts.

    Args:
      path: where to.
      to: the layout.
      steps: the steps, in order.
      spool: has what they made.
      model: the source.
      recipe: is put into the metadata, beside that of the source.
    """
    metadata = model.metadata
    text: dict[str, Any] = {key: value for key, value in metadata.items() if key not in (OURS, CONFIG, ORIGINAL)}
    text[RECIPE] = recipe.toml()
    if original := _original(to, steps):
        text[ORIGINAL] = json.dumps(original)
    nodes = nodes_of(metadata)
    if to == "gguf":
        if nodes:
            text[OURS] = json.dumps({"version": 1, "nodes": nodes})
        _write_gguf(path, steps, spool, model, text)
        return {}
    stored = {step.name: step.new for step in steps if not step.kept and is_describable(step.new)}
    config: dict[str, Any] = {}
    if to in CODECS and stored:
        config = CODECS[to].config({name.rpartition(".")[0]: leaf for name, leaf in stored.items()})
        text[CONFIG] = json.dumps(config)
    described = {} if to in CODECS else {name: describe(leaf) for name, leaf in stored.items()}
    coded = {name: of for i, step in enumerate(steps) if not step.kept for name, of in spool.about(i)["coded"].items()}
    if nodes or described or coded:
        ours = {"version": 1, "nodes": nodes, "stored": described}
        text[OURS] = json.dumps(ours | ({"version": CODED_VERSION, "coded": coded} if coded else {}))
    pieces = [_copied(step, model) if step.kept else spool.piece(i) for i, step in enumerate(steps)]
    safetensors.write(path, pieces, {key: value for key, value in text.items() if isinstance(value, str)})
    return config


def nodes_of(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Where there are lists, tuples and so on in a tree that `save` wrote."""
    if OURS not in metadata:
        return {}
    ours = safetensors.parse_json(f"the metadata {OURS!r}", str(metadata[OURS]).encode())
    return check_kinds(ours.get("nodes", {}) if isinstance(ours, dict) else ours)


def _copied(step: Step, model: Source) -> Piece:
    """The tensor as it is in the source."""
    return Piece({step.name: step.entry}, lambda: {step.name: model.read(step.name)})


def _write_gguf(path: Path, steps: Sequence[Step], spool: Spool, model: Source, metadata: Mapping[str, Any]) -> None:
    tensors = {}
    for i, step in enumerate(steps):
        piece = _copied(step, model) if step.kept else spool.piece(i)
        (entry,) = piece.entries.values()
        kind, shape = None, step.entry.shape
        if not step.kept and is_describable(step.new):
            kind = gguf_blocks.type_of(step.name, step.new)
            shape = (*shape[:-2], shape[-1], shape[-2]) if is_transposed(to="gguf", leaf=step.new) else shape

        def make(piece: Piece = piece) -> np.ndarray:
            (values,) = piece.make().values()
            return values

        tensors[step.written] = gguf.Tensor(kind, shape, entry, make)
    gguf.write(path, tensors, metadata)


def _original(to: str, steps: Sequence[Step]) -> dict[str, dict[str, Any]]:
    """{name in the output: what was otherwise in the source}."""
    found: dict[str, dict[str, Any]] = {}
    if to in ("jaxweights", "dense"):
        return found
    for step in steps:
        if step.kept:
            continue
        other: dict[str, Any] = {"dtype": str(step.entry.dtype)} if is_describable(step.new) else {}
        if step.written != step.name:
            other["name"] = step.name
        if is_transposed(to, step.new):
            other["transposed"] = True
        if other:
            found[step.written] = other
    return found
