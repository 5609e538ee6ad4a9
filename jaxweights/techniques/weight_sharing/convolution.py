"""A convolution as a matrix with shared weights."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxweights.core import convolution
from jaxweights.core.convolution import Padding
from jaxweights.techniques.weight_sharing.indices import conv_positions
from jaxweights.techniques.weight_sharing.patterns import Pattern, values_of
from jaxweights.techniques.weight_sharing.shifts import check_rows


@dataclasses.dataclass(frozen=True)
class Convolution(Pattern):
    """A convolution as a matrix, (input size, output size), whose codebook is the kernel. Arguments as of `conv_index`.

    `share(kernel, convolution)` is the dense matrix and suits small images. `matmul` convolves, without it and without
    an index.

    >>> import jax.numpy as jnp
    >>> import jaxweights as jw
    >>> blur, image = jnp.ones((3, 3, 1, 1)), jnp.ones((224, 224, 1))
    >>> convolution = Convolution(blur.shape, image.shape, strides=2)
    >>> print(convolution.shape, convolution.matmul(image.ravel(), blur)[:3])
    (50176, 12544) [9. 9. 9.]

    References: LeCun et al., Backpropagation Applied to Handwritten Zip Code Recognition, Neural Computation 1989.
    """

    kernel_shape: tuple[int, ...]
    input_shape: tuple[int, ...]
    strides: int | Sequence[int] = 1
    padding: Padding = "SAME"
    dilation: int | Sequence[int] = 1
    groups: int = 1
    shape: tuple[int, ...] = dataclasses.field(init=False, default=())

    def __post_init__(self):
        conv = self._geometry()
        own = {"kernel_shape": tuple(self.kernel_shape), "input_shape": conv.input_shape}
        own |= {"strides": conv.strides, "padding": "CIRCULAR" if conv.circular else conv.pads}
        own |= {"dilation": conv.dilation, "shape": (math.prod(conv.input_shape), math.prod(conv.output_shape))}
        for name, value in own.items():
            object.__setattr__(self, name, value)

    @property
    def n_values(self):
        """The size of the kernel."""
        return math.prod(self.kernel_shape)

    def positions(self, xp):
        """The kernel weight at each entry, −1 where there is none."""
        return conv_positions(self._geometry())

    def weight(self, codebook):
        """The matrix."""
        index = jnp.asarray(self.index(), jnp.int32)
        return codebook.at[jnp.where(index < 0, codebook.size, index)].get(mode="fill", fill_value=0)

    def matmul(self, x: jax.Array, codebook: jax.Array) -> jax.Array:
        """The product x @ share(codebook, self): the convolution of the images in x.

        Args:
          x: float array (..., input size), images (*space, in) with their axes raveled.
          codebook: float array of the kernel's size.

        Returns:
          Array (..., output size) of the wider of the two dtypes.

        Raises:
          TypeError: an argument is not a float array.
          ValueError: the sizes do not fit.
        """
        x, kernel = check_rows(x, self), values_of(codebook, self).reshape(self.kernel_shape)
        dtype = jnp.promote_types(x.dtype, kernel.dtype)
        conv, lead = self._geometry(), x.shape[:-1]
        images = x.reshape(math.prod(lead), *conv.input_shape).astype(dtype)
        y = jax.vmap(conv, (None, 0))(kernel.astype(dtype), images)
        return y.reshape(*lead, self.shape[-1])

    def _geometry(self) -> convolution.Convolution:
        return convolution.Convolution.of(
            self.kernel_shape,
            self.input_shape,
            strides=self.strides,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
        )
