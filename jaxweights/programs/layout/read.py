"""What a traced program does with each weight: one reading from all that the weight meets."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from jax.extend import core

from jaxweights.core.axes import Axes, axis_tuple
from jaxweights.core.convolution import Convolution
from jaxweights.programs.layout.walk import Event, Fate, LayoutWalk, Value
from jaxweights.programs.view import View


class Use(NamedTuple):
    """What a program does with a weight.

    Attributes:
      axes: how its products with data read the weight; None if there are none, or it cannot be said.
      why: what the weight meets, or what stands in the way.
      elsewhere: whether the program is done with the weight without a product: looks it up, adds it, scales with it.
      convolution: the product, if it is a convolution of images of one shape by a kernel (*window, in, out).
    """

    axes: Axes | None
    why: str
    elsewhere: bool = False
    convolution: Convolution | None = None


def read(program: core.ClosedJaxpr, weights: Mapping[int, str], data: Sequence[int]) -> dict[str, Use]:
    """What a program does with its weights, by path, in the order of use.

    Args:
      program: the traced program.
      weights: {place among its arguments: path}.
      data: places of the arguments that are data.
    """
    invars = program.jaxpr.invars
    shapes = {path: tuple(invars[i].aval.shape) for i, path in weights.items()}  # type: ignore[attr-defined]
    walk = LayoutWalk()
    views = {i: (View.whole(path, shapes[path]),) for i, path in weights.items()}
    walk.run(program, [Value(views.get(i, ()), i in data) for i in range(len(invars))])
    events: defaultdict[str, list[Event]] = defaultdict(list)
    for event in _with_stacks(list(walk.events), shapes):
        events[event.path].append(event)
    rest = {path: Use(None, "not used", elsewhere=True) for path in shapes if path not in events}
    return {path: _use(of, shapes[path]) for path, of in events.items()} | rest


def _use(events: Sequence[Event], shape: tuple[int, ...]) -> Use:
    """What one weight is used for."""
    products = [e for e in events if e.fate is Fate.PRODUCT]
    if not products:
        return _elsewhere(events)
    for e in products:
        if isinstance(e.axes, str):
            return Use(None, f"in a product, {e.axes}")
    first, *others = dict.fromkeys(e.axes for e in products)
    if others:
        return Use(None, f"read in two ways, {_words(first)} and {_words(others[0])}")
    convolutions = {_geometry(e, shape) for e in products}
    convolution = convolutions.pop() if len(convolutions) == 1 else None
    kinds = dict.fromkeys("convolution" if e.convolution else "product" for e in products)
    also = ", also looked up" if any(e.fate is Fate.LOOKED_UP for e in events) else ""
    stack = ""
    if any(e.mapped == _STACK for e in products):
        stack = ", a stack under vmap"
    elif any(e.mapped is not None and _may_be_stack(e.axes) for e in products):
        stack = ", perhaps a stack under vmap"
    return Use(first, " and ".join(kinds) + stack + also, convolution=convolution)


def _elsewhere(events: Sequence[Event]) -> Use:
    """What a weight is used for that meets data in no product."""
    fates = {e.fate for e in events}
    if Fate.LOOKED_UP in fates:
        return Use(None, "looked up", elsewhere=True)
    told = [e for e in events if e.fate is not Fate.LOST]
    if told and all(e.axes == "weight" for e in told):
        return Use(None, "scales a weight", elsewhere=True)
    if told:
        return Use(None, " and ".join(fate.value for fate in Fate if fate in fates - {Fate.LOST}), elsewhere=True)
    names = ", ".join(dict.fromkeys(str(e.axes) for e in events))
    return Use(None, f"not followed through {names}")


def _words(axes: Axes) -> str:
    named = {"in": axes.input, "out": axes.output, "batch": axes.batch}
    return " ".join(f"{name}={value}" for name, value in named.items() if value)


def _geometry(event: Event, shape: tuple[int, ...]) -> Convolution | None:
    """The convolution as a map of one image with the channels last, where its kernel is (*window, in, out)."""
    conv, n = event.convolution, len(shape)
    plain = Axes(input=(n - 2,), output=(n - 1,))
    if conv is None or event.image is None or dataclasses.replace(event.axes, groups=1) != plain:
        return None
    if set(conv.image_dilation) - {1}:
        return None
    space = tuple(event.image[a] for a in conv.image.space)
    input_shape = (*space, event.image[conv.image.channels])
    options = {"strides": conv.strides, "padding": conv.padding, "dilation": conv.kernel_dilation}
    return Convolution.of(shape, input_shape, groups=event.axes.groups, **options)


_STACK = "stack"
"""In place of the name of a `vmap`: the weight has one matrix for each of its steps."""


def _with_stacks(events: list[Event], shapes: Mapping[str, tuple[int, ...]]) -> list[Event]:
    """The events, with the stacks of weights that meet the same data under `vmap` read as batch.

    A program that has gone through `vmap` sums over the inputs of all layers of such a stack in one product, as if the
    layers were more outputs. The names of its equations tell that there was a `vmap`, but not over which axis. It is
    taken to be over the first axis of all weights in it, if that has one size and no product sums over it.
    """
    scopes: defaultdict[str, list[Event]] = defaultdict(list)
    for event in events:
        if event.mapped is not None and event.fate is not Fate.LOST:
            scopes[event.mapped].append(event)
    stacked = {name for name, within in scopes.items() if _is_stack(within, shapes)}
    return [_one_a_step(e) if e.mapped in stacked and e.fate is Fate.PRODUCT else e for e in events]


def _is_stack(events: Sequence[Event], shapes: Mapping[str, tuple[int, ...]]) -> bool:
    sizes = {shapes[e.path][:1] for e in events}
    products = [e.axes for e in events if e.fate is Fate.PRODUCT]
    if len(sizes) > 1 or () in sizes or not products or any(isinstance(axes, str) for axes in products):
        return False
    return all(0 in axes.batch or _may_be_stack(axes) for axes in products)


def _may_be_stack(axes: Axes) -> bool:
    """Whether the first axis may number the layers of a stack that all meet the same data."""
    output = axis_tuple("output", axes.output)
    return 0 in output and len(output) > 1


def _one_a_step(event: Event) -> Event:
    axes = event.axes
    if 0 in axes.batch:
        return event
    output = tuple(a for a in axes.output if a != 0)
    return dataclasses.replace(
        event, axes=dataclasses.replace(axes, output=output, batch=(0, *axes.batch)), mapped=_STACK
    )
