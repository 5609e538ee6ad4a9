"""What the bias beside a weight tells of its axes: where the outputs are."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from jaxweights.core.axes import Axes, Reading, dense_general

Shape = tuple[int, ...]
Place = Callable[[int, int, int], Axes | None]
"""A reading of a weight with n axes, the first n_batch of which are batch and n_out of the others output."""


def bias_name(kernel: str) -> str:
    """The name of the bias that belongs to a kernel of this name: w1 -> b1, weight_ih -> bias_ih."""
    for of_kernel, of_bias in (("kernel", "bias"), ("weight", "bias")):
        if of_kernel in kernel:
            return kernel.replace(of_kernel, of_bias)
    return re.sub(r"(?<![A-Za-z])w(?![A-Za-z])", "b", re.sub(r"(?<![A-Za-z])W(?![A-Za-z])", "B", kernel))


def fitting(shape: Shape, bias: Shape, places: tuple[Place, ...]) -> list[Axes]:
    """The readings with the outputs in one of these places that have a bias (*batch, *out) of this shape."""
    for of in (bias, _without_ones(bias)):
        if 0 < len(of) < len(shape) and (found := list(_fitting(shape, of, places))):
            return found
    return []


def _fitting(shape: Shape, bias: Shape, places: tuple[Place, ...]) -> Iterator[Axes]:
    """Those with the most batch axes come first: stacks are more common than layers with several output axes."""
    for n_batch in reversed(range(len(bias))):
        for place in places:
            axes = place(len(shape), n_batch, len(bias) - n_batch)
            if axes is not None:
                r = Reading.of(axes, shape)
                if tuple(shape[a] for a in (*r.batch, *r.output)) == bias:
                    yield axes


def _without_ones(bias: Shape) -> Shape:
    """The shape of a bias without the axes of size 1 at its end, which Equinox gives it for the window."""
    while bias and bias[-1] == 1:
        bias = bias[:-1]
    return bias


def outputs_last(n: int, n_batch: int, n_out: int) -> Axes | None:
    """(*batch, *window, in, out), or (*batch, *in, *out) with several output axes."""
    if n_out == 1:
        return Axes(input=-2, output=-1, batch=tuple(range(n_batch))) if n - n_batch > 1 else None
    return dense_general(n - n_batch - n_out, n_out, n_batch) if n - n_batch > n_out else None


def outputs_first(n: int, n_batch: int, n_out: int) -> Axes | None:
    """(*batch, out, in, *window)."""
    fits = n_out == 1 and n - n_batch > 1
    return Axes(input=n_batch + 1 - n, output=n_batch - n, batch=tuple(range(n_batch))) if fits else None


def inputs_last(n: int, n_batch: int, n_out: int) -> Axes | None:
    """(*batch, *window, out, in), also of `ConvTranspose(transpose_kernel=True)`."""
    fits = n_out == 1 and n - n_batch > 1
    return Axes(input=-1, output=-2, batch=tuple(range(n_batch))) if fits else None


def outputs_second(n: int, n_batch: int, n_out: int) -> Axes | None:
    """(*batch, in, out, *window): a transposed convolution of torch."""
    fits = n_out == 1 and n - n_batch > 2
    return Axes(input=n_batch - n, output=n_batch + 1 - n, batch=tuple(range(n_batch))) if fits else None
