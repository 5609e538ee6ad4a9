"""The protocol of one-shot methods: a new weight, once, from a weight and statistics of its inputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax

from jaxweights.core.axes import Reading
from jaxweights.core.calibration import InputStats
from jaxweights.core.stored import Stored


@dataclasses.dataclass(frozen=True)
class Method:
    """A one-shot method: a new weight from a weight and statistics of its inputs.

    A subclass is a frozen dataclass with a `fit`. It declares what others need to know of it:

    - `needs`: the properties of `InputStats` that it reads: any of "norm", "mean_abs" and "second_moment".
    - `traceable`: whether `fit` may be traced under `jax.jit`. Not if what it does depends on the values of a weight.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    traceable: ClassVar[bool] = True

    def fit(self, w: jax.Array, stats: InputStats) -> jax.Array | Stored:
        """Returns the new weight, an array of the shape and dtype of `w` or a stored weight.

        Args:
          w: float array of any shape.
          stats: the statistics of its inputs; `stats.axes` says how it is read. Without data it has only axes.
        """
        raise TypeError(f"{type(self).__name__} defines no fit: a method is at least fit(w, stats)")

    def tells_apart(self, one: Reading, other: Reading) -> bool:
        """Whether the result depends on which of two readings of a weight is right."""
        return one != other


def methods_of(method: Any) -> tuple[Method, ...]:
    """One method, or several that are applied one after the other, as a tuple."""
    methods: tuple[Any, ...] = tuple(method) if isinstance(method, list | tuple) else (method,)
    if not methods:
        raise ValueError("method is empty: give a method, or several in order")
    for m in methods:
        if isinstance(m, type) and issubclass(m, Method):
            raise TypeError(f"method got the class {m.__name__}: make an instance, {m.__name__}(...)")
        if not isinstance(m, Method):
            remedy = f"write RoundToNearest({m!r})" if isinstance(m, int | str) else "transforms go to on_tree"
            raise TypeError(
                f"method must be one of jaxweights.methods, several in order or rules {{glob: method}}, got "
                f"{type(m).__name__} {m!r}: {remedy}"
            )
    return methods


def method_rules(method: Any) -> list[tuple[str | None, tuple[Method, ...]]]:
    """A method, or rules {glob: method}, as pairs of a glob and methods; a glob of None is that of a lone method."""
    if not isinstance(method, Mapping):
        return [(None, methods_of(method))]
    if not method:
        raise ValueError("the rules are empty: give {glob: method}, or one method")
    for glob in method:
        if not isinstance(glob, str):
            raise TypeError(f"the rules must be {{glob: method}}, got the key {glob!r}")
    return [(glob, methods_of(m)) for glob, m in method.items()]
