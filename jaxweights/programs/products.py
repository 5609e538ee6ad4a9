"""A product of an activation and a weight, in matrices or in a convolution: which axes are what."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.extend import core

from jaxweights.core.axes import Axes
from jaxweights.core.calibration import Samples


@dataclasses.dataclass(frozen=True)
class Contraction:
    """A product of an activation `x` and a weight `w`.

    Attributes:
      path: of the weight.
      axes: how the product reads the weight, as it is in the tree: a stack of layers is `batch`.
      x: what is multiplied.
      w: what it is multiplied by. In a loop over a stack this is one layer, without the axis of the stack.
      y: the product, before any bias.
      inputs: `x`, or an array like it, as vectors that match the rows of the weight.
      outputs: `y`, or an array like it, as vectors that match the columns of the weight.
    """

    path: str
    axes: Axes
    x: jax.Array
    w: jax.Array
    y: jax.Array
    inputs: Callable[[jax.Array], Samples]
    outputs: Callable[[jax.Array], Samples]


@dataclasses.dataclass(frozen=True)
class Weight:
    """Marks a selected weight: which of its axes the value has, in order, and the loops of which it is one slice.

    A loop is (depth, axis sliced), the outermost first. Along the axes `flipped` it runs backwards.
    """

    path: str
    axes: tuple[int, ...]
    loops: tuple[tuple[int, int], ...] = ()
    flipped: frozenset[int] = frozenset()

    def slice(self, depth: int) -> Weight:
        """Of one step of a loop over the first axis."""
        return dataclasses.replace(self, axes=self.axes[1:], loops=(*self.loops, (depth, self.axes[0])))

    def stack(self) -> Weight:
        """Of all steps of the innermost loop."""
        return dataclasses.replace(self, axes=(self.loops[-1][1], *self.axes), loops=self.loops[:-1])

    def flip(self, which: Sequence[int]) -> Weight:
        """Turned round along these axes of the value."""
        return dataclasses.replace(self, flipped=self.flipped ^ {self.axes[a] for a in which})

    def sort(self, which: Sequence[int]) -> tuple[int, ...]:
        """These axes of the value, in the order that they have in the weight."""
        return tuple(sorted(which, key=self.axes.__getitem__))

    def reading(self, input: Sequence[int], output: Sequence[int], batch: Sequence[int], groups: int = 1) -> Axes:
        """How the weight is read where the value is read so; a loop is a batch axis."""
        stored = lambda which: tuple(sorted(self.axes[a] for a in which))
        loops = tuple(axis for _, axis in self.loops)
        return Axes(stored(input), stored(output), tuple(sorted(loops + stored(batch))), groups=groups)


def _dot_general(eqn: core.JaxprEqn, weight: Weight, side: int, ins: list, y: jax.Array) -> Contraction | None:
    contracted, batch = eqn.params["dimension_numbers"]
    if not contracted[0] or weight.flipped:
        return None
    w, x = ins[side], ins[1 - side]
    of_x = dict(zip(contracted[side] + batch[side], contracted[1 - side] + batch[1 - side], strict=True))
    w_in, w_batch = weight.sort(contracted[side]), weight.sort(batch[side])
    free = lambda a, which: [i for i in range(a.ndim) if i not in contracted[which] + batch[which]]
    # The product has the batch axes, then the other axes of the left operand, then those of the right.
    w_free, x_free = free(w, side), free(x, 1 - side)
    before = len(batch[0]) + (len(x_free) if side == 1 else 0)
    of_y = {a: before + i for i, a in enumerate(w_free)} | {a: i for i, a in enumerate(batch[side])}
    w_out = weight.sort(w_free)
    pick = lambda places, which: tuple(places[a] for a in which)
    return Contraction(
        weight.path,
        weight.reading(w_in, w_out, w_batch),
        x,
        w,
        y,
        lambda x: Samples(x, pick(of_x, w_in), pick(of_x, w_batch)),
        lambda y: Samples(y, pick(of_y, w_out), pick(of_y, w_batch)),
    )


def _convolution(eqn: core.JaxprEqn, weight: Weight, side: int, ins: list, y: jax.Array) -> Contraction | None:
    p = eqn.params
    of_x, of_w, of_y = p["dimension_numbers"]
    if side == 0 or p["batch_group_count"] > 1 or weight.flipped - {weight.axes[a] for a in of_w[2:]}:
        return None
    x, w = ins
    n_groups = p["feature_group_count"]
    groups = (n_groups,) if n_groups > 1 else ()
    window = tuple(w.shape[a] for a in of_w[2:])
    spans = [stride * (y.shape[a] - 1) + 1 for stride, a in zip(p["window_strides"], of_y[2:], strict=True)]

    def patches(x: jax.Array) -> Samples:
        """What lies under each place of the window: (*window, samples, [groups,] channels, *space)."""
        x = jnp.transpose(x, of_x)
        pads = [(low, high, d - 1) for (low, high), d in zip(p["padding"], p["lhs_dilation"], strict=True)]
        x = jax.lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), (0, 0, 0), *pads])
        x = x.reshape(x.shape[0], *groups, x.shape[1] // n_groups, *x.shape[2:])
        whole, ones = x.shape[: -len(window)], (1,) * (x.ndim - len(window))

        def under(place):
            start = [i * d for i, d in zip(place, p["rhs_dilation"], strict=True)]
            stop = [i + n for i, n in zip(start, spans, strict=True)]
            return jax.lax.slice(x, (0,) * len(ones) + (*start,), (*whole, *stop), (*ones, *p["window_strides"]))

        places = [range(w.shape[a])[:: -1 if weight.axes[a] in weight.flipped else 1] for a in of_w[2:]]
        all_places = jnp.stack([under(place) for place in itertools.product(*places)])
        axis = {a: i for i, a in enumerate(of_w[2:])} | {of_w[1]: len(window) + len(ones) - 1}
        features = tuple(axis[a] for a in weight.sort(of_w[1:]))
        return Samples(
            all_places.reshape(*window, *all_places.shape[1:]), features, (len(window) + 1,) if groups else ()
        )

    def channels(y: jax.Array) -> Samples:
        y = jnp.moveaxis(y, of_y[1], -1)
        y = y.reshape(*y.shape[:-1], *groups, y.shape[-1] // n_groups)
        return Samples(y, (y.ndim - 1,), (y.ndim - 2,) if groups else ())

    axes = weight.reading(of_w[1:2], of_w[:1], (), n_groups)
    return Contraction(weight.path, axes, x, w, y, patches, channels)


PRODUCTS = {"dot_general": _dot_general, "conv_general_dilated": _convolution}
"""{name of a primitive: (equation, weight, its position, operands, product) -> the contraction, if it is one}"""
