"""How a weight is read as a matrix: which axes are input, output, batch, and window."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from jaxweights.core.checks import check_integer, check_shape

AxisSpec = int | Sequence[int]


def axis_tuple(name: str, value) -> tuple[int, ...]:
    """`value`, an integer or integers, as a tuple, or an error."""
    values = tuple(value) if isinstance(value, Sequence) else (value,)
    if not all(isinstance(a, int) and not isinstance(a, bool) for a in values):
        raise TypeError(f"{name} must be an integer or integers, got {value!r}: name axes as in (0, 1)")
    return values


@dataclasses.dataclass(frozen=True)
class Axes:
    """How a weight is read as a matrix.

    A weight of any rank is read as a (batch of) matrices: its rows are the `window` and `input` axes, its
    columns the `output` axes, and each index along the `batch` axes is a matrix of its own.

    Args:
      input: axis or axes summed over by the layer.
      output: axis or axes that number the layer's output units. Never summed over.
      batch: axis or axes that number independent weights, such as the layers of an `nn.scan` stack.
      window: the positions of a convolution kernel. They are summed over like `input` and multiply both
        fans. By default every axis that is not named otherwise.
      groups: number of groups of a grouped or depthwise convolution (`feature_group_count`). The output
        axis is split in that many equal runs, each of which sees input channels of its own.

    Axes may be negative, so one `Axes` serves a kernel and a stack of it: see `stacked`.

    >>> import jax.numpy as jnp
    >>> attention_query = jnp.ones((64, 4, 16))       # (features, heads, head_dim)
    >>> Axes(input=0, output=(1, 2)).matrix(attention_query).shape
    (64, 64)
    >>> Axes(input=-2, output=-1).matrix(jnp.ones((3, 3, 8, 16))).shape      # HWIO
    (72, 16)
    """

    input: AxisSpec = -2
    output: AxisSpec = -1
    batch: AxisSpec = ()
    window: AxisSpec | None = None
    groups: int = 1

    def __post_init__(self):
        for name in ("input", "output", "batch", "window"):
            value = getattr(self, name)
            if name == "window" and value is None:
                continue
            object.__setattr__(self, name, axis_tuple(name, value))
        check_integer("groups", self.groups, 1)

    def stacked(self, axis: int = 0) -> Axes:
        """The same reading for a stack of such weights along a new non-negative `axis`, before the named ones.

        >>> DENSE.stacked().matrix(jnp.ones((12, 256, 512))).shape
        (12, 256, 512)
        """
        check_integer("axis", axis, 0)
        if any(a >= 0 for f in (self.input, self.output, self.window or ()) for a in f):  # type: ignore[union-attr]
            raise ValueError(f"only Axes counted from the end (negative) can be stacked, got {self}")
        return dataclasses.replace(self, batch=(*self.batch, axis))  # type: ignore[misc]

    def matrix(self, w) -> jax.Array:
        """`w` as an array of shape (*batch, [groups,] rows, columns). The one place that reshapes."""
        if isinstance(w, Mapping):
            raise TypeError(f"w must be an array, got {type(w).__name__}: for a tree use jax.tree.map")
        w = jnp.asarray(w)
        w, r = Reading.of(self, w.shape).split_groups(w)
        batch = tuple(w.shape[a] for a in r.batch)
        rows = math.prod(w.shape[a] for a in r.contracted)
        columns = math.prod(w.shape[a] for a in r.output)
        return jnp.transpose(w, (*r.batch, *r.contracted, *r.output)).reshape(*batch, rows, columns)

    def weight(self, matrix: jax.Array, shape: Sequence[int]) -> jax.Array:
        """The weight of this shape that is read as `matrix`: the inverse of the method of that name.

        >>> w = jnp.arange(24.0).reshape(2, 3, 4)
        >>> bool((ATTENTION_IN.weight(ATTENTION_IN.matrix(w), w.shape) == w).all())
        True
        """
        split, r = Reading.of(self, shape).ungroup(shape)
        order = (*r.batch, *r.contracted, *r.output)
        inverse = [order.index(a) for a in range(len(order))]
        return matrix.reshape([split[a] for a in order]).transpose(inverse).reshape(shape)


@dataclasses.dataclass(frozen=True)
class Reading:
    """`Axes` resolved against a shape: non-negative tuples that together name every axis once."""

    input: tuple[int, ...]
    output: tuple[int, ...]
    batch: tuple[int, ...]
    window: tuple[int, ...]
    groups: int = 1

    @property
    def contracted(self) -> tuple[int, ...]:
        """The axes summed over for one output unit, in order of the array."""
        return tuple(sorted(self.window + self.input))

    @classmethod
    def of(cls, axes: Axes | None, shape: Sequence[int]) -> Reading:
        """Resolves `axes`; None is (..., in, out), a vector as a whole, a scalar as a 1x1 matrix."""
        ndim = len(shape)
        axes = axes_or_default(axes, ndim)
        named: dict[str, tuple[int, ...]] = {}
        seen: dict[int, str] = {}
        for name in ("batch", "input", "output", "window"):
            value = getattr(axes, name)
            if name == "window" and value is None:
                value = tuple(a for a in range(ndim) if a not in seen)
            for a in value:
                if not -ndim <= a < ndim:
                    raise ValueError(
                        f"axes names {name} axis {a}, but the weight has shape {tuple(shape)}: "
                        f"use axes from {-ndim} to {ndim - 1}"
                    )
            resolved = tuple(a % ndim for a in value)
            for a in resolved:
                if a in seen:
                    raise ValueError(
                        f"axes names axis {a} of a weight of shape {tuple(shape)} as both {seen[a]} and "
                        f"{name}: give every axis one role"
                    )
                seen[a] = name
            named[name] = resolved
        missing = [a for a in range(ndim) if a not in seen]
        if missing:
            raise ValueError(
                f"axes leaves axis {missing[0]} of a weight of shape {tuple(shape)} without a role: name it "
                f"input, output, batch or window"
            )
        if axes.groups > 1:
            if len(named["output"]) != 1:
                raise ValueError(f"groups={axes.groups} needs exactly one output axis, got {named['output']}")
            if shape[named["output"][0]] % axes.groups:
                raise ValueError(
                    f"groups={axes.groups} does not divide the {shape[named['output'][0]]} output units of a "
                    f"weight of shape {tuple(shape)}"
                )
        return cls(**named, groups=axes.groups)

    def squeezed(self, shape: Sequence[int]) -> Reading:
        """The reading of a weight of this shape without its axes of size 1, whose roles make no difference."""
        contracted, output, batch = (
            tuple(a for a in of if shape[a] > 1) for of in (self.contracted, self.output, self.batch)
        )
        return Reading(contracted, output, batch, (), self.groups)

    def same_matrices(self, other: Reading) -> bool:
        """Whether both read a weight as the same matrices, or as their transposes."""
        sides = [{r.contracted, r.output} for r in (self, other)]
        return sides[0] == sides[1] and (self.batch, self.groups) == (other.batch, other.groups)

    def spread(self, units: jax.Array) -> jax.Array:
        """Moves the axes of values of shape (*batch, *output) to their places in the weight, ready to multiply it."""
        numbered = (*self.batch, *self.output)
        units = jnp.transpose(units, sorted(range(len(numbered)), key=numbered.__getitem__))
        return jnp.expand_dims(units, self.contracted)

    def split_groups(self, w: jax.Array) -> tuple[jax.Array, Reading]:
        """`w` with its output axis split in (groups, units per group), the groups read as batch."""
        shape, r = self.ungroup(w.shape)
        return (w, self) if r is self else (w.reshape(shape), r)

    def ungroup(self, shape: Sequence[int]) -> tuple[tuple[int, ...], Reading]:
        """The shape and the reading that `split_groups` gives a weight of this shape."""
        if self.groups == 1:
            return tuple(shape), self
        (o,) = self.output

        def shift(axes):
            return tuple(a + (a > o) for a in axes)

        split = (*shape[:o], self.groups, shape[o] // self.groups, *shape[o + 1 :])
        return split, Reading(shift(self.input), (o + 1,), (*shift(self.batch), o), shift(self.window))


def default_axes(ndim: int) -> Axes:
    """The reading of `axes=None`: (..., in, out); a vector is one output unit, a scalar a 1x1 matrix."""
    return Axes() if ndim >= 2 else Axes(input=tuple(range(ndim)), output=())


def axes_or_default(axes: Axes | None, ndim: int) -> Axes:
    """`axes`, or the default if it is None; an error if it is anything else."""
    if axes is None:
        return default_axes(ndim)
    if not isinstance(axes, Axes):
        raise TypeError(f"axes must be a jaxweights.Axes or None, got {axes!r}: write Axes(input=..., output=...)")
    return axes


def fans(shape: Sequence[int], axes: Axes | None = None) -> tuple[int, int]:
    """(n_in, n_out): how many inputs one output unit sums over, and how many outputs one input feeds.

    The positions of a convolution window count towards both; batch axes towards neither.

    >>> fans((3, 3, 64, 128))
    (576, 1152)
    >>> fans((512, 8, 64), Axes(input=0, output=(1, 2)))
    (512, 512)
    >>> fans((12, 256, 512), Axes(batch=0))
    (256, 512)
    """
    shape = check_shape("shape", shape)
    r = Reading.of(axes, shape)
    n_in, n_out, n_positions = (math.prod(shape[a] for a in axes) for axes in (r.input, r.output, r.window))
    return n_in * n_positions, n_out * n_positions // r.groups


def dense_general(n_in: int = 1, n_out: int = 1, n_batch: int = 0) -> Axes:
    """The kernel of `DenseGeneral`/`LinearGeneral`, laid out (batch..., in..., out...)."""
    return Axes(
        input=tuple(range(-n_out - n_in, -n_out)),
        output=tuple(range(-n_out, 0)),
        batch=tuple(range(-n_out - n_in - n_batch, -n_out - n_in)),
    )


DENSE = EMBED = CONV = Axes(input=-2, output=-1)
"""`Dense`, `Linear`, `Embed` (a one-hot row times the table) and `Conv`: (*window, in, out)."""
ATTENTION_IN = dense_general(1, 2)
"""Query, key and value kernels of multi-head attention: (features, heads, head_dim)."""
ATTENTION_OUT = dense_general(2, 1)
"""The out-projection of multi-head attention: (heads, head_dim, features)."""
CONV_TRANSPOSE_KERNEL = Axes(input=-1, output=-2)
"""`ConvTranspose(transpose_kernel=True)`: (*window, out, in). Without the flag it is `CONV`."""
WHOLE = Axes(input=(), output=())
"""A weight of any rank as one vector: one norm, one mean for all of it (`dim=None` of torch's `weight_norm`)."""


def depthwise(groups: int) -> Axes:
    """`Conv(feature_group_count=groups)`: (*window, in // groups, out).

    >>> fans((3, 3, 1, 64), depthwise(64))
    (9, 9)
    """
    return Axes(input=-2, output=-1, groups=groups)


def in_words(axes: Axes | None, shape: Sequence[int]) -> str:
    """The role of each axis of a weight, in their order.

    >>> in_words(Axes(input=0, output=(1, 2)), (64, 4, 16)), in_words(Axes(-2, -1, groups=8), (3, 3, 1, 8))
    ('in out out', 'win win in out, 8 groups')
    """
    if axes is None:
        return ""
    r = Reading.of(axes, shape)
    roles = {"in": r.input, "out": r.output, "batch": r.batch, "win": r.window}
    of = {a: name for name, which in roles.items() for a in which}
    groups = f", {r.groups} groups" if r.groups > 1 else ""
    return " ".join(of[a] for a in range(len(shape))) + groups
