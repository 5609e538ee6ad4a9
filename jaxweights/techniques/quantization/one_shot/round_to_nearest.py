"""Round to nearest as a one-shot method."""

from __future__ import annotations

import dataclasses

from jaxweights.core.method import Method
from jaxweights.techniques.quantization.formats import Format, format_of
from jaxweights.techniques.quantization.quantize import check_range, quantize
from jaxweights.techniques.quantization.ranges import Range


@dataclasses.dataclass(frozen=True)
class RoundToNearest(Method):
    """Stores each weight as the nearest value of a format: `quantize(w, format)`. It needs no data.

    Args:
      format: as in `quantize`: a number of bits, a name such as "nf4", or a `jaxweights.formats.Format`.
      block: number of consecutive inputs of an output unit that share a scale, in place of that of the format.
      range: how scales are chosen, one of `jaxweights.ranges`.

    >>> import jax.numpy as jnp
    >>> import jaxweights as jw
    >>> params = {"kernel": jnp.array([[0.7, -1.4], [0.2, 0.5]])}
    >>> print(jw.dequantize(jw.one_shot(params, RoundToNearest(4))["kernel"]))
    [[ 0.7 -1.4]
     [ 0.2  0.4]]

    References: Nagel et al., A White Paper on Neural Network Quantization, arXiv:2106.08295, 2021.
    """

    format: int | str | Format
    _: dataclasses.KW_ONLY
    block: int | None = None
    range: Range | None = None

    def __post_init__(self):
        check_range(self.range, format_of(self.format, self.block))

    def fit(self, w, stats):
        """`quantize(w, format)`."""
        return quantize(w, self.format, axes=stats.axes, block=self.block, range=self.range)
