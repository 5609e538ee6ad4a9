"""AWQ: finer steps for the inputs that matter more, and ranges clipped by the error of the outputs."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from jaxweights.core.checks import check_weight
from jaxweights.core.method import Method
from jaxweights.core.packing import pack
from jaxweights.core.second_moment import stored_with_second_moment
from jaxweights.numerics.norms import safe_divide
from jaxweights.techniques.quantization.array import QuantizedArray
from jaxweights.techniques.quantization.blocks import Parts, decode, encode
from jaxweights.techniques.quantization.formats import Format, format_of
from jaxweights.techniques.quantization.quantize import check_range, fit_matrix, from_blocks, in_blocks, quantize
from jaxweights.techniques.quantization.ranges import Range
from jaxweights.techniques.quantization.scales import Scales

_STEPS = 20
"""α and the fraction that is clipped are searched in steps of 1/20."""


@dataclasses.dataclass(frozen=True)
class AWQ(Method):
    """Activation-aware quantization: scales weights before it rounds them, those of inputs of large |x| the most.

    ŵ = round(w·s)/s, where s is mean|x|^α over √(max·min) of it, for the α of 0, .05, ..., .95 with the least error of
    the outputs, E‖(Ŵ − W)ᵀx‖². Then the range of each block is clipped to 1, .95, ... or .55 of its largest magnitude,
    whichever has the least error in what the block adds to the outputs, unless this raises the error of the whole. So
    the error is never larger than that of `RoundToNearest`. 1/s is stored with the weight: products multiply x by it.
    Files in the formats "awq", "gptq" and "compressed-tensors" have no place for it: `GPTQ`, and `RoundToNearest` after
    `jaxweights.smooth`, give weights that can be saved in them.

    Args:
      format: as in `quantize`: a number of bits, a name such as "nf4", or a `jaxweights.formats.Format`.
      block: number of consecutive inputs of an output unit that share a scale, in place of that of the format.
      range: how scales are chosen, one of `jaxweights.ranges`.
      clip: whether to clip ranges.

    >>> import jax.numpy as jnp
    >>> import jaxweights as jw
    >>> params, x = {"kernel": jnp.array([[0.6], [3.0]])}, jnp.array([[9.0, 1.0], [-9.0, 1.0]])
    >>> stats = jw.capture(lambda params, x: x @ params["kernel"], params, [x])
    >>> for method in jw.methods.RoundToNearest(3), AWQ(3):
    ...     w = method.fit(params["kernel"], stats["kernel"]).todense()
    ...     print([f"{value:.2f}" for value in w.ravel()])
    ['1.00', '3.00']
    ['0.60', '3.00']

    References: Lin et al., AWQ: Activation-aware Weight Quantization for On-Device LLM Compression and Acceleration,
    arXiv:2306.00978, 2023.
    """

    format: int | str | Format
    _: dataclasses.KW_ONLY
    block: int | None = None
    range: Range | None = None
    clip: bool = True
    needs: ClassVar[frozenset[str]] = frozenset({"mean_abs", "second_moment"})

    def __post_init__(self):
        check_range(self.range, format_of(self.format, self.block))

    def fit(self, w, stats):
        """Returns the weight as a `QuantizedArray` with `input_scale`."""
        w, format = check_weight(w), format_of(self.format, self.block)
        if w.size == 0:
            return quantize(w, format, axes=stats.axes)
        code = partial(_code, format=format, range=check_range(self.range, format), clip=self.clip)
        coded, layer = stored_with_second_moment(code, w, stats.second_moment, stats.mean_abs, axes=stats.axes)
        words, scale, zero, input_scale = coded
        return QuantizedArray(words, scale, zero, None, None, input_scale, format, w.dtype, layer)


class _Fit(NamedTuple):
    """The scales that suit a matrix, and what becomes of it with them."""

    scales: Scales
    parts: Parts
    codes: jax.Array
    new: jax.Array


@partial(jax.jit, static_argnames=("format", "range", "clip"))
def _code(
    w: jax.Array, h: jax.Array, mean_abs: jax.Array, *, format: Format, range: Range, clip: bool
) -> tuple[jax.Array, Scales, jax.Array | None, jax.Array]:
    """(words, scales, zero points, 1/s) of a matrix."""

    h = safe_divide(h, jnp.max(jnp.diagonal(h)))  # errors of any unit will do

    def scaled(s: jax.Array) -> tuple[jax.Array, jax.Array]:
        return w * s[:, None], h / s[None] / s[:, None]

    def error(fit: _Fit, matrix: jax.Array, moment: jax.Array) -> jax.Array:
        return _error(safe_divide(fit.new - matrix, jnp.max(jnp.abs(w))), moment)

    def error_at(alpha: jax.Array) -> jax.Array:
        matrix, moment = scaled(_importance(mean_abs, alpha).astype(w.dtype))
        return error(_fitted(matrix, matrix, format, range), matrix, moment)

    alphas = jnp.arange(_STEPS) / _STEPS
    errors = jax.lax.map(error_at, alphas.astype(w.dtype))
    s = _importance(mean_abs, alphas[jnp.argmin(errors)].astype(w.dtype)).astype(w.dtype)
    matrix, moment = scaled(s)
    fit = _fitted(matrix, matrix, format, range)
    if clip:
        clipped = _fitted(_clipped(matrix, moment, format, range), matrix, format, range)
        better = error(clipped, matrix, moment) < error(fit, matrix, moment)
        fit = jax.tree.map(lambda a, b: jnp.where(better, a, b), clipped, fit)
    zero = None if fit.parts.zero is None else jnp.squeeze(fit.parts.zero, -2)
    return pack(fit.codes, format.grid.bits), fit.scales, zero, (1 / s).astype(jnp.float32)


def _importance(mean_abs: jax.Array, alpha: jax.Array) -> jax.Array:
    """s = mean|x|^α/√(max·min). An input that never occurs counts as the least of the others."""
    least = jnp.min(jnp.where(mean_abs > 0, mean_abs, jnp.inf))
    mean_abs = jnp.where(mean_abs > 0, mean_abs, jnp.where(jnp.isfinite(least), least, 1))
    # Of the logarithm, so that no power overflows.
    log = alpha * jnp.log(mean_abs)
    return jnp.exp(log - (jnp.max(log) + jnp.min(log)) / 2)


def _fitted(range_of: jax.Array, matrix: jax.Array, format: Format, range: Range) -> _Fit:
    """A matrix coded with the scales that suit another, which is it with its weights clipped."""
    scales, parts = fit_matrix(range_of, format, range)
    codes = encode(in_blocks(matrix, format), parts, format)
    new = from_blocks(decode(codes, parts, format), matrix.shape).astype(matrix.dtype)
    return _Fit(scales, parts, from_blocks(codes, matrix.shape), new)


def _error(delta: jax.Array, h: jax.Array) -> jax.Array:
    """E‖Δᵀx‖² = tr(ΔᵀHΔ)."""
    return jnp.sum(delta * jnp.matmul(h, delta, precision="highest"))


def _clipped(matrix: jax.Array, h: jax.Array, format: Format, range: Range) -> jax.Array:
    """The matrix with the weights of each block clipped so that what the block adds to the outputs errs the least."""
    rows, _ = matrix.shape
    n_blocks, size = format.blocks(rows)
    padding = n_blocks * size - rows
    split = jnp.pad(h, ((0, padding), (0, padding))).reshape(n_blocks, size, n_blocks, size)
    of_blocks = jnp.moveaxis(jnp.diagonal(split, axis1=0, axis2=2), -1, 0)  # (blocks, size, size)
    blocks = in_blocks(matrix, format)
    over = (-2, -1) if format.per_tensor else (-2,)
    top = jnp.max(jnp.abs(blocks), over, keepdims=True)

    def at(fraction: jax.Array) -> jax.Array:
        return jnp.clip(blocks, -fraction * top, fraction * top)

    def error_at(fraction: jax.Array) -> jax.Array:
        clipped = from_blocks(at(fraction), matrix.shape)
        delta = safe_divide(in_blocks(_fitted(clipped, matrix, format, range).new - matrix, format), top)
        return jnp.sum(delta * jnp.matmul(of_blocks, delta, precision="highest"), over, keepdims=True)

    fractions = (1 - jnp.arange(_STEPS // 2) / _STEPS).astype(matrix.dtype)
    errors = jax.lax.map(error_at, fractions)
    return from_blocks(at(fractions[jnp.argmin(errors, 0)]), matrix.shape)
