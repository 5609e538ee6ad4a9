"""GPTQ: rounding input by input; after each, the remaining weights are updated to make up for the errors."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from jaxweights.core.checks import check_scalar, check_weight
from jaxweights.core.method import Method
from jaxweights.core.packing import pack
from jaxweights.core.second_moment import stored_with_second_moment
from jaxweights.core.transform import Number
from jaxweights.numerics.error_feedback import Block, error_feedback
from jaxweights.techniques.quantization.array import QuantizedArray
from jaxweights.techniques.quantization.blocks import Parts, decode, encode
from jaxweights.techniques.quantization.formats import Format, format_of
from jaxweights.techniques.quantization.quantize import check_range, fit_blocks, fit_matrix, quantize
from jaxweights.techniques.quantization.ranges import Range
from jaxweights.techniques.quantization.scales import Scales


@dataclasses.dataclass(frozen=True)
class GPTQ(Method):
    """Rounds a weight so that the layer's outputs on the calibration data change little.

    Let H = E[xxᵀ] + λI and UᵀU = H⁻¹ with U upper triangular. The inputs i are visited in order. Each w_i becomes the
    nearest value ŵ_i of the format, and the inputs after it are updated to make up for the error:
    w_j ← w_j − U_ij·(w_i − ŵ_i)/U_ii for j > i. The scales of a block are chosen when its first input is reached. The
    weights of an input that never occurs are rounded as they are.

    Weights that are 0 stay 0 if the format has a 0, and their errors are made up for too. So
    `(SparseGPT((2, 4)), GPTQ(4))` prunes and quantizes.

    Args:
      format: as in `quantize`: a number of bits, a name such as "nf4", or a `jaxweights.formats.Format`.
      block: number of consecutive inputs of an output unit that share a scale, in place of that of the format.
      range: how scales are chosen, one of `jaxweights.ranges`, as `MSE()`.
      act_order: whether to visit the inputs in the order of falling E[x²]. Blocks then are of inputs that follow each
        other in this order, which is stored too, unless `static_groups`.
      static_groups: whether the scales of all blocks are chosen at the start, from the weights as they were.
      damping: λ as a fraction of the mean of the diagonal of E[xxᵀ].

    >>> import jax.numpy as jnp
    >>> import jaxweights as jw
    >>> params, x = {"kernel": jnp.array([[0.6], [3.0], [1.6]])}, jnp.array([[1.0, 1.0, 1.0], [0.1, 0.0, 0.0]])
    >>> stats = jw.capture(lambda params, x: x @ params["kernel"], params, [x])
    >>> for method in jw.methods.RoundToNearest(3), GPTQ(3):  # 0.6 is rounded up, so 1.6 is rounded down
    ...     print(method.fit(params["kernel"], stats["kernel"]).todense().ravel())
    [1. 3. 2.]
    [1. 3. 1.]

    References: Frantar, Ashkboos, Hoefler and Alistarh, GPTQ: Accurate Post-Training Quantization for Generative
    Pre-trained Transformers, arXiv:2210.17323, 2022; Frantar and Alistarh, SparseGPT, arXiv:2301.00774, 2023 (of
    pruned weights).
    """

    format: int | str | Format
    _: dataclasses.KW_ONLY
    block: int | None = None
    range: Range | None = None
    act_order: bool = False
    static_groups: bool = False
    damping: Number = 0.01
    needs: ClassVar[frozenset[str]] = frozenset({"second_moment"})

    def __post_init__(self):
        check_range(self.range, format_of(self.format, self.block))
        check_scalar("damping", self.damping, 0)

    def fit(self, w, stats):
        """Returns the weight as a `QuantizedArray`."""
        w, format = check_weight(w), format_of(self.format, self.block)
        if w.size == 0:
            return quantize(w, format, axes=stats.axes)
        code = partial(
            _code,
            damping=self.damping,
            format=format,
            range=check_range(self.range, format),
            act_order=self.act_order,
            static_groups=self.static_groups,
        )
        coded, layer = stored_with_second_moment(code, w, stats.second_moment, axes=stats.axes)
        return QuantizedArray(coded.words, coded.scale, coded.zero, None, coded.order, None, format, w.dtype, layer)


class _Coded(NamedTuple):
    """What is stored of a matrix."""

    words: jax.Array
    scale: Scales
    zero: jax.Array | None
    order: jax.Array | None


class _State(NamedTuple):
    """What is known in a block of visits.

    Attributes:
      parts: with which its rows are coded, (rows or 1, columns).
      kept: which of its weights were not 0, (rows, columns).
      codes: of the rows that were visited.
      scales: as they are stored, if they were chosen for this block.
    """

    parts: Parts
    kept: jax.Array
    codes: jax.Array
    scales: Scales | None


@partial(jax.jit, static_argnames=("format", "range", "act_order", "static_groups"))
def _code(
    w: jax.Array, h: jax.Array, *, damping: Number, format: Format, range: Range, act_order: bool, static_groups: bool
) -> _Coded:
    """Codes a matrix."""
    rows, columns = w.shape
    n_blocks, size = format.blocks(rows)
    at_once = static_groups or n_blocks == 1
    step = min(_STEP, rows) if at_once else size
    order = jnp.argsort(-jnp.diagonal(h), stable=True) if act_order else jnp.arange(rows)
    in_order = w[order] if act_order else w
    scales, parts = fit_matrix(w if at_once else in_order, format, range)
    kept = jnp.pad(in_order != 0, ((0, -rows % step), (0, 0)))
    block_of_row = jnp.pad(order // size, (0, -rows % step))

    def begin(of_block: Block, number: jax.Array) -> _State:
        kept_here = jax.lax.dynamic_slice_in_dim(kept, step * number, step)
        codes = jnp.zeros((step, columns), jnp.uint8)
        if at_once:
            here = jax.lax.dynamic_slice_in_dim(block_of_row, step * number, step)
            return _State(_squeezed(parts, here), kept_here, codes, None)
        there = of_block.there[None, :, None] if rows % size else None
        x = jnp.where(kept_here, of_block.w, 0)[None]
        of_scales, of_parts = fit_blocks(x, format, range, there, _factor(scales, number))
        return _State(_squeezed(of_parts, jnp.zeros(1, int)), kept_here, codes, of_scales)

    def visit(i: jax.Array, of_block: Block, state: _State) -> tuple[jax.Array, _State]:
        of_row = jax.tree.map(lambda a: a[i] if len(a) > 1 else a[0], state.parts)
        codes = encode(jnp.where(state.kept[i], of_block.w[i], 0), of_row, format)
        value = decode(codes, of_row, format).astype(w.dtype)
        return value, state._replace(codes=state.codes.at[i].set(codes.astype(jnp.uint8)))

    if act_order:
        h = h[order][:, order]
    _, states = error_feedback(in_order, h, damping, begin, visit, block=step)
    codes = states.codes.reshape(-1, columns)[:rows]
    if at_once:
        codes = codes[jnp.argsort(order)] if act_order else codes
        zero = None if parts.zero is None else jnp.squeeze(parts.zero, -2)
        return _Coded(pack(codes, format.grid.bits), scales, zero, None)
    assert states.scales is not None
    scales = dataclasses.replace(scales, codes=states.scales.codes.reshape(n_blocks, columns))
    zero = None if states.parts.zero is None else states.parts.zero.reshape(n_blocks, columns)
    return _Coded(pack(codes, format.grid.bits), scales, zero, order.astype(jnp.int32) if act_order else None)


_STEP = 128
"""Number of inputs whose updates of later ones are summed up, where the scales are known from the start."""


def _squeezed(parts: Parts, index: jax.Array) -> Parts:
    """The parts (blocks, 1, columns) of the blocks of this index, (index, columns)."""
    return jax.tree.map(lambda a: a[index, 0], parts._replace(reach=None))


def _factor(scales: Scales, number: jax.Array) -> jax.Array | None:
    """The factor of the scales of a block, if there is one."""
    if scales.outer is None or not scales.format.outer:
        return scales.outer
    return jax.lax.dynamic_slice_in_dim(scales.outer, number // scales.format.outer, 1)
