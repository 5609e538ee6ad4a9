"""Loads a tree from a file of any kind."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxweights.files import gguf, gguf_blocks, safetensors
from jaxweights.files.awq import AWQ
from jaxweights.files.bitsandbytes import BITSANDBYTES_FP4, BITSANDBYTES_NF4
from jaxweights.files.codec import Codec, Config
from jaxweights.files.coded import decoded
from jaxweights.files.compressed_tensors import COMPRESSED_TENSORS
from jaxweights.files.gptq import GPTQ
from jaxweights.files.mapping import Contents, on_device
from jaxweights.files.mxfp4 import MXFP4
from jaxweights.files.names import check_kinds, nested
from jaxweights.files.sparse_24 import SPARSE_24
from jaxweights.files.stored import PARTS, from_tensors
from jaxweights.files.unread import check_no_codes

OURS = "jaxweights"
"""The name in the metadata of a file under which a description of the tree and its stored weights is kept."""
CODED_VERSION = 2
"""The version of that description in a file with entropy-coded tensors; without, it is 1."""
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
    one that the other tool would give the weight, often float16: `q.astype(jnp.float32)` does not round. Of GPTQ, what
    has no `checkpoint_format` is taken to be version 1. A model quantized in a format that is not read is refused.

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
      ImportError: the file is entropy-coded, and constriction is not installed.
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
    by_name = leaves(path, contents)
    if OURS not in contents.metadata:
        plain = {name: contents.tensors[name] for name, leaf in by_name.items() if not leaf.form}
        check_no_codes(path.name, plain, functools.partial(_config, path, contents))
    found = {name: leaf.read() for name, leaf in by_name.items()}
    return nested(found, check_kinds(_ours(path.name, contents).get("nodes", {})))


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
    path = file_of(path)
    if path.suffix == ".gguf":
        return gguf.read(path)
    if path.name.endswith(".safetensors.index.json"):
        return _read_index(path)
    if path.suffix == ".safetensors":
        return safetensors.read(path)
    raise ValueError(
        f"path must end in .safetensors, .gguf or .safetensors.index.json, or be a folder, got {path.name!r}"
    )


def file_of(path: Path) -> Path:
    """`path`, or if that is a folder, the file in it to start from."""
    if not path.is_dir():
        return path
    index = path / _INDEX
    return index if index.exists() else path / "model.safetensors"


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


class Leaf(NamedTuple):
    """A leaf of the tree in a file, which is not read yet.

    Attributes:
      form: "" of an array; of a stored weight the name of its format, or "jaxweights".
      tensors: names of the tensors of the file that make it up.
      read: gives the array or the stored weight.
    """

    form: str
    tensors: tuple[str, ...]
    read: Callable[[], Any]


def leaves(path: Path, contents: Contents) -> dict[str, Leaf]:
    """The leaves by name: weights of ours by the metadata, those of others by the names of their tensors."""
    if path.suffix == ".gguf":
        return {name: _leaf_of_gguf(name, tensor) for name, tensor in contents.tensors.items()}
    tensors = dict(contents.tensors)
    ours = _ours(path.name, contents)
    described = ours.get("stored", {})
    if not isinstance(described, dict):
        raise ValueError(f"{path.name}: the stored weights must be described by name, got {str(described)[:200]}")
    coded = _checked(f"the list of coded tensors of {path.name}", ours.get("coded", {}))
    if missing := [name for name in coded if name not in tensors]:
        raise ValueError(f"{path.name} has no tensor {missing[0]!r}, of whose code it tells: the file is incomplete")
    found: dict[str, Leaf] = {}
    parts = _below(described, tensors)
    for name, description in described.items():
        of = {part: tensors.pop(f"{name}.{part}") for part in parts[name]}
        what = f"{path.name}: the stored weight {name!r}"
        codes = {part: coded[f"{name}.{part}"] for part in of if f"{name}.{part}" in coded}
        read = functools.partial(_read_ours, what, description, of, codes)
        found[name] = Leaf(OURS, tuple(f"{name}.{part}" for part in of), read)
    if not ours or CONFIG in contents.metadata:
        config = functools.cache(lambda: _config(path, contents))
        for codec in _CODECS:
            found |= _take(path.name, codec, tensors, config)
    for name, tensor in tensors.items():
        if name in found:
            raise ValueError(f"{path.name} has tensor {name!r}, and others that make up a weight of this name")
        if name in coded:
            what = f"{path.name}: tensor {name!r}"
            found[name] = Leaf(OURS, (name,), functools.partial(_read_coded, what, coded[name], tensor))
        else:
            found[name] = Leaf("", (name,), functools.partial(as_leaf, tensor))
    return found


def _below(names: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, list[str]]:
    """{name: the rest of the names of the tensors that are parts of it, as "words" and "scale.codes"}."""
    found: dict[str, list[str]] = {name: [] for name in names}
    for tensor in tensors:
        for above in (tensor.rsplit(".", 1)[0], tensor.rsplit(".", 2)[0]):
            part = tensor[len(above) + 1 :]
            if above in found and part.partition(".")[0] in PARTS:
                found[above].append(part)
                break
    return found


def _read_ours(what: str, description: Any, parts: dict[str, np.ndarray], codes: Mapping[str, Any]) -> Any:
    """The stored weight of a description. Raises a ValueError if it has tensors of which that does not tell."""
    left = parts | {part: decoded(f"{what}: {part!r}", of, parts[part]) for part, of in codes.items()}
    stored = from_tensors(what, description, lambda part: left.pop(part, None))
    if left:
        raise ValueError(f"{what} has the tensor {next(iter(left))!r}, of which its description does not tell")
    return stored


def _read_coded(what: str, description: Any, tensor: np.ndarray) -> jax.Array | np.ndarray:
    return as_leaf(decoded(what, description, tensor))


def _take(file: str, codec: Codec, tensors: dict[str, np.ndarray], config: Callable[[], Config]) -> dict[str, Leaf]:
    """The weights in the format of `codec`, whose tensors are taken out of `tensors`."""
    found: dict[str, Leaf] = {}
    for lead in [name for name in tensors if name.endswith(codec.lead)]:
        base = lead.removesuffix(codec.lead)
        parts = {end: tensors[base + end] for end in codec.parts if base + end in tensors}
        if codec.reads(parts, config()):
            name = base + codec.replaced
            read = functools.partial(codec.read, f"{file}: the weight {name!r}", parts, config())
            found[name] = Leaf(codec.name, tuple(base + end for end in parts), read)
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
    if ours.get("version") not in (1, CODED_VERSION):
        raise ValueError(
            f"{what} is of version {str(ours.get('version'))[:200]}, of which 1 and {CODED_VERSION} are read: "
            f"update jaxweights"
        )
    return ours


def _leaf_of_gguf(name: str, tensor: np.ndarray | gguf.Blocks) -> Leaf:
    if isinstance(tensor, gguf.Blocks):
        return Leaf(tensor.type, (name,), functools.partial(gguf_blocks.read, tensor))
    return Leaf("", (name,), functools.partial(as_leaf, tensor))


def as_leaf(tensor: np.ndarray) -> jax.Array | np.ndarray:
    """A tensor as an array of its own: of NumPy if JAX would narrow it to 32 bits."""
    narrowed = jax.dtypes.canonicalize_dtype(tensor.dtype) != tensor.dtype
    return np.array(tensor) if narrowed else on_device(tensor)
