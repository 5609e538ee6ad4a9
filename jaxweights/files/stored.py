"""Stored weights as named tensors and a description in JSON, bit for bit."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jaxweights.core.axes import Axes
from jaxweights.core.layer import Layer
from jaxweights.core.packing import n_words
from jaxweights.files.bits import from_words
from jaxweights.files.mapping import on_device
from jaxweights.techniques.quantization.array import QuantizedArray
from jaxweights.techniques.quantization.formats import Format
from jaxweights.techniques.quantization.grids import Floats, Integers, Levels
from jaxweights.techniques.quantization.scales import ScaleFormat, Scales
from jaxweights.techniques.sparsification.storage.blocks import BlockSparseArray
from jaxweights.techniques.sparsification.storage.packed import PackedArray, check_packing
from jaxweights.techniques.weight_sharing.clustered import MOST_VALUES, ClusteredArray

Stored = QuantizedArray | PackedArray | BlockSparseArray | ClusteredArray
PARTS = frozenset(field.name for kind in get_args(Stored) for field in dataclasses.fields(kind))
"""What the names of the tensors of a stored weight start with, after its own name."""
_GRIDS = {"integers": Integers, "levels": Levels, "floats": Floats}


def is_describable(leaf: Any) -> bool:
    """Whether a leaf is a stored weight that can be saved."""
    return isinstance(leaf, Stored)


def tensors_of(stored: Stored) -> dict[str, Any]:
    """The arrays of a stored weight by name: those of its fields, and scale.codes and scale.outer."""
    fields: dict[str, Any] = {f.name: getattr(stored, f.name) for f in dataclasses.fields(stored)}
    for name in [name for name, value in fields.items() if isinstance(value, Scales)]:
        scales = fields.pop(name)
        fields |= {f"{name}.codes": scales.codes, f"{name}.outer": scales.outer}
    return {name: value for name, value in fields.items() if isinstance(value, jax.Array | np.ndarray)}


def describe(stored: Stored) -> dict[str, Any]:
    """What a stored weight is apart from its arrays, for JSON."""
    described: dict[str, Any] = {"type": type(stored).__name__, "layer": _layer_to_json(stored.layer)}
    if isinstance(stored, PackedArray):
        described |= {"n": stored.n, "m": stored.m}
    if isinstance(stored, ClusteredArray):
        described |= {"has_zeros": stored.has_zeros}
    if isinstance(stored, QuantizedArray):
        described |= {"format": _format_to_json(stored.format), "dtype": str(jnp.dtype(stored.dtype))}
        for name in ("scale", "minimum"):
            if (scales := getattr(stored, name)) is not None:
                described[name] = dataclasses.asdict(scales.format)
    return described


def from_tensors(what: str, described: Any, take: Callable[[str], np.ndarray | None]) -> Stored:
    """The stored weight of a description, with `take(name)` for its arrays. Raises a ValueError if they do not fit."""

    def array(name: str, *dtypes: Any, optional: bool = False) -> Any:
        tensor = take(name)
        if tensor is None and not optional:
            raise ValueError(f"{what} has no tensor {name!r}: the file is incomplete")
        if tensor is not None and dtypes and tensor.dtype not in map(np.dtype, dtypes):
            raise ValueError(f"{what}: {name!r} is of dtype {tensor.dtype}, not {' or '.join(map(str, dtypes))}")
        return tensor

    try:
        kind, layer = described["type"], _layer_from_json(described["layer"])
        if kind == "PackedArray":
            n, m = _integer(described["n"]), _integer(described["m"])
            check_packing((n, m))
            stored: Stored = PackedArray(array("values"), array("codes", np.uint8), n, m, layer)
        elif kind == "BlockSparseArray":
            stored = BlockSparseArray(array("blocks"), array("rows", np.int32), array("columns", np.int32), layer)
        elif kind == "ClusteredArray":
            has_zeros = described["has_zeros"]
            if not isinstance(has_zeros, bool):
                raise ValueError(f"has_zeros is {str(has_zeros)[:200]!r}, neither true nor false")
            stored = ClusteredArray(array("words", np.int32), array("codebook"), has_zeros, layer)
        elif kind == "QuantizedArray":

            def scales(name: str) -> Scales:
                format = ScaleFormat(**described[name])
                dtype = np.uint8 if format.dtype == "float8_e8m0fnu" else jnp.dtype(format.dtype)
                outer = None if format.outer is None else array(f"{name}.outer", np.float32)
                return Scales(array(f"{name}.codes", dtype), outer, format)

            stored = QuantizedArray(
                words=array("words", np.int32),
                scale=scales("scale"),
                zero=array("zero", np.int8, np.uint8, np.float32, np.float16, jnp.bfloat16, optional=True),
                minimum=scales("minimum") if "minimum" in described else None,
                order=array("order", np.int32, optional=True),
                input_scale=array("input_scale", optional=True),
                format=_format_from_json(described["format"]),
                dtype=jnp.dtype(_name(described["dtype"])),
                layer=layer,
            )
        else:
            raise ValueError(f"the type {str(kind)[:200]!r} is not known to this version")
        _check(stored)
    except (KeyError, TypeError, ValueError, IndexError, OverflowError) as e:
        prefix = "" if str(e).startswith(what) else f"{what} is not described as it should be: "
        raise ValueError(f"{prefix}{_reason(e)}") from e
    return jax.tree.map(on_device, stored)


def _check(stored: Stored) -> None:
    """Raises unless the shapes of the arrays are those that the description says."""
    arrays = tensors_of(stored)
    for name, a in arrays.items():
        if a.ndim < 1:
            raise ValueError(f"{name!r} is a scalar")
    shape, axes = stored.shape, stored.axes
    rows_columns = jax.eval_shape(axes.matrix, jax.ShapeDtypeStruct(shape, stored.dtype)).shape
    for name, expected in _shapes(stored, rows_columns):
        got = arrays[name].shape
        if len(got) != len(expected) or any(g not in e for g, e in zip(got, expected, strict=True)):
            wanted = tuple(sizes[0] if len(sizes) == 1 else sizes for sizes in expected)
            raise ValueError(f"{name!r} has shape {got}, a weight of shape {shape} needs {wanted}")
    if not jnp.issubdtype(stored.dtype, jnp.floating):
        raise ValueError(f"its values are of dtype {stored.dtype}, not floating-point numbers")
    if isinstance(stored, QuantizedArray) and stored.order is not None:
        expected = np.arange(stored.order.shape[-1])
        if stored.order.size and not np.array_equal(
            np.sort(stored.order, -1), np.broadcast_to(expected, stored.order.shape)
        ):
            raise ValueError("'order' is no permutation of the rows")
    if isinstance(stored, ClusteredArray) and stored.n_values < 2**stored.bits:
        for words in stored.words.reshape(-1, *stored.words.shape[-2:]):
            highest = from_words(words, stored.bits, rows_columns[-2]).max(initial=0)
            if highest >= stored.n_values:
                raise ValueError(f"'words' has the code {highest}, of {stored.n_values} values")


def _shapes(stored: Stored, matrix: tuple[int, ...]) -> Iterator[tuple[str, list[tuple[int, ...]]]]:
    """(name, the sizes that each axis may have) of the arrays of a weight that is read as matrices of this shape."""
    *batch, rows, columns = matrix
    lead = [(b,) for b in batch]
    if isinstance(stored, PackedArray):
        kept = rows // stored.m * stored.n
        n_codes = -(-kept // (8 // (1 if stored.m == 2 else 2 if stored.m <= 4 else 4)))
        yield "values", [*lead, (kept,), (columns,)]
        yield "codes", [*lead, (n_codes,), (columns,)]
    elif isinstance(stored, BlockSparseArray):
        n = stored.blocks.shape[-3]
        yield "blocks", [*lead, (n,), (stored.blocks.shape[-2],), (stored.blocks.shape[-1],)]
        yield "rows", [*lead, (n,)]
        yield "columns", [*lead, (n,)]
    elif isinstance(stored, ClusteredArray):
        if not 0 < stored.n_values <= MOST_VALUES or not stored.codebook.shape[-2]:
            raise ValueError(f"'codebook' has shape {stored.codebook.shape}, a weight has 1 to {MOST_VALUES} values")
        yield "codebook", [*lead, (stored.codebook.shape[-2],), (columns, 1)]
        yield "words", [*lead, (n_words(rows, stored.bits),), (columns,)]
    else:
        format = stored.format
        n_blocks, _ = format.blocks(rows)
        blocks = [*lead, (n_blocks, 1), (columns, 1)]
        yield "words", [*lead, (n_words(rows, format.grid.bits),), (columns,)]
        for name in ("scale", "minimum"):
            scales = getattr(stored, name)
            if scales is None:
                continue
            yield f"{name}.codes", blocks
            if scales.outer is not None:
                n = scales.format.outer
                yield f"{name}.outer", [*lead, (math.ceil(n_blocks / n) if n else 1, 1), (columns, 1)]
        if stored.zero is not None:
            yield "zero", blocks
        for name in ("order", "input_scale"):
            if getattr(stored, name) is not None:
                yield name, [*lead, (rows,)]


def _format_to_json(format: Format) -> dict[str, Any]:
    kind = next(name for name, cls in _GRIDS.items() if isinstance(format.grid, cls))
    described = {f.name: getattr(format, f.name) for f in dataclasses.fields(format)}
    scale = dataclasses.asdict(format.scale)
    return described | {"grid": {"kind": kind, **dataclasses.asdict(format.grid)}, "scale": scale}  # type: ignore[call-overload]


def _format_from_json(described: Mapping[str, Any]) -> Format:
    fields = dict(described)
    grid = dict(fields.pop("grid"))
    kind = grid.pop("kind")
    if kind not in _GRIDS:
        raise ValueError(f"the grid {str(kind)[:200]!r} is not known to this version")
    if isinstance(grid.get("values"), list):
        grid["values"] = tuple(grid["values"])
    return Format(_GRIDS[kind](**grid), scale=ScaleFormat(**fields.pop("scale")), **fields)


def _layer_to_json(layer: Layer) -> dict[str, Any]:
    return {"shape": list(layer.shape), "axes": dataclasses.asdict(layer.axes)}


def _layer_from_json(described: Mapping[str, Any]) -> Layer:
    shape = tuple(_integer(size) for size in described["shape"])
    if any(size < 0 for size in shape) or math.prod(max(s, 1) for s in shape) >= (2**31 if 0 in shape else 2**59):
        raise ValueError(f"no weight has the shape {shape}")
    axes = dict(described["axes"])
    groups = _integer(axes.pop("groups"))
    named = {name: tuple(map(_integer, value)) for name, value in axes.items()}
    if any(a >= 0 for value in named.values() for a in value):
        raise ValueError(f"axes must be counted from the end, got {named}")
    return Layer(shape, Axes(**named, groups=groups))


def _integer(value: Any) -> int:
    if type(value) is not int:
        raise ValueError(f"{str(value)[:200]!r} is no integer")
    return value


def _name(value: Any) -> str:
    if value not in ("float32", "float16", "bfloat16", "float64"):
        raise ValueError(f"{str(value)[:200]!r} is no dtype of a weight")
    return value


def _reason(e: Exception) -> str:
    return f"it has no {e}" if isinstance(e, KeyError) else str(e)
