"""How the scales of a format are stored: in few bits, or as codes times a factor that many of them share."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from jaxweights.core.checks import check_choice, check_integer
from jaxweights.numerics.norms import safe_divide
from jaxweights.techniques.quantization.grids import Floats

_POWERS = "float8_e8m0fnu"
_CODES = ("uint8", "int8")
_LARGEST = {"uint8": 255.0, "int8": 127.0, "float8_e4m3fn": 448.0, "float16": 65504.0}
_DTYPES = ("float32", "float16", "bfloat16", "float8_e4m3fn", _POWERS, *_CODES)
_E4M3 = Floats(4, 3, 1)


@dataclasses.dataclass(frozen=True)
class ScaleFormat:
    """How scales are stored: rounded to nearest.

    Without a factor, scales above the largest number of the dtype become it, and those up to half its least become 0,
    and their weights too: of float8_e4m3fn, above 448 and up to 2^-10; of float16, above 65504 and up to 2^-25. With
    `outer=0`, scales use the range of the dtype whatever the magnitude of the weights.

    Args:
      dtype: the name of a dtype: "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e8m0fnu" (powers of two, a
        byte each), or "uint8" or "int8" with `outer`. Powers of two are rounded down, as the MX formats have it.
      outer: number of consecutive blocks of an output unit whose scales are codes times one factor in float32: double
        quantization. 0 is one factor for the whole matrix. None is no factor.

    >>> import jaxweights as jw
    >>> for scale in ScaleFormat(), ScaleFormat("bfloat16"), ScaleFormat("uint8", outer=256):
    ...     print(jw.formats.integers(4, block=32, scale=scale).bits_per_weight(8192, 64))
    5.0
    4.5
    4.25390625

    References: Dettmers et al., QLoRA, arXiv:2305.14314, 2023 (double quantization); Rouhani et al., Microscaling Data
    Formats for Deep Learning, arXiv:2310.10537, 2023 (powers of two).
    """

    dtype: str = "float32"
    outer: int | None = None

    def __post_init__(self):
        check_choice("dtype", self.dtype, _DTYPES)
        if self.outer is not None:
            check_integer("outer", self.outer, 0)
        if self.outer is None and self.dtype in _CODES:
            raise ValueError(f"scales in {self.dtype} are codes of a factor: give outer=256 too")
        if self.outer is not None and self.dtype == _POWERS:
            raise ValueError("powers of two have a range that needs no factor: leave outer=None")

    def encode(self, scale: jax.Array, reach: jax.Array, peak: float, outer: jax.Array | None = None) -> Scales:
        """Stores scales (..., blocks, columns).

        Args:
          scale: what to store, not negative. What is not finite is read back as NaN.
          reach: the magnitude that comes to lie at `peak`: of it, a power of two is made.
          peak: of the grid.
          outer: the factors, if they are chosen already; scales beyond their reach become the largest. By default the
            least that reach all scales.
        """
        scale = jnp.where(jnp.isfinite(scale), scale, jnp.nan).astype(jnp.float32)
        if self.dtype == _POWERS:
            byte = jnp.clip(_floor_log2(reach) - (math.frexp(peak)[1] - 1) + 127, 0, 254)
            return Scales(jnp.where(jnp.isfinite(reach), byte, 255).astype(jnp.uint8), None, self)
        if self.outer is None:
            return Scales(self._rounded(scale), None, self)
        if outer is None:
            outer = _shared_max(scale, self.outer) / _LARGEST.get(self.dtype, 1.0)
        codes = safe_divide(scale, _spread(outer, self.outer, scale.shape[-2]))
        if self.dtype in _CODES:
            codes = jnp.where(scale > 0, jnp.maximum(codes, 1), codes)  # a small scale is no 0
        return Scales(self._rounded(codes), outer, self)

    def _rounded(self, scale: jax.Array) -> jax.Array:
        """The scales in the dtype. NaN is 0 in a dtype of integers: the factor is NaN then."""
        scale = jnp.minimum(scale, _LARGEST.get(self.dtype, jnp.inf))
        if self.dtype in _CODES:
            return jnp.round(jnp.nan_to_num(scale)).astype(self.dtype)
        if self.dtype == "float8_e4m3fn":  # some versions of XLA round twice on the way to 8 bits
            code = jnp.where(jnp.isnan(scale), 0x7F, _E4M3.encode(scale)).astype(jnp.uint8)
            return jax.lax.bitcast_convert_type(code, jnp.float8_e4m3fn)
        return scale.astype(self.dtype)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["codes", "outer"], meta_fields=["format"])
@dataclasses.dataclass(frozen=True)
class Scales:
    """Stored scales, one per block and column, or one for all blocks or all columns.

    Attributes:
      codes: (*batch, blocks, columns), of the dtype of the format; powers of two as bytes b, 2^(b − 127).
      outer: the factors (*batch, groups of blocks, columns), or None.
      format: how they are stored.
    """

    codes: jax.Array
    outer: jax.Array | None
    format: ScaleFormat

    def values(self) -> jax.Array:
        """The scales, float32 (*batch, blocks, columns)."""
        if self.format.dtype == _POWERS:
            return _power_of_two(self.codes)
        values = self.codes.astype(jnp.float32)
        if self.outer is None:
            return values
        assert self.format.outer is not None
        return values * _spread(self.outer.astype(jnp.float32), self.format.outer, self.codes.shape[-2])

    def widened(self) -> Scales:
        """The same in a dtype that is quick to read, where scales are read once for each row of their block."""
        is_slow = self.format.dtype == "float8_e4m3fn"
        return dataclasses.replace(self, codes=self.codes.astype(jnp.float16)) if is_slow else self

    def of_blocks(self, start: jax.Array | int, n: int) -> jax.Array:
        """The scales of n consecutive blocks of one matrix, float32 (n, columns)."""
        if self.format.outer:
            return jax.lax.dynamic_slice_in_dim(self.values(), start, n)
        codes = jax.lax.dynamic_slice_in_dim(self.codes, start, n)
        return dataclasses.replace(self, codes=codes).values()


def _shared_max(scale: jax.Array, n_blocks: int) -> jax.Array:
    """The largest scale of each `n_blocks` blocks of a column; of all blocks and columns if it is 0."""
    if n_blocks == 0:
        return jnp.max(scale, (-2, -1), keepdims=True, initial=0)
    *lead, blocks, columns = scale.shape
    padded = jnp.pad(scale, [(0, 0) for _ in lead] + [(0, -blocks % n_blocks), (0, 0)])
    return jnp.max(padded.reshape(*lead, -(-blocks // n_blocks), n_blocks, columns), -2, initial=0)


def _spread(outer: jax.Array, n_blocks: int, blocks: int) -> jax.Array:
    """The factor of each block."""
    return outer if n_blocks == 0 else jnp.repeat(outer, n_blocks, -2)[..., :blocks, :]


def _floor_log2(x: jax.Array) -> jax.Array:
    """⌊log₂ x⌋ of float32 numbers of at least 2^−126, −127 below."""
    return (jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32) >> 23) - 127


def _power_of_two(byte: jax.Array) -> jax.Array:
    """2^(b − 127); 0 for b = 0, where XLA would flush the subnormal number; NaN for b = 255."""
    power = jax.lax.bitcast_convert_type(byte.astype(jnp.int32) << 23, jnp.float32)
    return jnp.where(byte == 255, jnp.nan, power)
