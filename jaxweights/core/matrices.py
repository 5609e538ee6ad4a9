"""What the stored types of this library share: each is arrays of matrices, and a `Layer` that says of what weight."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar, NoReturn, Self

import jax

from jaxweights.core.axes import Axes, Reading
from jaxweights.core.checks import check_weight
from jaxweights.core.layer import Layer, same_matrices, transposed_layer
from jaxweights.core.stored import nbytes, product


class StoredMatrices:
    """A weight stored as matrices: arrays (*batch, [groups,] ...), and the `layer` that says how they make a weight.

    A subclass is a frozen dataclass and a pytree node. It has

    - `dtype` and `astype(dtype)`.
    - `todense()`: the weight as an array.
    - `_times(x)`: x @ w for rows x (M, K), in the dtype to accumulate in, and a single matrix.
    - `_array`: the name of one of its arrays, and how many axes that has for a single matrix; the rest are batch axes.
    """

    layer: Layer
    dtype: Any
    todense: Any
    _times: Any
    _array: ClassVar[tuple[str, int]]
    __array_ufunc__ = None  # an array of NumPy leaves x @ w to __rmatmul__

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return self.layer.with_batch(self._batch)[0]

    @property
    def axes(self) -> Axes:
        """How the weight is read as a matrix."""
        return self.layer.with_batch(self._batch)[1]

    @property
    def ndim(self) -> int:
        """Number of axes of the weight."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of entries of the weight."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return nbytes(self)

    def transpose(self, permutation: Sequence[int]) -> Self | None:
        """The weight with its axes in this order. None where its rows would change places."""
        transposed = transposed_layer(self.axes, self.shape, permutation)
        if transposed is None:
            return None
        layer, order = transposed
        moved = jax.tree.map(lambda a: a.transpose(*order, *range(len(order), a.ndim)), self)
        return dataclasses.replace(moved, layer=layer)

    def read_as(self, axes: Axes) -> Self | None:
        """The same weight if it is stored as these matrices, else None."""
        return self if same_matrices(axes, self.axes, self.shape) else None

    def take(self, index: jax.Array) -> jax.Array | None:
        """w[index] for an array of integers in bounds, if the first axis numbers rows or columns, else None."""
        r, i, rest = Reading.of(self.axes, self.shape), index.reshape(-1), self.shape[1:]
        if r.batch or r.groups > 1:
            return None
        shape, found = (len(i), *rest), None
        if r.output == (0,) and (columns := self._columns(i)) is not None:
            found = dataclasses.replace(columns, layer=Layer.of(self.axes, shape)).todense()  # type: ignore[type-var]
        elif r.contracted == (0,) and (rows := self._rows(i)) is not None:
            found = self.axes.weight(rows, shape)
        return None if found is None else found.reshape(*index.shape, *rest)

    def __rmatmul__(self, x: jax.Array) -> jax.Array:
        """Returns x @ w, computed from what is stored."""
        return product(check_weight(x, "x"), self, self._times)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NoReturn:
        self._no_array()  # else NumPy makes an array of one object

    def __getitem__(self, index: Any) -> NoReturn:
        self._no_array()

    def _no_array(self) -> NoReturn:
        raise TypeError(
            f"a {type(self).__name__} is no array: make it one with w.todense(), multiply by it with x @ w, or run the "
            f"function or module that has it as jaxweights.with_stored(f)"
        )

    def _rows(self, index: jax.Array) -> jax.Array | None:
        """Some rows of a single matrix, in the dtype of the weight; None if the whole has to be an array for that."""
        return None

    def _columns(self, index: jax.Array) -> Self | None:
        """Some columns of a single matrix, stored as it is; its layer does not matter. None as for rows."""
        return None

    @property
    def _batch(self) -> tuple[int, ...]:
        name, ndim = self._array
        shape = getattr(self, name).shape
        return shape[: len(shape) - ndim - (self.layer.axes.groups > 1)]
