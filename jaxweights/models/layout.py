"""How a model reads its weights: the axes of each, from the program that uses them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from jaxweights.core.axes import Axes
from jaxweights.core.convolution import Convolution
from jaxweights.core.stored import is_stored
from jaxweights.levels.paths import flatten
from jaxweights.models.layout_table import layout_table
from jaxweights.models.summary_table import printed
from jaxweights.programs.layout.read import read
from jaxweights.programs.trace import is_array, trace

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions
    from rich.table import Table


@dataclasses.dataclass(frozen=True)
class Weight:
    """What a program does with one weight.

    Attributes:
      path: path in the tree.
      shape: shape of the weight.
      axes: how the weight is read where it meets data in a product; None if it does not, or if no `Axes` says it.
      why: what the weight meets in the program, or what stands in the way.
      convolution: the geometry of the layer, if it is a convolution with a kernel (*window, in, out) of images of one
        shape.
    """

    path: str
    shape: tuple[int, ...]
    axes: Axes | None
    why: str
    convolution: Convolution | None = None


@dataclasses.dataclass(frozen=True)
class Layout(Mapping[str, Axes]):
    """{path: Axes} of the weights that meet data in a product. Hashable. `print` and rich show a table of all weights.

    Attributes:
      weights: all weights of the tree in the order of use, those too that meet data in no product.
    """

    weights: tuple[Weight, ...]

    @functools.cached_property
    def _axes(self) -> dict[str, Axes]:
        return {w.path: w.axes for w in self.weights if w.axes is not None}

    def __getitem__(self, path: str) -> Axes:
        return self._axes[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self._axes)

    def __len__(self) -> int:
        return len(self._axes)

    def within(self, path: str) -> Layout:
        """The layout of one part of the tree, with the paths that its weights have there.

        Raises:
          KeyError: there are no weights below `path`.
        """
        below = [w for w in self.weights if w.path.startswith(f"{path}/")]
        if not below:
            raise KeyError(path)
        return Layout(tuple(dataclasses.replace(w, path=w.path.removeprefix(f"{path}/")) for w in below))

    @property
    def convolutions(self) -> dict[str, Convolution]:
        """{path: geometry} of the convolutions of images of one shape by kernels (*window, in, out)."""
        return {w.path: w.convolution for w in self.weights if w.convolution is not None}

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table | str]:
        yield from layout_table(self, console, options)

    def __str__(self) -> str:
        """The table in the width of the terminal, or in 80 columns without one."""
        return printed(self)

    @property
    def skipped(self) -> dict[str, str]:
        """{path: why} of the other weights: those that are looked up, added or scale, and those not followed."""
        return {w.path: w.why for w in self.weights if w.axes is None}


def layout(f: Callable[..., Any], params: Any, *args: Any) -> Layout:
    """Reads off a function how it uses its weights: which axes are input, output and batch, for each of them.

    A weight's shape and name do not tell how it is used; the program that uses it does. The function is traced on
    abstract values and nothing is computed, so it takes seconds for a large model. Weights are followed through
    transposition, reshaping, slicing, indexing, broadcasting, concatenation and elementwise functions, and into loops,
    branches and `vmap`, to where they meet data.

    - An axis that is summed over is `input`; one that stays is `output`.
    - An axis along which each index meets data of its own is `batch`. So is one that a loop or an index runs over, and
      the first axis of a stack that `vmap` applies to the same data.
    - The positions of a convolution kernel are `window`.

    Args:
      f: a function (params, *args) -> anything, as in evaluation.
      params: a tree of weights: arrays, stored weights, or `jax.ShapeDtypeStruct`.
      *args: the data: pytrees of arrays or `jax.ShapeDtypeStruct`. Leaves of other types, such as flags, are passed as
        they are.

    Returns:
      A `Layout`, a hashable mapping {path: Axes} of all weights that meet data in a product. What is looked up, added
      or scales, and what could not be followed, is in `skipped` with the reason.

    Raises:
      TypeError: `f` is not callable.
      ValueError: `params` has no floating-point array.

    >>> import jax.numpy as jnp
    >>> params = {"query": jnp.ones((64, 4, 16)), "table": jnp.ones((100, 64)), "bias": jnp.ones(16)}
    >>> def f(params, tokens):
    ...     return jnp.einsum("td,dhk->thk", params["table"][tokens], params["query"]) + params["bias"]
    >>> found = layout(f, params, jnp.arange(3))
    >>> found["query"], found.skipped
    (Axes(input=(0,), output=(1, 2), batch=(), window=None, groups=1), {'table': 'looked up', 'bias': 'added'})
    """
    return layout_with_state(f, params, None, args, {})


def layout_with_state(
    f: Callable[..., Any], params: Any, state: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Layout:
    """`layout` of f(params, state, *args, **kwargs), or of f(params, *args) if the state is None: it is no data."""
    if not callable(f):
        raise TypeError(f"f must be a function (params, *args), got {type(f).__name__}: wrap the model in one")
    tree = flatten(params)
    dense = [jax.ShapeDtypeStruct(w.shape, w.dtype) if is_stored(w) else w for w in tree.leaves]
    weights = {i: w for i, w in enumerate(filter(is_array, dense)) if jnp.issubdtype(w.dtype, jnp.floating)}
    if not weights:
        raise ValueError(f"params has no floating-point array, got {type(params).__name__}: pass the tree of weights")
    paths = [path for path, w in zip(tree.paths, dense, strict=True) if is_array(w)]
    given = (tree.treedef.unflatten(dense), *(() if state is None else (state,)))
    program = trace(f, (*given, *args), kwargs)
    arguments = [leaf for leaf in jax.tree.leaves((*given, *args, dict(kwargs))) if is_array(leaf)]
    n_given = sum(map(is_array, jax.tree.leaves(given)))
    data = [i for i in range(n_given, len(arguments)) if not _is_key(arguments[i])]
    uses = read(program, {i: paths[i] for i in weights}, data)
    shapes = {paths[i]: tuple(w.shape) for i, w in weights.items()}
    return Layout(tuple(Weight(path, shapes[path], use.axes, use.why, use.convolution) for path, use in uses.items()))


def _is_key(array: Any) -> bool:
    """Whether an array is of random keys. What depends on them alone, such as a mask of a weight, is no data."""
    return jnp.issubdtype(array.dtype, jax.dtypes.prng_key)
