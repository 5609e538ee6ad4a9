"""A function of a tree of weights as one list of equations, with its arguments by path."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend import core

from jaxweights.levels.paths import flatten
from jaxweights.programs.trace import is_array, trace
from jaxweights.programs.unroll import Piece, unroll


class Flat(NamedTuple):
    """A program without calls, in which loops over stacks of layers are written out.

    Attributes:
      program: the program. Its first arguments are parameters, then comes the data.
      pieces: what each argument is: an array of the function, or a layer of one.
      n_params: how many arguments are parameters.
      paths: {place of an array among those of the function: path}.
    """

    program: core.ClosedJaxpr
    pieces: list[Piece]
    n_params: int
    paths: dict[int, str]

    def arguments(self, params: Sequence[Any], data: Sequence[Any]) -> list[Any]:
        """The arguments of the program, given the arrays of those of the function."""
        arrays = [*params, *data]
        return [arrays[piece.place][piece.layer] if piece.layer else arrays[piece.place] for piece in self.pieces]

    def weights(self, params: Sequence[Any]) -> list[Any]:
        """Those of its arguments that are parameters."""
        pieces = self.pieces[: self.n_params]
        return [params[piece.place][piece.layer] if piece.layer else params[piece.place] for piece in pieces]

    def replaced(self, params: Sequence[Any], weights: Mapping[int, Any]) -> list[Any]:
        """The arrays of the function, with these of the program's arguments in place."""
        new = list(params)
        for place, w in weights.items():
            piece = self.pieces[place]
            new[piece.place] = new[piece.place].at[piece.layer].set(w) if piece.layer else w
        return new


def flat(f: Callable[..., Any], params: Any, args: tuple[Any, ...]) -> Flat:
    """The program of f(params, *args). Leaves of `params` that are no arrays are passed as they are."""
    tree = flatten(params)
    places = [path for path, leaf in zip(tree.paths, tree.leaves, strict=True) if is_array(leaf)]
    weights = {place for place, leaf in enumerate(filter(is_array, tree.leaves)) if len(leaf.shape) >= 2}
    program, pieces = unroll(trace(f, (params, *args), {}), weights, len(places))
    n_params = sum(piece.place < len(places) for piece in pieces)
    return Flat(program, pieces, n_params, dict(enumerate(places)))


def arrays_of(tree: Any) -> list[Any]:
    """The arrays of a tree, in order."""
    return [leaf for leaf in jax.tree.leaves(tree) if is_array(leaf)]
