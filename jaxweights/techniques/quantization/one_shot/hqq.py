"""HQQ as a one-shot method."""

from __future__ import annotations

import dataclasses

from jaxweights.core.checks import check_integer
from jaxweights.core.method import Method
from jaxweights.techniques.quantization.formats import integers
from jaxweights.techniques.quantization.quantize import quantize
from jaxweights.techniques.quantization.ranges import HQQ as ZeroPoints


@dataclasses.dataclass(frozen=True)
class HQQ(Method):
    """Half-quadratic quantization: integers with the zero points that suit most weights of a block. It needs no data.

    `RoundToNearest(jaxweights.formats.integers(bits, block=block, symmetric=False), range=jaxweights.ranges.HQQ())`.

    Args:
      bits: 2 to 8.
      block: number of consecutive inputs of an output unit that share a scale and a zero point.

    >>> import jax.numpy as jnp
    >>> import jaxweights as jw
    >>> q = jw.one_shot({"kernel": jnp.ones((64, 8))}, HQQ(4))["kernel"]
    >>> print(q.format.block, q.zero.shape)
    64 (1, 8)

    References: Badri and Shaji, Half-Quadratic Quantization of Large Machine Learning Models, 2023.
    """

    bits: int
    _: dataclasses.KW_ONLY
    block: int = 64

    def __post_init__(self):
        check_integer("bits", self.bits, 2, 8)
        check_integer("block", self.block, 1)

    def fit(self, w, stats):
        """`quantize` with zero points by `jaxweights.ranges.HQQ`."""
        format = integers(self.bits, block=self.block, symmetric=False)
        return quantize(w, format, axes=stats.axes, range=ZeroPoints())
