"""Tensors of GGUF in blocks: codes and scales of 32 or 256 consecutive inputs lie together."""

from __future__ import annotations

import numpy as np

from jaxweights.core.axes import Reading
from jaxweights.files.bits import from_words
from jaxweights.files.codec import columns, quantized
from jaxweights.files.gguf import BLOCK_TYPES, Blocks
from jaxweights.files.gguf_layouts import LAYOUTS, Fields
from jaxweights.files.mapping import on_device
from jaxweights.techniques.quantization.array import QuantizedArray
from jaxweights.techniques.quantization.formats import Format
from jaxweights.techniques.quantization.grids import Integers
from jaxweights.techniques.quantization.scales import Scales


def read(blocks: Blocks) -> QuantizedArray:
    """The weight of a tensor (..., out, in), or of a vector of inputs (in,) as one output."""
    kind = LAYOUTS[blocks.type]
    fields = kind.split(blocks.data)
    *lead, n_blocks, _ = blocks.data.shape
    lead = lead or [1]

    def flat(a: np.ndarray) -> np.ndarray:
        return a.reshape(*lead, n_blocks * a.shape[-1])

    def factor(a: np.ndarray | None) -> np.ndarray | None:
        return None if a is None else columns(flat(a).astype(np.float32))

    minimum = None
    if fields.minimum is not None:
        outer = factor(fields.minimum_outer)
        codes = on_device(columns(flat(fields.minimum)))
        minimum = Scales(codes, None if outer is None else on_device(outer), kind.format.scale)
    return quantized(
        flat(fields.codes),
        kind.format,
        columns(flat(fields.scale)),
        np.float32,
        outer=factor(fields.outer),
        minimum=minimum,
    )


def write(what: str, q: QuantizedArray) -> Blocks:
    """The blocks of a weight, without loss. Raises a ValueError if GGUF has no type for it."""
    name = type_of(what, q)
    kind, rows, n = LAYOUTS[name], q.rows, q.words.shape[-1]
    r = Reading.of(q.axes, q.shape)
    batch = q.words.shape[:-2]
    n_blocks = rows // BLOCK_TYPES[name].rows

    def split(values: np.ndarray, count: int) -> np.ndarray:
        """(*batch, count, N or 1) as (*batch, N, blocks of the type, entries)."""
        full = np.broadcast_to(values, (*batch, count, n))
        return columns(full).reshape(*batch, n, n_blocks, count // n_blocks if n_blocks else 1)

    def half(values: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):
            cast = values.astype(np.float16)
        if not np.array_equal(cast.astype(np.float32), values.astype(np.float32), equal_nan=True):
            raise ValueError(f"{what} has scales that float16 cannot hold, as {name} does: save it as safetensors")
        return cast

    codes = from_words(np.asarray(q.words), q.format.grid.bits, rows)
    n_scales = rows // (kind.format.block or 1)

    def of(scales: Scales) -> tuple[np.ndarray, np.ndarray | None]:
        codes = np.asarray(scales.codes)
        if kind.format.scale.outer is None:
            stored = codes if kind.format.scale.dtype == "float8_e8m0fnu" else half(codes)
            return split(stored, n_scales), None
        assert kind.scales is not None
        if codes.size and not kind.scales[0] <= codes.min() <= codes.max() <= kind.scales[1]:
            raise ValueError(
                f"{what} has codes of scales from {codes.min()} to {codes.max()}, {name} holds {kind.scales[0]} to "
                f"{kind.scales[1]}: save it as safetensors"
            )
        return split(codes, n_scales), split(half(np.asarray(scales.outer)), n_blocks)

    scale, outer = of(q.scale)
    minimum, minimum_outer = (None, None) if q.minimum is None else of(q.minimum)
    fields = Fields(codes.reshape(*batch, n, n_blocks, -1 if codes.size else 0), scale, outer, minimum, minimum_outer)
    assert r.groups == 1
    return Blocks(name, (*batch, n, rows), kind.join(fields))


def type_of(what: str, q: QuantizedArray) -> str:
    """The type of GGUF that holds a weight, or an error."""
    other = [name for name in ("zero", "order", "input_scale") if getattr(q, name) is not None]
    if other:
        raise ValueError(f"{what} has an array {other[0]!r}, no type of GGUF has one: save it as safetensors")
    if Reading.of(q.axes, q.shape).groups > 1:
        raise ValueError(f"{what} has groups, GGUF has matrices: save it as safetensors")
    for name, kind in LAYOUTS.items():
        same = _storage(q.format) == _storage(kind.format) and (q.minimum is not None) == kind.has_minimum
        if same and q.rows % BLOCK_TYPES[name].rows == 0:
            return name
    raise ValueError(
        f"{what} is of {q.format} with {q.rows} inputs, which no type of GGUF holds: quantize with "
        f"formats.integers(8, block=32, scale='float16') for Q8_0, formats.integers(4, block=32, scale='float16') for "
        f"Q4_0 or 'mxfp4' for MXFP4, or save it as safetensors"
    )


def _storage(format: Format) -> tuple[object, ...]:
    """What two formats share that have the same codes and scales: ends of the grid do not matter."""
    grid = format.grid
    kind = ("integers", grid.bits, grid.offset) if isinstance(grid, Integers) else grid
    return kind, format.block, format.scale, format.per_tensor
