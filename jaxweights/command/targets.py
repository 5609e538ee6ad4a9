"""The layouts of the files that `jaxweights compress` writes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from jaxweights.core.axes import Reading
from jaxweights.files import gguf_blocks
from jaxweights.files.bitsandbytes import BITSANDBYTES_NF4
from jaxweights.files.codec import Codec
from jaxweights.files.coded import coded as coded_or_none
from jaxweights.files.compressed_tensors import COMPRESSED_TENSORS
from jaxweights.files.mxfp4 import MXFP4
from jaxweights.files.stored import is_describable, tensors_of
from jaxweights.models.recipe import Recipe, Rule
from jaxweights.techniques.quantization.array import QuantizedArray

READ_BY = {
    "compressed-tensors": "compressed-tensors and jaxweights",
    "bitsandbytes": "transformers, vLLM and jaxweights",
    "mxfp4": "transformers (gpt-oss) and jaxweights",
    "gguf": "the reader of llama.cpp's tools and jaxweights",
    "dense": "everything that reads safetensors",
    "jaxweights": "jaxweights alone",
}
"""What reads each layout, whatever is in it."""
CODECS: dict[str, Codec] = {c.name: c for c in (COMPRESSED_TENSORS, BITSANDBYTES_NF4, MXFP4)}
_FORMATS = {"nf4": "bitsandbytes", "mxfp4": "mxfp4"}
_GGUF_BITS = (4, 5, 8)
_ARCHITECTURE = "general.architecture"


def target_of(recipe: Recipe, suffix: str) -> str:
    """The layout of a recipe: the one that it names, GGUF in a .gguf file, or what others read that holds its weights.

    Raises a ValueError if the layout does not hold what a rule makes.
    """
    natural = {_natural(rule) for rule in recipe.rules} - {"dense"}
    to = recipe.to or ("gguf" if suffix == ".gguf" else natural.pop() if len(natural) == 1 else "")
    if not to:
        to = "jaxweights" if natural else "dense"
    if recipe.entropy_coding:
        if recipe.to not in (None, "jaxweights") or suffix == ".gguf":
            raise ValueError(f"entropy_coding is for to = 'jaxweights', got {to!r}: leave one of them out")
        to = "jaxweights"
    if to not in READ_BY:
        raise ValueError(f"to must be one of {', '.join(READ_BY)}, got {to!r}")
    if (to == "gguf") != (suffix == ".gguf"):
        name = "must" if to == "gguf" else "must not"
        raise ValueError(f"to = {to!r}: the name of OUT {name} end in .gguf, it ends in {suffix or 'no suffix'!r}")
    for i, rule in enumerate(recipe.rules):
        try:
            adapted(rule, to)
        except ValueError as e:
            raise ValueError(f"rule {i + 1} (weights = {rule.weights!r}): {e}") from e
    return to


def adapted(rule: Rule, to: str) -> Rule:
    """The rule with what the layout fixes. Raises a ValueError if the layout does not hold what the rule makes."""
    if to == "gguf" and rule.bits is not None:
        if rule.bits not in _GGUF_BITS or rule.block not in (None, 32) or not rule.symmetric:
            raise ValueError(
                f"GGUF is written with bits = 4, 5 or 8 (Q4_0, Q5_0, Q8_0) in blocks of 32, symmetric, got "
                f"bits = {rule.bits}, block = {rule.block}, symmetric = {str(rule.symmetric).lower()}"
            )
        return dataclasses.replace(rule, block=32, scale="float16")
    natural = _natural(rule)
    holds = {"gguf": ("dense", "mxfp4"), "jaxweights": tuple(READ_BY)}.get(to, ("dense", to))
    if natural not in holds:
        made = f"bits = {rule.bits}" if rule.bits else f"format = {rule.format!r}" if rule.format else "cluster"
        raise ValueError(f"{to} does not hold what {made} makes: leave `to` out, or write to = {natural!r}")
    return rule


def _natural(rule: Rule) -> str:
    """The layout that others read and that holds what a rule makes, or our own."""
    if rule.bits is not None:
        return "compressed-tensors"
    if rule.format is not None:
        return _FORMATS.get(rule.format, "jaxweights")
    return "jaxweights" if rule.cluster is not None else "dense"


def read_by(to: str, new: Iterable[Any], metadata: Mapping[str, Any]) -> str:
    """What reads a file of these new weights and with this metadata, in words."""
    if to == "compressed-tensors" and {leaf.format.grid.bits for leaf in new if is_describable(leaf)} <= {4, 8}:
        return "vLLM, transformers and jaxweights"
    if to == "gguf" and _ARCHITECTURE not in metadata:
        return f"{READ_BY[to]}. It has no {_ARCHITECTURE}, without which llama.cpp loads no model"
    return READ_BY[to]


def why_not(to: str, name: str, leaf: Any) -> str:
    """Why a layout does not hold a weight, of which only the shape is known; "" if it does."""
    if to in ("jaxweights", "dense") or not is_describable(leaf):
        return ""
    r = Reading.of(leaf.axes, leaf.shape)
    matrices = r.batch == tuple(range(len(leaf.shape) - 2)) and len(r.input) == len(r.output) == 1 and r.groups == 1
    if len(leaf.shape) > 2 and (to in ("compressed-tensors", "bitsandbytes") or not matrices):
        return f"{len(leaf.shape)} axes, {to} has matrices"
    codec = CODECS.get(to)
    if codec is not None and codec.replaced and name.rpartition(".")[2] not in ("weight", "kernel"):
        return f'not named "weight" or "kernel", as {to} needs'
    assert isinstance(leaf, QuantizedArray)
    rows, block = leaf.rows, leaf.format.blocks(leaf.rows)[1]
    if to == "gguf":
        try:
            gguf_blocks.type_of(name, leaf)
        except ValueError:
            return f"{rows} inputs are no multiple of 32"
    if rows % max(block, 1):
        return f"{rows} inputs are no multiple of {block}"
    return ""


def written_name(to: str, name: str, leaf: Any) -> str:
    """The name of a weight in the file, as `load` gives it."""
    layer, dot, last = name.rpartition(".")
    stored = to in CODECS and is_describable(leaf)
    return f"{layer}{dot}weight" if stored and last == "kernel" else name


def is_transposed(to: str, leaf: Any) -> bool:
    """Whether a weight is written as the transpose of its last two axes: all but our own layout have (out, in)."""
    if to in ("jaxweights", "dense") or not is_describable(leaf):
        return False
    r = Reading.of(leaf.axes, leaf.shape)
    return r.input[0] < r.output[0]


def tensors(to: str, name: str, leaf: Any) -> dict[str, np.ndarray]:
    """The tensors of the file that make up a new weight."""
    if not is_describable(leaf):
        return {name: np.asarray(leaf)}
    if to == "gguf":
        return {name: gguf_blocks.write(f"the weight {name!r}", leaf).data}
    if to in CODECS:
        base = written_name(to, name, leaf).removesuffix(CODECS[to].replaced)
        return {base + end: a for end, a in CODECS[to].write(f"the weight {name!r}", leaf).items()}
    return {f"{name}.{end}": np.asarray(a) for end, a in tensors_of(leaf).items()}


def entropy_coded(
    name: str, leaf: Any, plain: Mapping[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """(the tensors of a new weight in our own layout, as codes where those are shorter; what is told of the codes)."""
    stored = leaf if is_describable(leaf) else None
    coded, told = dict(plain), {}
    for full, tensor in plain.items():
        if (code := coded_or_none(full.removeprefix(name).removeprefix("."), tensor, stored)) is not None:
            coded[full], told[full] = code.code, code.description
    return coded, told
