"""Saves a tree to a file."""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxweights.files import gguf, gguf_blocks, safetensors
from jaxweights.files.awq import AWQ
from jaxweights.files.bitsandbytes import BITSANDBYTES_NF4
from jaxweights.files.codec import Codec
from jaxweights.files.coded import coded as entropy_coded
from jaxweights.files.compressed_tensors import COMPRESSED_TENSORS
from jaxweights.files.gptq import GPTQ, GPTQ_V2
from jaxweights.files.load import CODED_VERSION, CONFIG, OURS, as_path
from jaxweights.files.mxfp4 import MXFP4
from jaxweights.files.names import named
from jaxweights.files.sparse_24 import SPARSE_24
from jaxweights.files.stored import describe, is_describable, tensors_of
from jaxweights.files.writing import Entry, Piece
from jaxweights.techniques.quantization.array import QuantizedArray

_CODECS = {codec.name: codec for codec in (GPTQ, GPTQ_V2, AWQ, COMPRESSED_TENSORS, BITSANDBYTES_NF4, MXFP4, SPARSE_24)}


def save(
    path: str | Path,
    tree: Any,
    *,
    format: str | None = None,
    entropy_coding: bool = False,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Saves a tree of arrays and stored weights to a safetensors or GGUF file, without loss.

    The file takes the place of another only once it is whole. Tensors are written one at a time.

    By default, stored weights in safetensors are kept bit for bit, as tensors "layer.kernel.words",
    "layer.kernel.scale.codes" and so on, and a description in the metadata. In one of the formats of other tools, the
    weights are those of the tree and the layout is theirs: layers are to be named "weight" or "kernel", and what
    the format cannot hold exactly is an error. Its `quantization_config` is in the metadata: copy it into the
    config.json of the model. In GGUF the type follows from each weight: formats.integers(8, block=32,
    scale="float16") is Q8_0, with 4 bits Q4_0, with 5 bits Q5_0, "mxfp4" MXFP4, and what was loaded is what it was.
    Matrices are written as (out, in) in all but our own layout.

    Args:
      path: ends in ".safetensors" or ".gguf".
      tree: nested dicts with strings or integers as keys, lists, tuples and None; of arrays, `QuantizedArray`,
        `ClusteredArray`, `PackedArray` and `BlockSparseArray`. In GGUF only of the first two. Of a Flax NNX module
        `nnx.state(module)`: `load` gives nested dicts of its arrays, for `nnx.update`.
      format: None, or in safetensors the layout of every stored weight: "gptq", "gptq_v2", "awq",
        "compressed-tensors", "bitsandbytes" or "mxfp4" of a `QuantizedArray`, "sparse-24-bitmask" of a `PackedArray`.
      entropy_coding: in safetensors of our own layout: codes, masks, and the zeros of arrays take as many bits as they
        have information, by the densities of zeros of rows and columns and the counts of codes. `load` gives the same
        tree, bit for bit; no other program reads the file. Needs jaxweights[coding]. The coded tensors are held in
        memory until all are written.
      metadata: what else to put into the header: {name: string} in safetensors; in GGUF also numbers, booleans, and
        lists of them.

    Raises:
      TypeError: a node of the tree or a leaf is of another type.
      ValueError: a name, a dtype or a weight does not fit the file. No file is made then.
      ImportError: entropy coding is asked for, and constriction is not installed.

    >>> import tempfile, jax.numpy as jnp, jaxweights as jw
    >>> from jaxweights import files
    >>> path = tempfile.mkdtemp() + "/model.gguf"
    >>> q = jw.quantize(jnp.eye(64), jw.formats.integers(8, block=32, scale="float16"))
    >>> files.save(path, {"layer": {"kernel": q}})
    >>> loaded = files.load(path)["layer"]["kernel"]
    >>> print(loaded.axes.input, bool((loaded.todense().T == q.todense()).all()))
    (-1,) True
    """
    path = as_path(path)
    leaves, kinds = named(tree)
    _check_metadata(metadata)
    if not isinstance(entropy_coding, bool):
        raise TypeError(f"entropy_coding must be True or False, got {entropy_coding!r}: pass a bool")
    if entropy_coding and (format is not None or path.suffix != ".safetensors"):
        raise ValueError(
            f"entropy_coding is for safetensors with format=None, got {path.name!r} and {format!r}: leave one out"
        )
    if path.suffix == ".gguf":
        if format is not None:
            raise ValueError(f"format must be None for GGUF, got {format!r}: the type follows from each weight")
        _save_gguf(path, leaves, kinds, metadata or {})
    elif path.suffix == ".safetensors":
        if format is not None and format not in _CODECS:
            raise ValueError(f"format must be None or one of {', '.join(map(repr, _CODECS))}, got {format!r}")
        codec = None if format is None else _CODECS[format]
        _save_safetensors(path, leaves, kinds, codec, entropy_coding, metadata or {})
    else:
        raise ValueError(f"path must end in .safetensors or .gguf, got {path.name!r}")


def _save_safetensors(
    path: Path,
    leaves: dict[str, Any],
    kinds: dict[str, str],
    codec: Codec | None,
    entropy_coding: bool,
    metadata: Mapping[str, Any],
) -> None:
    for key, value in metadata.items():
        if not isinstance(value, str):
            raise TypeError(
                f"metadata of safetensors must be strings, got {type(value).__name__} at {key!r}: write str(it)"
            )
    pieces: list[Piece] = []
    described: dict[str, Any] = {}
    coded: dict[str, Any] = {}
    codes: dict[str, Any] = {}
    for name, leaf in leaves.items():
        if codec is not None and is_describable(leaf):
            pieces.append(_coded(name, leaf, codec))
            coded[name] = leaf
        elif is_describable(leaf):
            described[name] = describe(leaf)
            parts = tensors_of(leaf)
            if entropy_coding:
                parts = {end: _shortest(f"{name}.{end}", end, a, leaf, codes) for end, a in parts.items()}
            pieces.append(Piece.of({f"{name}.{end}": a for end, a in parts.items()}))
        else:
            array = _array(name, leaf)
            pieces.append(Piece.of({name: _shortest(name, "", array, None, codes) if entropy_coding else array}))
    repeated = [name for name, n in Counter(name for piece in pieces for name in piece.entries).items() if n > 1]
    if repeated:
        raise ValueError(f"two tensors would be named {repeated[0]!r}: rename one of the leaves of the tree")
    text = {str(key): value for key, value in metadata.items()}
    if kinds or codec is None:
        ours = {"version": 1, "nodes": kinds, "stored": described}
        if codes:
            ours |= {"version": CODED_VERSION, "coded": codes}
        text[OURS] = json.dumps(ours, separators=(",", ":"))
    if codec is not None and coded:
        text[CONFIG] = json.dumps(codec.config({name.rpartition(".")[0]: leaf for name, leaf in coded.items()}))
    safetensors.write(path, pieces, text)


def _shortest(name: str, part: str, array: Any, stored: Any, codes: dict[str, Any]) -> Any:
    """A tensor, or its code if that is shorter, of which `codes` is told then."""
    found = entropy_coded(part, array, stored)
    if found is None:
        return array
    codes[name] = found.description
    return found.code


def _coded(name: str, leaf: Any, codec: Codec) -> Piece:
    """The tensors of a weight in the format of `codec`."""
    what = f"the weight {name!r}"
    if not isinstance(leaf, codec.holds):
        only = codec.holds.__name__
        raise TypeError(f"{what} is a {type(leaf).__name__}, {codec.name} has only {only}: leave format=None")
    layer, dot, last = name.rpartition(".")
    if codec.replaced and last not in ("weight", "kernel"):
        raise ValueError(f"{what} must be named 'weight' or 'kernel' to be saved as {codec.name}: rename {last!r}")
    target = f"{layer}{dot}weight" if last == "kernel" else name
    base = target.removesuffix(codec.replaced)

    def make() -> dict[str, np.ndarray]:
        return {base + end: a for end, a in codec.write(what, leaf).items()}

    # Made here for the header, and once more when they are written.
    return Piece({full: Entry.of(a) for full, a in make().items()}, make)


def _save_gguf(path: Path, leaves: dict[str, Any], kinds: dict[str, str], metadata: Mapping[str, Any]) -> None:
    tensors: dict[str, gguf.Tensor] = {}
    for name, leaf in leaves.items():
        if isinstance(leaf, QuantizedArray):
            what = f"the weight {name!r}"
            blocks = gguf_blocks.write(what, leaf)

            def values(what: str = what, leaf: QuantizedArray = leaf) -> np.ndarray:
                return gguf_blocks.write(what, leaf).data

            tensors[name] = gguf.Tensor(blocks.type, blocks.shape, Entry.of(blocks.data), values)
        elif is_describable(leaf):
            raise TypeError(f"the weight {name!r} is a {type(leaf).__name__}, GGUF has none: save it as safetensors")
        else:
            array = _array(name, leaf)
            tensors[name] = gguf.Tensor(None, tuple(array.shape), Entry.of(array), functools.partial(np.asarray, array))
    fields = {str(key): value for key, value in metadata.items()}
    if kinds:
        fields[OURS] = json.dumps({"version": 1, "nodes": kinds})
    gguf.write(path, tensors, fields)


def _array(name: str, leaf: Any) -> jax.Array | np.ndarray:
    if isinstance(leaf, Tracer):
        raise TypeError(f"the leaf {name!r} is traced and has no values: save outside of jit")
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        raise TypeError(
            f"the leaf {name!r} is a key of jax.random: save jax.random.key_data(key), or leave it out, of a Flax NNX "
            f"module with nnx.state(module, nnx.Not(nnx.RngState))"
        )
    if not isinstance(leaf, jax.Array | np.ndarray):
        raise TypeError(
            f"the leaf {name!r} must be an array, a QuantizedArray, a ClusteredArray, a PackedArray or a "
            f"BlockSparseArray, got {type(leaf).__name__}: convert it with jnp.asarray"
        )
    return leaf


def _check_metadata(metadata: Any) -> None:
    if metadata is None:
        return
    if not isinstance(metadata, Mapping) or not all(isinstance(key, str) for key in metadata):
        raise TypeError(f"metadata must be a dict with strings as keys, got {type(metadata).__name__}")
    for key in (OURS, CONFIG):
        if key in metadata:
            raise ValueError(f"metadata has {key!r}, which save writes itself: leave it out")
