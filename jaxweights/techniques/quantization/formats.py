"""Formats: a grid, how many weights share a scale, and how the scales are stored."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from jaxweights.core.checks import check_integer
from jaxweights.techniques.quantization.grids import Floats, Grid, Integers, Levels
from jaxweights.techniques.quantization.scales import ScaleFormat

_FLOAT32 = ScaleFormat()


@dataclasses.dataclass(frozen=True)
class Format:
    """How a weight is stored: w ≈ value(code)·scale, or (value(code) − zero)·scale.

    Args:
      grid: the values of codes: `Integers`, `Levels` or `Floats`.
      block: number of consecutive inputs of an output unit that share a scale. None: all of them.
      scale: how scales are stored.
      zero_point: whether each scale has a zero point, for ranges that are not symmetric. Of integers only.
      per_tensor: whether all of a matrix shares one scale.

    >>> Format(Integers(4), block=128).bits_per_weight(4096, 4096)
    4.25
    """

    grid: Grid
    block: int | None = None
    scale: ScaleFormat = _FLOAT32
    zero_point: bool = False
    per_tensor: bool = False

    def __post_init__(self):
        if not isinstance(self.grid, Integers | Levels | Floats):
            raise TypeError(
                f"grid must be Integers, Levels or Floats, got {type(self.grid).__name__}: write Integers(4)"
            )
        if not isinstance(self.scale, ScaleFormat):
            raise TypeError(f"scale must be a ScaleFormat, got {self.scale!r}: write ScaleFormat('bfloat16')")
        if self.block is not None:
            check_integer("block", self.block, 1, remedy="None is all inputs")
        if self.zero_point and not isinstance(self.grid, Integers):
            raise ValueError(f"zero_point needs a grid of Integers, got {type(self.grid).__name__}: leave it False")
        if self.per_tensor and (self.block is not None or self.scale.outer is not None):
            raise ValueError("per_tensor is one scale for the whole matrix: leave out block and outer")

    @property
    def has_zero(self) -> bool:
        """Whether 0 is one of the values, so that what is pruned stays so. Zero points of `HQQ` are no integers."""
        if isinstance(self.grid, Levels):
            return 0 in self.grid.values
        return self.zero_point or not isinstance(self.grid, Integers) or self.grid.low <= 0 <= self.grid.high

    def __str__(self):
        """The name, or the nearest one, and what is different.

        >>> print(MXFP4, integers(4, block=128, symmetric=False, scale="float16"), sep="; ")
        mxfp4; int4, block 128, zero points, float16 scales
        """
        for name, named in _NAMED.items():
            if self == named:
                return name
        name = next((name for name, named in _NAMED.items() if _same_values(self.grid, named.grid)), str(self.grid))
        outer = {None: "", 0: " times one factor"}.get(self.scale.outer, f" times a factor per {self.scale.outer}")
        said = {
            f"block {self.block}": self.block is not None,
            "per tensor": self.per_tensor,
            "zero points": self.zero_point,
            f"{self.scale.dtype} scales{outer}": self.scale != ScaleFormat(),
        }
        return ", ".join([name, *(words for words, so in said.items() if so)])

    def blocks(self, rows: int) -> tuple[int, int]:
        """(number of blocks, rows of a block) of a matrix with this many rows. The last block may have fewer."""
        block = rows if self.block is None else min(self.block, rows)
        return -(-rows // max(block, 1)), block

    def bits_per_weight(self, rows: int, columns: int) -> float:
        """What a weight costs: codes, scales and zero points, without padding.

        A zero point counts as the byte of an integer. Those of the range `HQQ` are floats of 2 or 4 bytes.
        """
        check_integer("rows", rows, 1)
        check_integer("columns", columns, 1)
        n_blocks, _ = self.blocks(rows)
        n_scales = 1 if self.per_tensor else n_blocks * columns
        bits = n_scales * 8 * (_bytes(self.scale.dtype) + self.zero_point)
        if self.scale.outer is not None:
            outer = self.scale.outer
            bits += 32 * (columns * math.ceil(n_blocks / outer) if outer else 1)
        return self.grid.bits + bits / (rows * columns)


def _same_values(one: Grid, other: Grid) -> bool:
    """Whether two grids have the same name: integers of as many bits have, whatever their ends."""
    if isinstance(one, Integers) and isinstance(other, Integers):
        return one.bits == other.bits
    return one == other


def _bytes(dtype: str) -> int:
    return {"float32": 4, "float16": 2, "bfloat16": 2}.get(dtype, 1)


def integers(
    bits: int,
    *,
    block: int | None = None,
    symmetric: bool = True,
    scale: str | ScaleFormat = "float32",
    per_tensor: bool = False,
) -> Format:
    """Integers of 2 to 8 bits.

    Args:
      bits: b.
      block: number of consecutive inputs that share a scale; None: all inputs of an output unit.
      symmetric: codes from −(2^(b−1) − 1) to 2^(b−1) − 1 without a zero point; else all 2^b codes, and a zero point for
        each scale.
      scale: the name of a dtype, or a `ScaleFormat`.
      per_tensor: whether all of a matrix shares one scale.

    >>> integers(4, block=32, symmetric=False, scale="float16").bits_per_weight(64, 64)
    4.75
    """
    check_integer("bits", bits, 2, 8)
    grid = Integers(bits) if symmetric else Integers(bits, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    stored = scale if isinstance(scale, ScaleFormat) else ScaleFormat(scale)
    return Format(grid, block, stored, not symmetric, per_tensor)


_NF4_VALUES = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
E2M1, E4M3, E5M2 = Floats(2, 1), Floats(4, 3, 1), Floats(5, 2, 4)

NF4 = Format(Levels(_NF4_VALUES), 64)
"""Quantiles of a normal distribution, in blocks of 64 (Dettmers et al., QLoRA, arXiv:2305.14314, 2023)."""
NF4_DOUBLE = dataclasses.replace(NF4, scale=ScaleFormat("uint8", outer=256))
"""NF4 whose scales take 8 bits each, times a factor for 256 blocks of an output unit: double quantization."""
FP4 = Format(E2M1, 64)
"""E2M1 in blocks of 64: 0, .5, 1, 1.5, 2, 3, 4, 6 and their negatives."""
FP8_E4M3, FP8_E5M2 = Format(E4M3), Format(E5M2)
"""8-bit floats up to 448 and 57344, clipped, with a scale per output unit (Micikevicius et al., FP8 Formats for Deep
Learning, arXiv:2209.05433, 2022)."""
MXFP4, MXFP8 = (Format(grid, 32, ScaleFormat("float8_e8m0fnu")) for grid in (E2M1, E4M3))
"""E2M1 and E4M3 in blocks of 32 with powers of two (Rouhani et al., arXiv:2310.10537, 2023)."""
NVFP4 = Format(E2M1, 16, ScaleFormat("float8_e4m3fn", outer=0))
"""E2M1 in blocks of 16, with E4M3 scales times a factor for the whole matrix (NVIDIA, Pretraining Large Language Models
with NVFP4, arXiv:2509.25149, 2025)."""
TERNARY = Format(Levels((-1.0, 0.0, 1.0)))
"""−1, 0 and 1, times the mean magnitude of an output unit (Ma et al., The Era of 1-bit LLMs, arXiv:2402.17764,
2024)."""
BINARY = Format(Levels((-1.0, 1.0)))
"""−1 and 1, times the mean magnitude of an output unit (Rastegari et al., XNOR-Net, arXiv:1603.05279, 2016)."""

_NAMED = {
    **{f"int{bits}": integers(bits) for bits in range(2, 9)},
    **{"nf4": NF4, "fp4": FP4, "fp8_e4m3": FP8_E4M3, "fp8_e5m2": FP8_E5M2, "mxfp4": MXFP4, "mxfp8": MXFP8},
    **{"nvfp4": NVFP4, "ternary": TERNARY, "binary": BINARY},
}


def format_of(format: int | str | Format, block: int | None = None) -> Format:
    """The format that is meant by a number of bits, the name it has in the field, or itself; in blocks, if given.

    >>> format_of("int4", 32) == integers(4, block=32) == format_of(4, 32)
    True
    """
    if isinstance(format, str):
        if format not in _NAMED:
            names = ", ".join(map(repr, _NAMED))
            raise ValueError(f"format must be a number of bits, a Format or one of {names}, got {format!r}")
        format = _NAMED[format]
    elif not isinstance(format, Format):
        if isinstance(format, bool) or not isinstance(format, int | np.integer):
            raise TypeError(
                f"format must be a number of bits, a name such as 'nf4' or a jaxweights.formats.Format, got "
                f"{type(format).__name__} {format!r}"
            )
        check_integer("bits", format, 2, 8)
        format = integers(int(format))
    return format if block is None else dataclasses.replace(format, block=block)
