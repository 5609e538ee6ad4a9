"""Loads a tree from a file of any kind."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxweights.files import gguf, gguf_blocks, safetensors
from jaxweights.files.awq import AWQ
from jaxweights.files.bitsandbytes import BITSANDBYTES_FP4, BITSANDBYTES_NF4
from jaxweights.files.codec import Codec, Config
from jaxweights.files.compressed_tensors import COMPRESSED_TENSORS
from jaxweights.files.gptq import GPTQ
from jaxweights.files.mapping import Contents
from jaxweights.files.mxfp4 import MXFP4
from jaxweights.files.names import check_kinds, nested
from jaxweights.files.sparse_24 import SPARSE_24
from jaxweights.files.stored import from_tensors

OURS = "jaxweights"
"""The name in the metadata of a file under which a description of the tree and its stored weights is kept."""
CONFIG = "quantization_config"
"""Its name in the metadata of a file, as in a config.json."""
_INDEX = "model.safetensors.index.json"
_CODECS = (GPTQ, AWQ, COMPRESSED_TENSORS, BITSANDBYTES_NF4, BITSANDBYTES_FP4, MXFP4, SPARSE_24)


def load(path: str | Path) -> Any:
    """Loads a tree of arrays and stored weights from a safetensors or GGUF file, or a folder of safetensors.

    A name "a.b.kernel" becomes tree["a"]["b"]["kernel"]. What `save` wrote comes back as it was, bit for bit, lists and
    tuples included.

    Weights of other tools become `QuantizedArray` without loss: in safetensors GPTQ, AWQ, compressed-tensors
    (pack-quantized), bitsandbytes (4 bits) and MXFP4 (gpt-oss); in GGUF Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K to Q6_K and
    MXFP4. The 2:4 sparse weights of compressed-tensors become `PackedArray`. All keep the shape that the file gives
    them, (out, in), and their `axes` tell so: `x @ q` is the product of the layer, and `q.transpose((1, 0))` the kernel
    (in, out), for which nothing is moved. The weight of the tensors "layer.qweight", "layer.scales" and so on is
    "layer.weight". Arrays keep their shapes too: the weight of a linear layer of PyTorch is (out, in). The dtype is the
    one that the other tool would give the weight, often float16: `q.astype(jnp.float32)` does not round.

    The file is mapped into memory and read tensor by tensor. Nothing in it is executed.

    Args:
      path: a file that ends in ".safetensors", ".gguf" or ".safetensors.index.json" (the list of a model in several
        files), or a folder with model.safetensors or its index. A `config.json` beside it tells what the tensors of
        GPTQ, AWQ and compressed-tensors do not.

    Returns:
      A tree of dicts. Leaves are JAX arrays and stored weights; an array of 64 bits is one of NumPy, unless JAX has
      64 bits enabled.

    Raises:
      ValueError: the file is damaged, incomplete, or of a format that is not read. The message names the tensor.
      OSError: the file cannot be read.

    >>> import tempfile, jax.numpy as jnp, jaxweights as jw
    >>> from jaxweights import files
    >>> path = tempfile.mkdtemp() + "/model.safetensors"
    >>> tree = {"layer": {"kernel": jw.quantize(jnp.eye(64), "nf4"), "bias": jnp.ones(64)}}
    >>> files.save(path, tree)
    >>> loaded = files.load(path)
    >>> print(loaded["layer"]["kernel"].format == tree["layer"]["kernel"].format, loaded["layer"]["bias"].shape)
    True (64,)
    """
    path = as_path(path)
    contents = read(path)
    if path.suffix == ".gguf":
        kinds = _ours(path.name, contents).get("nodes", {})
        return nested({name: _leaf_of_gguf(t) for name, t in contents.tensors.items()}, check_kinds(kinds))
    return _tree(path, contents)


def metadata(path: str | Path) -> dict[str, Any]:
    """The metadata of a safetensors or GGUF file.

    Args:
      path: as for `load`.

    Returns:
      {name: value}. Values are strings in safetensors; in GGUF also lists, and numbers as NumPy scalars and arrays.

    Raises:
      ValueError: the file is damaged.
      OSError: the file cannot be read.

    >>> import tempfile, jax.numpy as jnp
    >>> from jaxweights import files
    >>> path = tempfile.mkdtemp() + "/model.gguf"
    >>> files.save(path, {"bias": jnp.ones(2)}, metadata={"general.name": "small"})
    >>> files.metadata(path)
    {'general.name': 'small'}
    """
    return dict(read(as_path(path)).metadata)


def as_path(path: Any) -> Path:
    """`path` as one, or an error."""
    if not isinstance(path, str | Path):
        raise TypeError(f"path must be a string or a Path, got {type(path).__name__} {path!r}")
    return Path(path)


def read(path: Path) -> Contents:
    """The tensors and metadata of a file, or of the files of a folder or an index."""
    if path.is_dir():
        index = path / _INDEX
        path = index if index.exists() else path / "model.safetensors"
    if path.suffix == ".gguf":
        return gguf.read(path)
    if path.name.endswith(".safetensors.index.json"):
        return _read_index(path)
    if path.suffix == ".safetensors":
        return safetensors.read(path)
    raise ValueError(
        f"path must end in .safetensors, .gguf or .safetensors.index.json, or be a folder, got {path.name!r}"
    )


def _read_index(path: Path) -> Contents:
    """The tensors of all files that an index lists, each from the file that it says."""
    index = safetensors.parse_json(path.name, path.read_bytes())
    places = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise ValueError(f"{path.name} must have a weight_map {{tensor: file}}")
    files: dict[str, dict[str, np.ndarray]] = {}
    tensors = {}
    for name, file in places.items():
        if file != Path(file).name or not file.endswith(".safetensors"):
            raise ValueError(
                f"{path.name} has tensor {name!r} in {file[:200]!r}, which is no safetensors file beside it"
            )
        if file not in files:
            files[file] = safetensors.read(path.parent / file).tensors
        if name not in files[file]:
            raise ValueError(f"{path.name} has tensor {name!r} in {file}, which does not hold it")
        tensors[name] = files[file][name]
    return Contents(tensors, {})


def _tree(path: Path, contents: Contents) -> Any:
    """The tree of safetensors: weights of ours by the metadata, those of others by the names of their tensors."""
    tensors = dict(contents.tensors)
    ours = _ours(path.name, contents)
    leaves: dict[str, Any] = {}
    described = ours.get("stored", {})
    if not isinstance(described, dict):
        raise ValueError(f"{path.name}: the stored weights must be described by name, got {str(described)[:200]}")
    for name, description in described.items():

        def take(part: str, name: str = name) -> np.ndarray | None:
            return tensors.pop(f"{name}.{part}", None)

        leaves[name] = from_tensors(f"{path.name}: the stored weight {name!r}", description, take)
    if not ours or CONFIG in contents.metadata:
        config = functools.cache(lambda: _config(path, contents))
        for codec in _CODECS:
            leaves |= _take(path.name, codec, tensors, config)
    for name, tensor in tensors.items():
        if name in leaves:
            raise ValueError(f"{path.name} has tensor {name!r}, and others that make up a weight of this name")
        leaves[name] = as_leaf(tensor)
    return nested(leaves, check_kinds(ours.get("nodes", {})))


def _take(file: str, codec: Codec, tensors: dict[str, np.ndarray], config: Callable[[], Config]) -> dict[str, Any]:
    """The weights in the format of `codec`, whose tensors are taken out of `tensors`."""
    found: dict[str, Any] = {}
    for lead in [name for name in tensors if name.endswith(codec.lead)]:
        base = lead.removesuffix(codec.lead)
        parts = {end: tensors[base + end] for end in codec.parts if base + end in tensors}
        if codec.reads(parts, config()):
            found[base + codec.replaced] = codec.read(f"{file}: the weight {base + codec.replaced!r}", parts, config())
            for end in parts:
                del tensors[base + end]
    return found


def _config(path: Path, contents: Contents) -> Config:
    """The `quantization_config` of the file, or else of the config.json beside it; empty if there is none."""
    folder = path if path.is_dir() else path.parent
    if CONFIG in contents.metadata:
        text, what = str(contents.metadata[CONFIG]).encode(), f"the {CONFIG} of {path.name}"
        return _checked(what, safetensors.parse_json(what, text))
    if (beside := folder / "config.json").exists():
        config = _checked("config.json", safetensors.parse_json("config.json", beside.read_bytes()))
        if CONFIG in config:
            return _checked(f"the {CONFIG} of config.json", config[CONFIG])
    if (beside := folder / "quantize_config.json").exists():
        return _checked(beside.name, safetensors.parse_json(beside.name, beside.read_bytes()))
    return {}


def _checked(what: str, config: Any) -> Mapping[str, Any]:
    if not isinstance(config, dict):
        raise ValueError(f"{what} must be a JSON object, got {type(config).__name__}")
    return config


def _ours(file: str, contents: Contents) -> Mapping[str, Any]:
    """What `save` wrote of the tree; empty for files of others."""
    if OURS not in contents.metadata:
        return {}
    what = f"the metadata {OURS!r} of {file}"
    ours = _checked(what, safetensors.parse_json(what, str(contents.metadata[OURS]).encode()))
    if ours.get("version") != 1:
        raise ValueError(
            f"{what} is of version {str(ours.get('version'))[:200]}, of which only 1 is read: update jaxweights"
        )
    return ours


def _leaf_of_gguf(tensor: np.ndarray | gguf.Blocks) -> Any:
    return gguf_blocks.read(tensor) if isinstance(tensor, gguf.Blocks) else as_leaf(tensor)


def as_leaf(tensor: np.ndarray) -> jax.Array | np.ndarray:
    """A tensor as an array of its own: of NumPy if JAX would narrow it to 32 bits."""
    narrowed = jax.dtypes.canonicalize_dtype(tensor.dtype) != tensor.dtype
    return np.array(tensor) if narrowed else jnp.array(tensor)
