"""Follows the data of a program from layers to batch norms, and from batch norms to layers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.extend import core

from jaxweights.core.axes import Axes, Reading
from jaxweights.programs.interpreter import Interpreter, Rule, shape
from jaxweights.programs.norms.rules import RULES
from jaxweights.programs.norms.values import Data, Kernel, Labels, Leaf, Normed, Product, Value, Vector, joined, labels
from jaxweights.programs.view import View

N_DRAWS = 5
"""In the first, variances are 0: the factor of a norm is scale/√ε."""


class Norm(NamedTuple):
    """The positions of the arrays of a batch norm among the inputs of the program."""

    mean: int
    var: int
    scale: int | None = None
    offset: int | None = None


class Layer(NamedTuple):
    """The positions of the arrays of a layer."""

    kernel: int
    bias: int | None = None


class Applied(NamedTuple):
    """A way in which a batch norm is applied."""

    source: Product | Normed | None
    eps: float


class Use(NamedTuple):
    """What the product of a layer, or the result of a norm, meets.

    Attributes:
      by: path of the norm that is applied to the layer, or of the layer that reads the norm; None for anything else.
      axes: how that layer is read; or why the norm cannot be folded into it.
    """

    by: str | None
    axes: Axes | str | None = None


class NormWalk(Interpreter[Value]):
    """Runs an evaluation of a model on what is known of its arrays, and notes where its batch norms are applied.

    Attributes:
      applied: {norm: the ways in which it is applied}.
      after_layer: {layer: what its products meet}.
      after_norm: {norm: what its results meet}.
      before_layer: {layer: the norms whose results it multiplies, and None for any other data}.
      elsewhere: the positions of arrays that do more than to be the kernel of a layer or a part of a norm.
    """

    rules: ClassVar[Mapping[str, Rule[Any]]] = RULES

    def __init__(self, norms: Mapping[str, Norm], layers: Mapping[str, Layer]):
        self._norms, self._layers = norms, layers
        self._norm_of = {i: path for path, norm in norms.items() for i in norm if i is not None}
        self._drawn: dict[int, np.ndarray] = {}
        self.applied: defaultdict[str, set[Applied]] = defaultdict(set)
        self.after_layer: defaultdict[str, set[Use]] = defaultdict(set)
        self.after_norm: defaultdict[str, set[Use]] = defaultdict(set)
        self.before_layer: defaultdict[str, set[str | None]] = defaultdict(set)
        self.elsewhere: set[int] = set()

    def read(self, program: core.ClosedJaxpr) -> None:
        """Runs a program."""
        rng = np.random.default_rng(0)
        variances = {norm.var for norm in self._norms.values()}
        kernels = {layer.kernel: path for path, layer in self._layers.items()}
        vectors = {i for norm in self._norms.values() for i in norm} | {layer.bias for layer in self._layers.values()}
        ins: list[Value] = []
        for i, variable in enumerate(program.jaxpr.invars):
            if i in kernels:
                ins.append(Kernel(Leaf(i), View.whole(kernels[i], shape(variable))))
            elif i in vectors:
                self._drawn[i] = rng.uniform(0.5, 1.5, N_DRAWS)
                self._drawn[i][0] *= i not in variances
                ins.append(Vector(self._drawn[i], frozenset({Leaf(i)}), labels(shape(variable))))
            else:
                ins.append(self.unknown(variable))
        self.give(*self.run(program, ins))

    def constant(self, aval: Any, value: Any) -> Value:
        """A number is one; an array may be anything."""
        none = (None,) * np.ndim(value)
        if np.size(value) == 1 and (jnp.issubdtype(aval.dtype, jnp.number) or aval.dtype == jnp.bool_):
            return Vector(np.asarray(value).astype(np.float64).reshape(()), frozenset(), none)
        return Data.of(None, none)

    def other(self, eqn: core.JaxprEqn, ins: list[Value]) -> list[Value]:
        """Anything else ends what was followed."""
        self.leave(*ins)
        return list(map(self.unknown, eqn.outvars))

    def unknown(self, atom: core.Var | core.Literal) -> Value:
        """An array that may be anything."""
        return Data.of(None, (None,) * len(shape(atom)))

    def leave(self, *values: Value) -> None:
        """These are used otherwise than in a layer or a norm."""
        for value in values:
            used = {leaf.position for leaf in ({value.leaf} if isinstance(value, Kernel) else value.leaves)}
            match value:
                case Data(source=Product() as source):
                    self.after_layer[source.layer].add(Use(None))
                    bias = self._layers[source.layer].bias
                    if bias is not None:
                        # Its place is in the output of its layer, or in a multiple of that.
                        own = np.allclose(value.shift, value.factor * self._drawn[bias])
                        used = used - {bias} if own else used | {bias}
                case Data(source=Normed() as source):
                    self.after_norm[source.norm].add(Use(None))
            self.elsewhere |= used

    def give(self, *values: Value) -> None:
        """These are returned. Parameters and statistics may be, as they are."""
        drawn = set(map(id, self._drawn.values()))
        for value in values:
            if isinstance(value, Data) or (isinstance(value, Vector) and id(value.numbers) not in drawn):
                self.leave(value)

    def along(self, data: Data, v: Vector) -> Data:
        """The data, with these numbers along its features. A norm starts from the output of a layer, or anew."""
        axes = joined([data.axes, v.axes], len(data.axes))
        if axes is not None and data.source is None and not (data.leaves or any(data.axes)):
            data = data._replace(axes=axes)
        starts = self._norms_of(v.leaves) - self._norms_of(data.leaves)
        if axes == data.axes and not (starts and not self._is_output(data)):
            return data
        self.leave(data)
        return Data.of(None, data.axes if axes == data.axes else joined([v.axes], len(data.axes)) or ())

    def _norms_of(self, leaves: Iterable[Leaf]) -> set[str]:
        """The norms that these arrays belong to."""
        return {self._norm_of[leaf.position] for leaf in leaves if leaf.position in self._norm_of}

    def _is_output(self, data: Data) -> bool:
        """Whether the data is the output of a layer, with its bias if it has one, or the source itself."""
        bias = self._layers[data.source.layer].bias if isinstance(data.source, Product) else None
        shift = 0.0 if bias is None else self._drawn[bias]
        return bool(np.all(data.factor == 1)) and bool(np.all(data.shift == shift))

    def multiply(
        self, kernel: Kernel, data: Data, axes: Axes | str, of_data: Labels | None, of_product: Labels, padded: bool
    ) -> Value:
        """The product of a layer.

        Args:
          kernel: its kernel.
          data: what is multiplied.
          axes: how the kernel is read.
          of_data: the labels that data must have to be the result of a norm that can be folded into the kernel.
          of_product: the labels of the product.
          padded: whether the data has zeros around it or between its entries.
        """
        layer = kernel.view.path
        if isinstance(axes, Axes) and kernel.view.flipped - set(Reading.of(axes, kernel.view.shape).window):
            axes = "runs backwards along its features"
        if isinstance(data.source, Normed) and self._is_output(data):
            norm, why = data.source.norm, None
            if data.axes != of_data:
                why = "does not sum over the features of the norm alone"
            elif kernel.leaf.loops != data.source.loops:
                why = "is not looped over as the norm is"
            elif padded:
                why = "pads them with zeros, which the norm does not shift"
            self.after_norm[norm].add(Use(layer, why or axes))
            self.before_layer[layer].add(norm)
        else:
            self.leave(data)
            self.before_layer[layer].add(None)
        return Data.of(Product(layer, axes, kernel.leaf.loops), of_product)

    def completed(self, data: Data) -> Value:
        """The result of a norm, if the data is one by now."""
        for norm in self._norms_of(data.leaves):
            eps, source = self._eps(data, self._norms[norm]), data.source
            loops, *mixed = {leaf.loops for leaf in data.leaves if self._norm_of.get(leaf.position) == norm}
            if eps is not None and not mixed:
                if isinstance(source, Product) and {leaf.loops for leaf in data.leaves} != {source.loops}:
                    self.after_layer[source.layer].add(Use(None))
                    source = None
                elif isinstance(source, Product):
                    self.after_layer[source.layer].add(Use(norm, source.axes))
                elif isinstance(source, Normed):
                    self.after_norm[source.norm].add(Use(None))
                self.applied[norm].add(Applied(source, eps))
                return Data.of(Normed(norm, loops), data.axes)
        return data

    def _eps(self, data: Data, norm: Norm) -> float | None:
        """ε, if the data is the result of this norm; else None."""

        def drawn(position: int | None, default: float) -> np.ndarray:
            return np.full(N_DRAWS, default) if position is None else self._drawn[position]

        mean, var, scale, offset = map(drawn, norm, (0.0, 0.0, 1.0, 0.0))
        layer = self._layers[data.source.layer] if isinstance(data.source, Product) else None
        bias = drawn(layer.bias if layer else None, 0.0)
        factor, shift = (np.broadcast_to(a, N_DRAWS) for a in (data.factor, data.shift))
        with np.errstate(all="ignore"):
            square = (scale[0] / factor[0]) ** 2
        # The shortest decimal that is this number in float32, the one that the model was given.
        eps = float(str(np.float32(square))) if np.isfinite(square) else 0.0
        some = slice(0 if eps else 1, None)
        expected = scale[some] / np.sqrt(var[some] + eps)
        shifts = (bias - mean)[some] * expected + offset[some]
        same = np.allclose(factor[some], expected, rtol=1e-6) and np.allclose(shift[some], shifts, rtol=1e-6, atol=1e-6)
        return eps if same else None
