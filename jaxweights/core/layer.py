"""The shape and axes of a stored weight, whatever batch axes JAX slices off its arrays or stacks in front of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax

from jaxweights.core.axes import Axes, Reading


@dataclasses.dataclass(frozen=True)
class Layer:
    """What a stored weight knows of its shape and axes apart from its arrays.

    `scan` and `vmap` slice the arrays of a stack and leave what is static as it is. So the number and the sizes of its
    batch axes are read from the arrays, and the static part is that of one layer.

    Attributes:
      shape: sizes of the axes that are not batch axes.
      axes: how the weight is read, with every axis counted from the end. Batch axes in front of all others are left
        out: the arrays tell how many there are.
    """

    shape: tuple[int, ...]
    axes: Axes

    @classmethod
    def of(cls, axes: Axes | None, shape: Sequence[int]) -> Layer:
        """The layer of a weight of this shape."""
        r, ndim = Reading.of(axes, shape), len(shape)
        others = [a for a in range(ndim) if a not in r.batch]
        inner = (a for a in sorted(r.batch) if others and a > others[0])

        def from_end(which: Sequence[int]) -> tuple[int, ...]:
            return tuple(a - ndim for a in which)

        named = map(from_end, (r.input, r.output, tuple(inner), r.window))
        return cls(tuple(shape[a] for a in others), Axes(*named, groups=r.groups))

    def with_batch(self, sizes: Sequence[int]) -> tuple[tuple[int, ...], Axes]:
        """(shape, axes) of the weight whose batch axes have these sizes.

        Those beyond the ones that `axes` names are in front. Where there are fewer, the first were sliced off.
        """
        inner: tuple[int, ...] = self.axes.batch  # type: ignore[assignment]
        gone = inner[: max(len(inner) - len(sizes), 0)]
        ndim = len(self.shape) + len(sizes)

        def left(which: Sequence[int]) -> tuple[int, ...]:
            return tuple(a + sum(g > a for g in gone) for a in which if a not in gone)

        front = range(-ndim, -ndim + max(len(sizes) - len(inner), 0))
        batch = (*front, *left(inner))
        others = iter(self.shape)
        of_batch = {a + ndim: size for a, size in zip(batch, sizes, strict=True)}
        shape = tuple(of_batch[a] if a in of_batch else next(others) for a in range(ndim))
        input, output, window = map(left, (self.axes.input, self.axes.output, self.axes.window))  # type: ignore[arg-type]
        return shape, Axes(input, output, batch, window, self.axes.groups)


def same_matrices(one: Axes | None, other: Axes | None, shape: Sequence[int]) -> bool:
    """Whether two readings sum over the same axes, in the same matrices."""
    a, b = Reading.of(one, shape), Reading.of(other, shape)
    return (sorted(a.batch), a.contracted, a.groups) == (sorted(b.batch), b.contracted, b.groups)


def transpose(axes: Axes, shape: Sequence[int], permutation: Sequence[int]) -> Axes:
    """How a weight of this shape is read once its axes are in the order of `permutation`."""
    r = Reading.of(axes, shape)

    def place(which: Sequence[int]) -> tuple[int, ...]:
        return tuple(map(list(permutation).index, which))

    return Axes(*map(place, (r.input, r.output, r.batch, r.window)), groups=r.groups)


def stored_matrix(w: jax.Array, axes: Axes | None) -> tuple[jax.Array, Layer]:
    """(w as matrices (*batch, [groups,] rows, columns), its layer). The batch axes lead, in the order they have."""
    layer = Layer.of(axes, w.shape)
    _, ordered = layer.with_batch([w.shape[a] for a in sorted(Reading.of(axes, w.shape).batch)])
    return ordered.matrix(w), layer


def transposed_layer(
    axes: Axes, shape: Sequence[int], permutation: Sequence[int]
) -> tuple[Layer, Sequence[int]] | None:
    """(layer, order of the batch axes) of a weight with its axes permuted; None where its rows would change places."""
    r = Reading.of(axes, shape)
    batch, rows = ([list(permutation).index(a) for a in which] for which in (sorted(r.batch), r.contracted))
    if rows != sorted(rows):
        return None
    layer = Layer.of(transpose(axes, shape, permutation), [shape[a] for a in permutation])
    return layer, sorted(range(len(batch)), key=batch.__getitem__)
