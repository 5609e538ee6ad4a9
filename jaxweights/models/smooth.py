"""SmoothQuant: outliers of activations, moved into the weights that read them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from jaxweights.core.checks import check_scalar
from jaxweights.models.capture import as_arguments, check_batches
from jaxweights.models.progress import shown
from jaxweights.numerics.norms import safe_divide
from jaxweights.programs.flat import arrays_of, flat
from jaxweights.programs.interpreter import Interpreter, evaluate
from jaxweights.programs.scalings.apply import check_scalable, largest, largest_of, readers, scalable_groups, scaled
from jaxweights.programs.scalings.groups import Group, Tap
from jaxweights.programs.trace import split_arrays


def smooth(
    f: Callable[..., Any], params: Any, batches: Iterable[Any], alpha: float = 0.5, *, progress: bool = False
) -> Any:
    """Moves outliers of activations into the weights that read them, before both are quantized: SmoothQuant.

    Input j of a layer is divided by s_j in the scale and bias of the norm, or the kernel and bias, that make it, and
    multiplied by s_j in all kernels that read it: s_j = max|x_j|^α / max|w_j|^(1−α), over the data and over these
    kernels. The model computes what it did. Which arrays these are follows from the program, as in `equalize`.

    Args:
      f: a function (params, *batch), as in evaluation.
      params: the tree of weights.
      batches: an iterable of batches: a tuple of the arguments after `params`, or the one argument.
      alpha: α, from 0 to 1: how much of the range of activations goes into the weights. .5 is what the authors use for
        most models, more where activations have large outliers.
      progress: whether to show a bar.

    Returns:
      The tree with new weights.

    Raises:
      TypeError: `f` is not callable, `batches` not iterable, or a weight is stored.
      ValueError: `alpha` is out of range, there are no batches, or nothing can be scaled; the error says why.

    >>> import jax.numpy as jnp
    >>> import jaxweights as jw
    >>> params = {"scale": jnp.ones(2), "kernel": jnp.array([[1.0], [1.0]])}
    >>> f = lambda params, x: (jw.rms_norm(x) * params["scale"]) @ params["kernel"]
    >>> new = smooth(f, params, [jnp.array([[3.0, 4.0]])])
    >>> print(new["scale"] * new["kernel"][:, 0])
    [1. 1.]

    References: Xiao, Lin, Seznec, Wu, Demouth and Han, SmoothQuant, arXiv:2211.10438, 2022.
    """
    check_scalable(f, params)
    check_scalar("alpha", alpha, 0, 1)
    check_batches(batches)
    arrays, rebuild = split_arrays(params)
    given = map(as_arguments, batches)
    first = next(given, None)
    if first is None:
        raise ValueError("batches is empty: give at least one batch")

    @jax.jit
    def measure(arrays: list[Any], batch: tuple[Any, ...]) -> list[jax.Array]:
        program = flat(f, rebuild(arrays), batch)
        walk = _Taps(scalable_groups(program))
        walk.run(program.program, program.arguments(arrays, arrays_of(batch)))
        return walk.largest

    program = flat(f, params, first)
    groups, weights = scalable_groups(program), program.weights(arrays)
    tops = [jnp.zeros(group.shape) for group in groups]
    for batch in shown(itertools.chain([first], given), "smooth", progress):
        tops = list(map(jnp.maximum, tops, measure(arrays, batch)))
    by_place = dict(enumerate(weights))
    for group, top in zip(groups, tops, strict=True):
        read = largest(by_place, group, readers(group))
        factor = safe_divide(top**alpha, read ** (1 - alpha))
        by_place |= scaled(by_place, group, jnp.where(factor > 0, factor, 1))
    return rebuild(program.replaced(arrays, by_place))


class _Taps(Interpreter[Any]):
    """Evaluates a program.

    Attributes:
      largest: max|x| of each unit of each group, where weights read it.
    """

    def __init__(self, groups: Sequence[Group]):
        self.largest = [jnp.zeros(group.shape) for group in groups]
        self._taps: Mapping[Any, list[tuple[int, Tap]]] = {}
        for i, group in enumerate(groups):
            for tap in group.taps:
                self._taps.setdefault(tap.product, []).append((i, tap))

    def constant(self, aval: Any, value: Any) -> Any:
        """A value of the program itself."""
        return value

    def other(self, eqn: core.JaxprEqn, ins: list[Any]) -> list[Any]:
        """Evaluates an equation as it is."""
        for i, tap in self._taps.get(eqn.outvars[0], ()):
            found = largest_of(ins[tap.operand], tap.coordinates, self.largest[i].shape)
            self.largest[i] = jnp.maximum(self.largest[i], found)
        return evaluate(eqn, ins)
