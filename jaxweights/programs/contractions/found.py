"""What visits have found, and for which weight."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from jaxweights.core.axes import Axes
from jaxweights.programs.contractions.weight import Loop

K = TypeVar("K")


@dataclasses.dataclass(frozen=True)
class Use:
    """One way in which a weight is used.

    Attributes:
      path: of the weight.
      axes: how it is read.
      lead: the axes of the weight that the leading axes of a value found there stand for.
      loops: those of which the value is one step, the outermost first.
    """

    path: str
    axes: Axes
    lead: tuple[int, ...]
    loops: tuple[Loop, ...]

    def stack(self) -> Use:
        """All steps of the innermost loop."""
        return dataclasses.replace(self, lead=(self.loops[-1].axis, *self.lead), loops=self.loops[:-1])


class Found(dict[K, Any]):
    """{key: pytree}, a pytree that keeps its order: JAX sorts the keys of a `dict`."""

    def add(self, more: Mapping[K, Any]) -> None:
        """Adds these values to those of the same keys."""
        for key, value in more.items():
            self[key] = jax.tree.map(jnp.add, self[key], value) if key in self else value


def _flatten(found: Found[Any]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    return tuple(found.values()), tuple(found)


def _unflatten(keys: Iterable[Any], values: Iterable[Any]) -> Found[Any]:
    return Found(zip(keys, values, strict=True))


jax.tree_util.register_pytree_node(Found, _flatten, _unflatten)


def zeros_like(shapes: Any) -> Any:
    """Arrays of zeros for a pytree of shapes."""

    def zeros(s: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.zeros(s.shape, s.dtype)

    return jax.tree.map(zeros, shapes)
