"""What becomes of each tensor of a file, from names, shapes and dtypes alone."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxweights.command.source import Item
from jaxweights.command.targets import CODECS, adapted, why_not, written_name
from jaxweights.core.axes import Axes
from jaxweights.core.calibration import InputStats
from jaxweights.core.inference import Inferred, infer
from jaxweights.core.method import Method
from jaxweights.files.writing import Entry
from jaxweights.models.recipe import SCALES, Recipe, Rule


class Step(NamedTuple):
    """What becomes of one tensor.

    Attributes:
      name: its name in the source.
      entry: its shape and dtype there.
      kept: why it stays as it is; "" if it does not.
      methods: what is done to it.
      axes: how it is read as a matrix.
      guess: whether its name and shape leave that open.
      new: what it becomes, with shapes in place of arrays.
      written: its name in the output, as `load` gives it.
    """

    name: str
    entry: Entry
    kept: str
    methods: tuple[Method, ...] = ()
    axes: Axes | None = None
    guess: bool = False
    new: Any = None
    written: str = ""


def plan(items: Mapping[str, Item], recipe: Recipe, to: str) -> list[Step]:
    """The steps of a recipe, in the order of the tensors.

    Raises a ValueError if a rule matches nothing, if nothing is changed, or if two weights would have one name.
    """
    if stored := [name for name, item in items.items() if item.form]:
        raise ValueError(
            f"{len(stored)} weights are stored already, {stored[0]!r} as {items[stored[0]].form}: make plain arrays of "
            f"them first, with jaxweights expand"
        )
    rules = recipe.chosen(items)
    inferred = infer({_path(name): item.shape for name, item in items.items()})
    steps = [_step(name, item, rules.get(name), inferred[_path(name)], to) for name, item in items.items()]
    if all(step.kept for step in steps):
        reasons = ", ".join(f"{n} {why}" for why, n in Counter(step.kept for step in steps).most_common(5))
        ours = [_step(name, item, rules.get(name), inferred[_path(name)], "jaxweights") for name, item in items.items()]
        remedy = "" if all(step.kept for step in ours) else ": give --to jaxweights, which holds them"
        raise ValueError(f"the recipe changes nothing: all {len(steps)} tensors stay as they are ({reasons}){remedy}")
    repeated = [name for name, n in Counter(step.written for step in steps).items() if n > 1]
    if repeated:
        raise ValueError(f"two weights would be named {repeated[0]!r}: write to = 'jaxweights', which keeps names")
    return steps


def _step(name: str, item: Item, rule: Rule | None, found: Inferred, to: str) -> Step:
    assert item.shape is not None and item.dtype is not None
    entry = Entry(item.shape, item.dtype)
    kept = _kept(name, entry, rule, found, to)
    if kept or rule is None:
        return Step(name, entry, kept, written=name)
    axes = rule.axes(len(entry.shape)) or found.axes
    methods = adapted(rule, to).methods(entry.dtype)
    try:
        new = _abstract(methods, axes, entry.shape, entry.dtype)
    except ValueError as e:
        return Step(name, entry, str(e).partition(":")[0], written=name)
    if kept := why_not(to, name, new):
        return Step(name, entry, kept, written=name)
    guess = bool(found.others) and rule.input is None
    return Step(name, entry, "", methods, axes, guess, new, written_name(to, name, new))


def _kept(name: str, entry: Entry, rule: Rule | None, found: Inferred, to: str) -> str:
    """Why a tensor stays as it is; "" if its shape and its rule give no reason."""
    if rule is None:
        return "no rule"
    if rule.keep:
        return "by its rule"
    if str(entry.dtype) not in SCALES:
        return "float64: save it as float32" if entry.dtype == np.float64 else str(entry.dtype)
    if found.axes is None:
        return found.why
    if 0 in entry.shape:
        return "it is empty"
    if to in CODECS and rule.globs == ("*",) and _LINEAR_ONLY.search(name):
        return f"an embedding or a head, kept for {to}"
    return ""


def _path(name: str) -> str:
    return name.replace(".", "/")


_LINEAR_ONLY = re.compile(r"(^|[._/])(\w*embed\w*|wte|wpe|shared|lm_head)([._/]|$)")
"""Names of layers that other tools quantize in GGUF alone: their loaders replace linear layers."""


@functools.lru_cache(maxsize=1024)
def _abstract(methods: tuple[Method, ...], axes: Axes | None, shape: tuple[int, ...], dtype: np.dtype) -> Any:
    def fit(w: Any) -> Any:
        for method in methods:
            w = method.fit(w, InputStats(axes=axes))
        return w

    return jax.eval_shape(fit, jax.ShapeDtypeStruct(shape, dtype))
