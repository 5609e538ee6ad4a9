"""A convolution as a linear map of images: its geometry, the map, and its transpose."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxweights.core.checks import check_integer, check_shape

Padding = str | Sequence[tuple[int, int]]


@dataclasses.dataclass(frozen=True)
class Convolution:
    """The map (*space, in) -> (*out_space, out) of an image by a kernel of shape (*window, in // groups, out)."""

    window: tuple[int, ...]
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    strides: tuple[int, ...]
    pads: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int
    circular: bool
    """Whether padding wraps around the image, in place of zeros."""

    @classmethod
    def of(
        cls,
        kernel_shape: Sequence[int],
        input_shape: Sequence[int],
        *,
        strides: int | Sequence[int] = 1,
        padding: Padding = "SAME",
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
    ) -> Convolution:
        """The convolution of a layer with these arguments. Raises if they do not fit together."""
        kernel_shape, input_shape = check_shape("kernel_shape", kernel_shape), check_shape("input_shape", input_shape)
        check_integer("groups", groups, 1)
        n_in = "in" if groups == 1 else f"in // {groups}"
        if (
            not input_shape
            or len(kernel_shape) != len(input_shape) + 1
            or kernel_shape[-2] * groups != input_shape[-1]
            or kernel_shape[-1] % groups
        ):
            raise ValueError(
                f"kernel_shape {kernel_shape} and input_shape {input_shape} do not fit: they must be (*window, "
                f"{n_in}, out) and (*space, in) with equal numbers of axes and the same in"
                + (f", and {groups} groups must divide out" if groups > 1 else "")
            )
        window, space = kernel_shape[:-2], input_shape[:-1]
        strides, dilation = _per_axis("strides", strides, window), _per_axis("dilation", dilation, window)
        spans = [d * (k - 1) + 1 for k, d in zip(window, dilation, strict=True)]
        pads = _pads(padding, space, spans, strides)
        out_space = [(n + sum(p) - k) // s + 1 for n, k, s, p in zip(space, spans, strides, pads, strict=True)]
        if any(n < 1 for n in out_space):
            raise ValueError(f"a window of {tuple(spans)} does not fit in {space} with padding {padding!r}")
        circular = isinstance(padding, str) and padding.upper() == "CIRCULAR"
        return cls(window, input_shape, (*out_space, kernel_shape[-1]), strides, pads, dilation, groups, circular)

    def __call__(self, kernel: jax.Array, x: jax.Array) -> jax.Array:
        """Convolves the image `x`."""
        pads = self.pads
        if self.circular:
            x, pads = self._wrap(x), ((0, 0),) * len(pads)
        return self._convolve(x, kernel, pads, strides=self.strides)

    def transpose(self, kernel: jax.Array, y: jax.Array) -> jax.Array:
        """Applies the transpose of the map to `y`, which has the shape of an output.

        It convolves `y`, dilated by the strides, with the flipped kernel. The transpose that JAX derives cannot be
        batched on a mesh in JAX 0.7.2.
        """
        *window, n_in, n_out = kernel.shape
        turned = jnp.flip(kernel, range(len(window))).reshape(*window, n_in, self.groups, n_out // self.groups)
        turned = jnp.swapaxes(turned, -1, -3).reshape(*window, n_out // self.groups, n_in * self.groups)
        pads = []
        axes = (self.input_shape, self.output_shape, window, self.pads, self.strides, self.dilation)
        for n, m, k, (before, after), s, d in zip(*(a[: len(window)] for a in axes), strict=True):
            size = n + before + after if self.circular else n
            first = d * (k - 1) - (0 if self.circular else before)
            pads.append((first, size + d * (k - 1) - ((m - 1) * s + 1) - first))
        x = self._convolve(y, turned, pads, between=self.strides)
        if self.circular:
            image = jax.ShapeDtypeStruct(self.input_shape, x.dtype)
            (x,) = jax.linear_transpose(self._wrap, image)(x)
        return x

    def _wrap(self, x: jax.Array) -> jax.Array:
        return jnp.pad(x, (*self.pads, (0, 0)), mode="wrap")

    def _convolve(self, x, kernel, pads, *, strides=None, between=None) -> jax.Array:
        n = len(self.window)
        image, weight = (0, n + 1, *range(1, n + 1)), (n + 1, n, *range(n))
        return jax.lax.conv_general_dilated(
            x[None],
            kernel,
            strides or (1,) * n,
            pads,
            lhs_dilation=between,
            rhs_dilation=self.dilation,
            dimension_numbers=jax.lax.ConvDimensionNumbers(image, weight, image),
            feature_group_count=self.groups,
            precision="highest",
        )[0]


def _per_axis(name: str, value, window: tuple[int, ...]) -> tuple[int, ...]:
    """`value`, one integer for all axes or one for each, as one for each."""
    values = tuple(value) if isinstance(value, Sequence) else (value,) * len(window)
    for n in values:
        check_integer(name, n, 1)
    if len(values) != len(window):
        raise ValueError(f"{name} must be one integer, or one per axis of the window {window}, got {value!r}")
    return values


def _pads(padding: Padding, space, spans, strides) -> tuple[tuple[int, int], ...]:
    """The padding (before, after) per axis, for a window that covers `spans` positions."""
    if isinstance(padding, str):
        match padding.upper():
            case "SAME" | "VALID" as kind:
                padding = jax.lax.padtype_to_pads(space, spans, strides, kind)
            case "CIRCULAR":
                padding = [((k - 1) // 2, k // 2) for k in spans]
            case _:
                raise ValueError(
                    f'padding must be "SAME", "VALID", "CIRCULAR" or (before, after) per axis, got {padding!r}'
                )
    pads = list(padding) if isinstance(padding, Sequence) else []
    if len(pads) != len(spans) or not all(map(_is_pair, pads)):
        raise ValueError(f"padding must be integers (before, after) for each of {len(spans)} axes, got {padding!r}")
    return tuple((int(a), int(b)) for a, b in pads)


def _is_pair(pad: Any) -> bool:
    return isinstance(pad, tuple | list) and len(pad) == 2 and all(isinstance(n, int | np.integer) for n in pad)
