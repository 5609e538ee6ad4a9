"""A program without calls, in which loops over stacks of layers are written out."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

from jaxweights.programs.calls import scan_operands
from jaxweights.programs.interpreter import Interpreter, Rule, evaluate, struct


class Piece(NamedTuple):
    """An argument of a program, or one layer of it.

    Attributes:
      place: of the argument.
      layer: its index along the first axes; () for the whole argument.
    """

    place: int
    layer: tuple[int, ...] = ()


def unroll(program: core.ClosedJaxpr, weights: Collection[int], n_params: int) -> tuple[core.ClosedJaxpr, list[Piece]]:
    """Writes out calls, and the loops that go through a stack of layers, layer by layer.

    Args:
      program: the program.
      weights: the places of the weights among its arguments. A loop is written out if it slices one of them and that
        weight is used nowhere else.
      n_params: how many of its arguments are parameters, the first ones. Those that only such loops slice are given
        layer by layer to the new program.

    Returns:
      (the new program, its arguments).
    """
    pieces = [Piece(place) for place in range(len(program.jaxpr.invars))]
    while True:
        uses = _Uses()
        uses.run(program, [i if piece.place < n_params else None for i, piece in enumerate(pieces)])
        split = uses.split({i for i, piece in enumerate(pieces) if piece.place in weights})
        program, pieces = _written_out(program, pieces, split)
        if not split:
            return program, pieces


class _Uses(Interpreter[int | None]):
    """Finds out which arguments are sliced by loops. The state of a value is the argument that it is, or None."""

    def __init__(self):
        self.whole: set[int] = set()
        self.loops: list[set[int]] = []

    def constant(self, aval: Any, value: Any) -> None:
        return None

    def other(self, eqn: core.JaxprEqn, ins: list[int | None]) -> list[int | None]:
        self.whole |= {i for i in ins if i is not None}
        return [None for _ in eqn.outvars]

    def scan(self, eqn: core.JaxprEqn, ins: list[int | None]) -> list[int | None]:
        """A loop: what it slices, and what it takes whole."""
        consts, carry, xs = scan_operands(eqn, ins)
        self.whole |= {i for i in (*consts, *carry) if i is not None}
        self.loops.append({i for i in xs if i is not None})
        return [None for _ in eqn.outvars]

    rules: ClassVar[Mapping[str, Rule[Any]]] = {"scan": scan}

    def split(self, weights: set[int]) -> set[int]:
        """The arguments of which each loop that is written out takes one layer a step."""
        written, others = set[int](), set[int]()
        for xs in self.loops:
            stacks = xs & weights
            (written if stacks and not stacks & self.whole else others).update(xs)
        return written - others - self.whole


class _Layers(NamedTuple):
    """A stack, layer by layer."""

    each: tuple[Any, ...]


class _WriteOut(Interpreter[Any]):
    """Evaluates a program. The state of a value is the value, or its layers."""

    def constant(self, aval: Any, value: Any) -> Any:
        return value

    def other(self, eqn: core.JaxprEqn, ins: list[Any]) -> list[Any]:
        return evaluate(eqn, [jnp.stack(v.each) if isinstance(v, _Layers) else v for v in ins])

    def scan(self, eqn: core.JaxprEqn, ins: list[Any]) -> list[Any] | None:
        """A loop over layers, one after the other."""
        consts, carry, xs = scan_operands(eqn, ins)
        if not any(isinstance(x, _Layers) for x in xs):
            return None
        backwards, steps = eqn.params["reverse"], []
        for i in range(eqn.params["length"])[:: -1 if backwards else 1]:
            layer = [x.each[i] if isinstance(x, _Layers) else x[i] for x in xs]
            outs = self.run(eqn.params["jaxpr"], [*consts, *carry, *layer])
            carry = outs[: len(carry)]
            steps.append(outs[len(carry) :])
        return [*carry, *map(jnp.stack, zip(*(reversed(steps) if backwards else steps), strict=True))]

    rules: ClassVar[Mapping[str, Rule[Any]]] = {"scan": scan}


def _written_out(
    program: core.ClosedJaxpr, pieces: Sequence[Piece], split: Collection[int]
) -> tuple[core.ClosedJaxpr, list[Piece]]:
    """The program with the layers of some of its arguments in their place."""
    ins: list[Any] = []
    new: list[Piece] = []
    for i, (piece, v) in enumerate(zip(pieces, program.jaxpr.invars, strict=True)):
        whole = struct(v)
        if i in split:
            n, *shape = whole.shape
            ins.append(_Layers((jax.ShapeDtypeStruct(shape, whole.dtype),) * n))
            new += [Piece(piece.place, (*piece.layer, layer)) for layer in range(n)]
        else:
            ins.append(whole)
            new.append(piece)

    def run(*ins: Any) -> list[Any]:
        outs = _WriteOut().run(program, ins)
        return [jnp.stack(v.each) if isinstance(v, _Layers) else v for v in outs]

    return jax.make_jaxpr(run)(*ins), new
