"""The axes of weights by names and shapes alone, and how sure that is."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from jaxweights.core.axes import (
    ATTENTION_IN,
    ATTENTION_OUT,
    CONV_TRANSPOSE_KERNEL,
    DENSE,
    Axes,
    Reading,
    dense_general,
)
from jaxweights.core.biases import (
    Place,
    Shape,
    bias_name,
    fitting,
    inputs_last,
    outputs_first,
    outputs_last,
    outputs_second,
)


class Inferred(NamedTuple):
    """What the name and the shape of a weight, and the weights beside it, tell of its axes.

    Attributes:
      axes: the reading; None for a bias, a scale, a token or a position, which are no kernels.
      why: what it follows from.
      others: other readings that fit as well. With any, `axes` is a guess.
    """

    axes: Axes | None
    why: str
    others: tuple[Axes, ...] = ()


def infer_axes(weights: Mapping[str, Any]) -> dict[str, Axes]:
    """The axes of kernels, by path, inferred from their names and from the weights beside them.

    A kernel's own shape does not tell a convolution from a stack of dense layers or from attention. The weights beside
    it do:

    - `query`, `key`, `value` and `out` side by side are multi-head attention;
    - a bias of shape (layers, out) beside a kernel (layers, in, out) is a stack (`nn.scan`, `nnx.vmap`);
    - a bias of shape (heads, head_dim) beside a kernel (features, heads, head_dim) is a `DenseGeneral`;
    - a bias of shape (out,) beside a kernel (out, in) tells that the outputs come first.

    A `weight`, as Equinox and torch name it, is (out, in, *window). A path is left out if its weight has the default
    reading, (..., in, out), which is also that of a weight of which nothing more is known. `jaxweights.describe` says
    how sure each reading is. `jaxweights.layout` reads the axes off the program and does not guess.

    Args:
      weights: {path: shape}, or a dict of arrays, nested or not, such as the parameters of a Flax model.

    Returns:
      {path: Axes}.

    Raises:
      TypeError: `weights` is not a dict, or something in it is neither an array nor a shape.

    >>> import numpy as np
    >>> stack = {"dense": {"kernel": np.ones((12, 256, 512)), "bias": np.ones((12, 512))}}
    >>> infer_axes(stack)["dense/kernel"].batch
    (0,)
    """
    found = infer(weights)
    return {path: one.axes for path, one in found.items() if one.axes is not None and one.axes != DENSE}


def infer(weights: Mapping[str, Any]) -> Mapping[str, Inferred]:
    """What names and shapes tell of each weight, by path. The arguments are those of `infer_axes`."""
    return _infer(tuple(_shapes(weights).items()))


@functools.lru_cache(maxsize=256)
def _infer(shapes: tuple[tuple[str, Shape], ...]) -> Mapping[str, Inferred]:
    beside: defaultdict[str, dict[str, Shape]] = defaultdict(dict)
    for path, shape in shapes:
        parent, _, name = path.rpartition("/")
        beside[parent][name] = shape
    sides = [_sides(path, shape) for path, shape in shapes if len(shape) > 1]
    outputs = Counter(n_out for _, n_out in sides)
    one_channel = frozenset(n_in for n_in, _ in sides if outputs[n_in] < 2)

    found = {}
    for path, shape in shapes:
        parent, _, name = path.rpartition("/")
        above, _, module = parent.rpartition("/")
        others = {s: beside.get(f"{above}/{s}" if above else s, {}) for s in _ATTENTION}
        w = _Weight(name, shape, module, beside[parent], all(name in of for of in others.values()), one_channel)
        found[path] = _with_others(w, next(one for rule in _RULES if (one := rule(w)) is not None))
    return MappingProxyType(found)


class _Weight(NamedTuple):
    """One weight, as its rules see it.

    Attributes:
      name: the last name of its path.
      shape: its shape.
      module: the name before the last.
      beside: {name: shape} of the weights of this module, this one included.
      attention: whether the module lies beside query, key, value and out.
      one_channel: numbers of outputs that feed another weight and come from no other. A depthwise convolution has as
        many inputs as outputs, so the layer before it has as many outputs; that of an image of one channel has none.
    """

    name: str
    shape: Shape
    module: str
    beside: Mapping[str, Shape]
    attention: bool
    one_channel: frozenset[int]

    @property
    def inputs_first(self) -> bool:
        """Whether its name is one of those of kernels (*window, in, out): of Flax, Haiku and Keras."""
        return bool(re.fullmatch(r"(.*_)?(kernel|embeddings?|w)(_.*)?\d*", self.name.lower()))

    @property
    def outputs_first(self) -> bool:
        """Whether its name is one of those of kernels (out, in, *window): of Equinox and torch."""
        return "weight" in self.name.lower() and not self.inputs_first

    @property
    def names(self) -> str:
        return f"{self.module}/{self.name}".lower()

    @property
    def bias(self) -> Shape | None:
        """The shape of the bias that belongs to it."""
        own = bias_name(self.name)
        if own != self.name and own in self.beside:
            return self.beside[own]
        alone = sum(len(shape) > 1 for shape in self.beside.values()) == 1
        if alone or self.inputs_first or self.outputs_first:
            return self.beside.get("bias", None if self.name == "b" else self.beside.get("b"))
        return None


# Rules: each gives what it tells of a weight, or None. The first that tells something holds.


def _bare(w: _Weight) -> Inferred | None:
    """An array that is the whole tree, which has no name."""
    return Inferred(DENSE, "a single array") if not w.name and len(w.shape) > 1 else None


def _vector(w: _Weight) -> Inferred | None:
    """A weight with fewer than two axes."""
    return Inferred(None, "a vector" if w.shape else "a number") if len(w.shape) < 2 else None


_NO_KERNELS = {
    "a bias": r"(.*_)?bias(es)?(_.*)?|(.*_)?(offset|shift|beta)_?\d*",
    "a scale": r"(.*_)?(scales?|gamma|gain)_?\d*",
    "a token": r"(.*_)?(tokens?|cls)_?\d*",
    "a position": r"(.*_)?pos(emb|itions?|itional)?(_(emb\w*|enc\w*|table|h|w))?_?\d*",
}


def _named_otherwise(w: _Weight) -> Inferred | None:
    """A bias, scale, token or position, which have more axes in a stack of layers or beside a batch."""
    for what, names in _NO_KERNELS.items():
        if re.fullmatch(names, w.name.lower()):
            return Inferred(None, f"{what}, by its name")
    kernels = [shape for name, shape in w.beside.items() if name != w.name and bias_name(name) == w.name]
    if any(len(shape) > len(w.shape) for shape in kernels):
        return Inferred(None, "a bias, by the kernel beside it")
    return None


def _norm(w: _Weight) -> Inferred | None:
    """The scale of a norm that is called `weight`."""
    if w.bias == w.shape:
        return Inferred(None, "a scale, by the bias of its shape")
    if w.name == "weight" and re.search(r"norm|(^|_)ln(_|\d|$)", w.module.lower()):
        return Inferred(None, "a scale, by its names")
    return None


_ATTENTION = {"query": ATTENTION_IN, "key": ATTENTION_IN, "value": ATTENTION_IN, "out": ATTENTION_OUT}


def _attention(w: _Weight) -> Inferred | None:
    """Query, key, value and out side by side are multi-head attention."""
    if not w.attention or w.name != "kernel" or len(w.shape) < 3:
        return None
    role = dataclasses.replace(_ATTENTION[w.module], batch=tuple(range(len(w.shape) - 3)))
    return Inferred(role, "beside query, key, value and out")


def _depthwise(w: _Weight) -> Inferred | None:
    """A kernel (*window, 1, out) or, as in Keras, (*window, in, multiplier), or (out, 1, *window)."""
    if len(w.shape) < 3 or "depthwise" not in w.names:
        return None
    axes = _by_convention(w)
    r = Reading.of(axes, w.shape)
    if w.shape[r.input[0]] == 1:
        return Inferred(dataclasses.replace(axes, groups=w.shape[r.output[0]]), "depthwise, by its name")
    if w.inputs_first:
        return Inferred(Axes(input=(), output=-1, batch=-2), "depthwise, by its name")
    return None


def _by_bias(w: _Weight) -> Inferred | None:
    """The bias is (*batch, *out). Where the outputs are in two places, the first that its name allows holds."""
    if w.bias is None:
        return None
    orders: list[tuple[Place, ...]] = [(outputs_last, inputs_last)]
    if w.inputs_first:
        orders = [(outputs_last,), (inputs_last,)]
    elif w.outputs_first:
        orders = [(outputs_first,), (outputs_second, outputs_last)]
    for places in orders:
        if fits := fitting(w.shape, w.bias, places):
            return Inferred(fits[0], "by the bias beside it", tuple(fits[1:]))
    return None


def _by_name(w: _Weight) -> Inferred | None:
    """A matrix (in, out) by its name."""
    return Inferred(DENSE, "by its name") if len(w.shape) == 2 and w.inputs_first else None


def _convolution(w: _Weight) -> Inferred | None:
    """A kernel of a module that is named so, or of two axes or more beside input and output, all of one size."""
    if len(w.shape) < 3:
        return None
    axes = _by_convention(w)
    window = [w.shape[a] for a in Reading.of(axes, w.shape).window]
    named, by_window = "conv" in w.names, len(window) > 1 and ("kernel" in w.name or w.outputs_first)
    if not (named or by_window) or len({n for n in window if n > 1 or not named}) > 1:
        return None
    return Inferred(axes, "a convolution, by its name" if named else "a convolution, by its square window")


def _guess(w: _Weight) -> Inferred:
    """Several readings fit."""
    n = len(w.shape)
    if n == 2:
        return Inferred(_by_convention(w), "a guess", (DENSE if w.outputs_first else Axes(-1, -2),))
    sides = (-1, -2) if w.outputs_first else (-2, -1)
    stack = Axes(*sides, batch=tuple(range(n - 2)))
    return Inferred(_by_convention(w), "a guess", (stack, dense_general(1, n - 1)))


_RULES: tuple[Callable[[_Weight], Inferred | None], ...] = (
    _bare,
    _vector,
    _named_otherwise,
    _norm,
    _attention,
    _depthwise,
    _by_bias,
    _by_name,
    _convolution,
    _guess,
)


def _with_others(w: _Weight, found: Inferred) -> Inferred:
    """Adds what no bias decides: whether a convolution is depthwise, or has a transposed kernel."""
    if found.axes is None or len(w.shape) < 3:
        return found
    others = list(found.others)
    r = Reading.of(found.axes, w.shape)
    n_in, n_out, n_positions = (math.prod(w.shape[a] for a in axes) for axes in (r.input, r.output, r.window))
    one_input = n_in == 1 < min(n_out, n_positions) and len(r.input) == len(r.output) == 1
    if one_input and r.groups == 1 and n_out not in w.one_channel:
        others.append(dataclasses.replace(found.axes, groups=n_out))
    undecided = w.bias is None or w.shape[-1] == w.shape[-2]
    if "transpose" in w.names and found.axes == DENSE and undecided:
        others.append(CONV_TRANSPOSE_KERNEL)
    return found._replace(others=tuple(others))


def _by_convention(w: _Weight) -> Axes:
    """(out, in, *window) or (*window, in, out), as weights of this name are."""
    n = len(w.shape)
    return Axes(input=1 - n, output=-n) if w.outputs_first else DENSE


def _sides(path: str, shape: Shape) -> tuple[int, int]:
    """The sizes of the input and the output axis of a weight."""
    first, second, *_ = shape if "weight" in path.rpartition("/")[2] else reversed(shape)
    return second, first


def _shapes(weights: Mapping[str, Any]) -> dict[str, Shape]:
    """{path: shape} of the arrays and shapes in a nested dict, without None."""
    if not isinstance(weights, Mapping):
        raise TypeError(f"weights must be a dict of arrays, got {type(weights).__name__}: pass {{path: shape}}")
    shapes: dict[str, Shape] = {}
    for name, value in weights.items():
        if isinstance(value, Mapping):
            shapes |= {f"{name}/{path}": shape for path, shape in _shapes(value).items()}
        elif value is not None:
            shape = getattr(value, "shape", value)
            if not isinstance(shape, tuple | list) or not all(isinstance(n, int | np.integer) for n in shape):
                got = f"{type(value).__name__} at {name!r}"
                raise TypeError(f"weights must hold arrays, shapes or dicts of them, got {got}: pass {{path: shape}}")
            shapes[str(name)] = tuple(shape)
    return shapes
