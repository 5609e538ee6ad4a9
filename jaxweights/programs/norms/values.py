"""What is known of an array of a program that has batch norms: a kernel, numbers for each feature, or data.

Numbers for each feature are computed, from numbers drawn at random for the parameters and statistics: a few draws tell
for certain whether they are the factor and the shift of a batch norm, in whatever way the program arrives at them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.extend import core

from jaxweights.core.axes import Axes
from jaxweights.programs.interpreter import shape
from jaxweights.programs.view import View

Labels = tuple[int | None, ...]
"""For each axis of an array, which axis of the statistics it is, counted from the last; None if it is none of them.
An axis of size 1 has none."""


Loops = tuple[int, ...]
"""The loops that slice a stack, the outermost first."""


class Leaf(NamedTuple):
    """A parameter or a statistic, by its position, or one slice of it."""

    position: int
    loops: Loops = ()

    def slice(self, loop: int) -> Leaf:
        """One step of a loop."""
        return self._replace(loops=(*self.loops, loop))


class Kernel(NamedTuple):
    """The kernel of a layer, in another shape perhaps, but with no number changed.

    Attributes:
      leaf: which it is.
      view: how its axes lie. The path is that of the layer.
    """

    leaf: Leaf
    view: View


class Vector(NamedTuple):
    """Numbers for each feature that depend on no data.

    Attributes:
      numbers: one for each draw, of any single feature.
      leaves: what they are computed from.
      axes: which axes the features lie along.
    """

    numbers: np.ndarray
    leaves: frozenset[Leaf]
    axes: Labels


class Product(NamedTuple):
    """The product of data and the kernel of a layer, which is read as `axes`, or why no `Axes` says how."""

    layer: str
    axes: Axes | str
    loops: Loops


class Normed(NamedTuple):
    """What comes out of a batch norm."""

    norm: str
    loops: Loops


class Data(NamedTuple):
    """factor·source + shift, feature by feature. Anything at all, if the source is None."""

    source: Product | Normed | None
    factor: np.ndarray | float
    shift: np.ndarray | float
    leaves: frozenset[Leaf]
    axes: Labels

    @classmethod
    def of(cls, source: Product | Normed | None, axes: Iterable[int | None]) -> Data:
        """The source itself."""
        return cls(source, 1.0, 0.0, frozenset(), tuple(axes))

    def plus(self, v: Vector) -> Data:
        """The sum."""
        return self._replace(shift=self.shift + v.numbers, leaves=self.leaves | v.leaves)

    def times(self, v: Vector) -> Data:
        """The product."""
        factor, shift = self.factor * v.numbers, self.shift * v.numbers
        return self._replace(factor=factor, shift=shift, leaves=self.leaves | v.leaves)


Value = Kernel | Vector | Data


def labels(shape: Sequence[int]) -> Labels:
    """Those of an array that has the axes of the statistics, or the last of them."""
    return tuple(a - len(shape) if n > 1 else None for a, n in enumerate(shape))


def joined(labels: Iterable[Labels], ndim: int) -> Labels | None:
    """Those of an elementwise result with so many axes; None where the operands do not agree."""
    out: list[int | None] = [None] * ndim
    for axes in (axes for axes in labels if axes):
        for a, label in enumerate(axes):
            if label is not None:
                if out[a] not in (None, label):
                    return None
                out[a] = label
    named = [label for label in out if label is not None]
    return tuple(out) if len(set(named)) == len(named) else None


def moved(eqn: core.JaxprEqn, axes: Labels) -> Labels | None:
    """Those after an equation that moves axes about; None where an axis does not survive it."""
    before, after = shape(eqn.invars[0]), shape(eqn.outvars[0])
    match eqn.primitive.name:
        case "transpose":
            return tuple(axes[a] for a in eqn.params["permutation"])
        case "broadcast_in_dim":
            to = dict(zip(eqn.params["broadcast_dimensions"], axes, strict=True))
            return tuple(to.get(a) for a in range(len(after)))
        case "reshape" if eqn.params.get("dimensions"):
            return None
        case "reshape" | "squeeze" | "expand_dims":
            # An axis is the same one if as many entries as before come before it.
            old = {(math.prod(before[:a]), n): axes[a] for a, n in enumerate(before) if axes[a] is not None}
            new = tuple(old.get((math.prod(after[:a]), n)) if n > 1 else None for a, n in enumerate(after))
            return new if set(old.values()) <= set(new) else None
    return None


def _select(which: Any, *cases: Any) -> np.ndarray:
    return np.choose(np.asarray(which, int), cases)


def _rsqrt(x: Any) -> np.ndarray:
    return 1 / np.sqrt(x)


FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{"add": np.add, "add_any": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "neg": np.negative},
    **{"sqrt": np.sqrt, "rsqrt": _rsqrt, "square": np.square, "pow": np.power, "max": np.maximum, "min": np.minimum},
    **{
        "eq": np.equal,
        "ne": np.not_equal,
        "lt": np.less,
        "le": np.less_equal,
        "gt": np.greater,
        "ge": np.greater_equal,
    },
    "select_n": _select,
}
"""The primitives that batch norms compute numbers for each feature with."""

SAME = {"convert_element_type", "copy", "copy_p", "optimization_barrier", "sharding_constraint", "stop_gradient"}
"""The primitives that leave each operand as it is."""


def computed(eqn: core.JaxprEqn, vectors: Sequence[Vector]) -> Vector | None:
    """What an elementwise equation makes of numbers; None if it is not known."""
    name, numbers = eqn.primitive.name, [v.numbers for v in vectors]
    axes = joined([v.axes for v in vectors], len(shape(eqn.outvars[0])))
    leaves = frozenset[Leaf]().union(*(v.leaves for v in vectors))
    with np.errstate(all="ignore"):
        if name == "integer_pow":
            result = np.float64(1) * numbers[0] ** float(eqn.params["y"])
        elif name in FUNCTIONS:
            result = FUNCTIONS[name](*numbers)
        else:
            return None
    return None if axes is None else Vector(np.asarray(result), leaves, axes)
