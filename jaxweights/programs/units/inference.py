"""The units of a model, found in the program that JAX traces: whatever has the same entries is cut alike."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax

from jaxweights.core.stored import is_stored
from jaxweights.levels.paths import flatten
from jaxweights.programs.interpreter import shape
from jaxweights.programs.units.groups import UnitGroup, UnitSlot
from jaxweights.programs.units.walk import Traced, UnitWalk


def unit_groups(f: Callable[..., Any], params: Any, *args: Any) -> tuple[UnitGroup, ...]:
    """The groups of units that can be removed from a model, each with every array that has them.

    The program of f(params, *args) is followed axis by axis: through elementwise operations, reshapes, pooling,
    products and convolutions, grouped and depthwise ones too. Axes that must agree are one group, as those of layers
    that are added in a residual stream. A group is returned if its units do nothing but pass through such operations
    until weights read them. Where anything else happens to them the axis stays as it is: the model's inputs and
    outputs, features that a layer norm averages, and operations that are not known here, such as loops and
    concatenations.

    Constants of the model that follow from a width, such as 1/√width, are not seen, nor is a kernel used otherwise than
    scaled, as by exp(w). Compare the smaller model with the masked one, as `remove_units` says.

    Args:
      f: a function (params, *args) -> outputs, as in evaluation.
      params: any pytree of arrays or of their shapes: parameters, and running statistics if there are.
      *args: pytrees of inputs, or of their shapes.

    Returns:
      The groups in the order of the tree, to be passed to `unit_norms`, `mask_units` and `remove_units`.

    Raises:
      TypeError: `f` is not callable.

    >>> import jax, jax.numpy as jnp
    >>> params = {"a": jnp.ones((4, 3)), "b": jnp.ones(3), "c": jnp.ones((3, 2))}
    >>> model = lambda p, x: jax.nn.relu(x @ p["a"] + p["b"]) @ p["c"]
    >>> for group in unit_groups(model, params, jnp.ones((8, 4))):
    ...     print(group.size, [(slot.path, slot.axis, slot.reads) for slot in group.slots])
    3 [('a', 1, False), ('b', 0, False), ('c', 0, True)]

    References: Fang, Ma, Song, Bi Mi and Wang, DepGraph: Towards Any Structural Pruning, arXiv:2301.12900, 2023.
    """
    if not callable(f):
        raise TypeError(f"f must be a function (params, *args), got {type(f).__name__}: wrap the model in one")
    paths, leaves, _ = flatten(params)
    if stored := [path for path, leaf in zip(paths, leaves, strict=True) if is_stored(leaf)]:
        raise TypeError(
            f"params has the stored weight {stored[0]!r}: units are cut from arrays, make them with jaxweights.densify"
        )
    program = jax.make_jaxpr(f)(params, *args)
    walk = UnitWalk()
    shapes = list(map(shape, program.jaxpr.invars))
    weights = [Traced(tuple(map(walk.dims.new, s)), frozenset({i})) for i, s in enumerate(shapes[: len(leaves)])]
    data = [walk.fixed(s, None) for s in shapes[len(leaves) :]]
    for out in walk.run(program, [*weights, *data]):
        walk.dims.fix(*out.axes)

    dims = walk.dims
    read = {(r.weight, factor) for r in walk.reads for factor in dims.resolve(r.axis)}
    slots: dict[int, list[UnitSlot]] = {}
    for i, (path, weight) in enumerate(zip(paths, weights, strict=True)):
        for a, axis in enumerate(weight.axes):
            factors = dims.resolve(axis)
            for j, factor in enumerate(factors):
                inner = math.prod(map(dims.size, factors[j + 1 :]))
                slots.setdefault(factor, []).append(UnitSlot(path, a, inner, (i, factor) in read))
    kept = {k: s for k, s in slots.items() if not dims.is_fixed(k) and any(slot.reads for slot in s)}
    return tuple(UnitGroup(dims.size(k), tuple(s)) for k, s in kept.items())
