"""What the formats of quantized tensors in files share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxweights.core.axes import Axes, Reading
from jaxweights.core.layer import Layer
from jaxweights.files.bits import from_words, to_words
from jaxweights.files.mapping import on_device
from jaxweights.techniques.quantization.array import QuantizedArray
from jaxweights.techniques.quantization.formats import Format
from jaxweights.techniques.quantization.grids import Integers
from jaxweights.techniques.quantization.scales import Scales

Config = Mapping[str, Any]
"""The `quantization_config` of a model; empty if there is none."""


class Codec(NamedTuple):
    """A format of quantized tensors in safetensors files: several tensors are one weight.

    Attributes:
      name: in the field.
      lead: the end of the name of the tensor that marks a weight, as ".qweight".
      parts: the ends of the names of all its tensors.
      replaced: what stands in place of `lead` in the name of the weight.
      reads: whether this tensor with `lead`, and the tensors of these ends beside it, are of the format.
      read: the weight, from `what` it is called in errors, its tensors by the ends of their names, and the config.
      write: the tensors of a weight.
      config: the `quantization_config` of such weights, by the names of their layers.
      holds: the type of the weights.
    """

    name: str
    lead: str
    parts: tuple[str, ...]
    replaced: str
    reads: Callable[[Mapping[str, np.ndarray], Config], bool]
    read: Callable[[str, Mapping[str, np.ndarray], Config], Any]
    write: Callable[[str, Any], dict[str, np.ndarray]]
    config: Callable[[Mapping[str, Any]], dict[str, Any]]
    holds: type = QuantizedArray


def part(what: str, parts: Mapping[str, np.ndarray], name: str, dtypes: Sequence[Any], ndim: int) -> np.ndarray:
    """The tensor of this name, or an error unless it is there, of one of these dtypes and of so many axes."""
    if name not in parts:
        raise ValueError(f"{what} has no tensor {name!r}, only {', '.join(map(repr, parts))}: the file is incomplete")
    tensor = parts[name]
    if tensor.dtype not in map(np.dtype, dtypes):
        wanted = " or ".join(str(np.dtype(d)) for d in dtypes)
        raise ValueError(f"{what}: {name!r} must be of dtype {wanted}, got {tensor.dtype}")
    if tensor.ndim != ndim:
        raise ValueError(f"{what}: {name!r} must have {ndim} axes, got shape {tensor.shape}")
    return tensor


def check_part_shape(what: str, name: str, got: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Raises unless the tensor of this name has the shape that the others call for."""
    if got != expected:
        raise ValueError(f"{what}: {name!r} must have shape {expected}, as the others tell, got {got}")


def agree(what: str, config: Config, key: str, found: object) -> None:
    """Raises if the config gives another value than the tensors. Models with a config of each layer are not checked."""
    if key in config and not config.get("dynamic") and config[key] != found:
        raise ValueError(
            f"{what}: its tensors say {key}={found}, the quantization_config says {str(config[key])[:200]}: "
            f"one of them is of another model"
        )


def quantized(
    codes: np.ndarray,
    format: Format,
    scale: np.ndarray,
    dtype: Any,
    *,
    outer: np.ndarray | None = None,
    zero: np.ndarray | None = None,
    minimum: Scales | None = None,
    order: np.ndarray | None = None,
) -> QuantizedArray:
    """The weight (*batch, N, K) of codes of its shape, with the arrays of a `QuantizedArray` for the rest."""
    return QuantizedArray(
        words=on_device(to_words(codes, format.grid.bits)),
        scale=Scales(on_device(scale), None if outer is None else on_device(outer), format.scale),
        zero=None if zero is None else on_device(zero),
        minimum=minimum,
        order=None if order is None else on_device(order),
        input_scale=None,
        format=format,
        dtype=jnp.dtype(dtype),
        layer=layer_of(codes.shape),
    )


def layer_of(shape: Sequence[int]) -> Layer:
    """How files read a weight: (*batch, out, in)."""
    return Layer.of(Axes(input=-1, output=-2, batch=tuple(range(len(shape) - 2))), shape)


def columns(values: np.ndarray) -> np.ndarray:
    """(..., blocks, N) as (..., N, blocks), or the other way round."""
    return np.ascontiguousarray(np.swapaxes(values, -1, -2))


class Matrix(NamedTuple):
    """What there is to write of a `QuantizedArray` that is one matrix.

    Attributes:
      codes: uint8 (N, K), in the order of the weight's inputs.
      scale: float (blocks, N), of the dtype of the format where there is no factor, else float32.
      zero: (blocks, N), the codes of 0, as integers; None where it is `offset` throughout.
      offset: the code of 0 without a zero point.
      group: int32 (K,), the block of each input.
      block: the inputs of a block.
    """

    codes: np.ndarray
    scale: np.ndarray
    zero: np.ndarray | None
    offset: int
    group: np.ndarray
    block: int


def matrix_of(what: str, q: QuantizedArray, format: str) -> Matrix:
    """The codes, scales and zero points of a weight of integers, or a ValueError if `format` cannot hold it."""
    r = Reading.of(q.axes, q.shape)
    grid = q.format.grid
    if r.batch or r.groups > 1:
        raise ValueError(f"{what} is a stack of weights or has groups, {format} has matrices: save each by itself")
    if q.minimum is not None:
        raise ValueError(f"{what} has an array 'minimum', {format} has none: quantize the weight without it")
    if q.input_scale is not None:
        raise ValueError(
            f"{what} has scales of its inputs, 'input_scale', as methods.AWQ makes them, {format} has none: quantize "
            f"with methods.GPTQ, or with methods.RoundToNearest after jaxweights.smooth"
        )
    if not isinstance(grid, Integers):
        raise ValueError(
            f"{what} is of {type(grid).__name__}, {format} has integers: quantize with formats.integers, "
            f"or leave format=None"
        )
    rows = q.rows
    n_blocks, block = q.format.blocks(rows)
    scale = np.asarray(
        q.scale.codes if q.scale.outer is None and q.format.scale.dtype != "float8_e8m0fnu" else q.scale.values()
    )
    zero = None if q.zero is None else np.asarray(q.zero)
    if zero is not None and zero.dtype.kind == "f":
        if np.any(zero != np.round(zero)) or np.any(np.abs(zero) > 255):
            raise ValueError(f"{what} has zero points that are no integers, {format} has integers: leave format=None")
        zero = zero.astype(np.int32)
    n = q.words.shape[-1]
    codes = from_words(np.asarray(q.words), grid.bits, rows)
    stored = (np.arange(rows) // max(block, 1)).astype(np.int32)
    if q.order is None:
        group = stored
    else:
        order = np.asarray(q.order)
        place = np.argsort(order)
        codes, group = codes[:, place], stored[place]
    full = (n_blocks, n)
    return Matrix(
        codes,
        np.broadcast_to(scale, full),
        None if zero is None else np.broadcast_to(zero.astype(np.int32) + grid.offset, full),
        grid.offset,
        group,
        block,
    )


def exactly(what: str, values: np.ndarray, dtype: Any) -> np.ndarray:
    """`values` in another dtype, or an error if that would change any."""
    if values.dtype == np.dtype(dtype):
        return values
    with np.errstate(over="ignore"):
        cast = values.astype(dtype)
    if not np.array_equal(cast.astype(np.float32), values.astype(np.float32), equal_nan=True):
        raise ValueError(
            f"{what} has scales in {values.dtype} that {np.dtype(dtype)} cannot hold: quantize with "
            f"scale='{np.dtype(dtype)}', as in formats.integers(4, block=128, scale='float16')"
        )
    return cast


def by_group(what: str, g_idx: np.ndarray, n_groups: int, block: int) -> np.ndarray | None:
    """The order of inputs in which those of each group lie together; None if they do already.

    Raises a ValueError unless the groups have `block` inputs each, the last maybe fewer.
    """
    rows = g_idx.shape[0]
    expected = np.arange(rows) // max(block, 1)
    order = np.argsort(g_idx, kind="stable").astype(np.int32)
    if n_groups != -(-rows // max(block, 1)) or not np.array_equal(g_idx[order], expected):
        raise ValueError(
            f"{what}: the groups of g_idx must be 0 to {n_groups - 1} with {block} inputs each, the last maybe fewer"
        )
    return None if np.array_equal(g_idx, expected) else order
