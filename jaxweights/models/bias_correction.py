"""Correction of biases: what quantization or pruning has shifted the mean of each layer's output by."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

from jaxweights.core.stored import is_stored
from jaxweights.levels.paths import flatten
from jaxweights.models.capture import as_arguments, check_batches
from jaxweights.models.progress import shown
from jaxweights.models.stored import densify
from jaxweights.programs.biases import Bias, find_biases
from jaxweights.programs.flat import Flat, arrays_of, flat
from jaxweights.programs.interpreter import Interpreter, evaluate
from jaxweights.programs.trace import is_array, split_arrays


def correct_biases(
    f: Callable[..., Any], params: Any, new_params: Any, batches: Iterable[Any], *, progress: bool = False
) -> Any:
    """Corrects the biases of a model whose weights were quantized, pruned or stored, on batches of data.

    b' = b + E[y − ŷ], where y is the product that the bias is added to in the model as it was, and ŷ that in the new
    model, whose layers before are corrected already. So each layer has the mean output that it had.

    Both models run side by side, once over the data, and each batch corrects itself on the way: what is added to a bias
    is the mean over batches. With one batch, the means of all layers are then equal. Which array is the bias of which
    product follows from the program. Products to which nothing is added are left as they are, but the running mean of a
    batch norm behind them is corrected in place of a bias, if `params` has it.

    Args:
      f: a function (params, *batch), as in evaluation.
      params: the tree of weights, as they were.
      new_params: the same tree with new weights, as `compress` returns it; some may be stored.
      batches: an iterable of batches: a tuple of the arguments after `params`, or the one argument.
      progress: whether to show a bar.

    Returns:
      `new_params` with new biases.

    Raises:
      TypeError: `f` is not callable, or `batches` not iterable.
      ValueError: the trees do not match, there are no batches, or the program adds no bias to a product.

    >>> import jax.numpy as jnp
    >>> import jaxweights as jw
    >>> params = {"kernel": jnp.array([[1.0], [0.25]]), "bias": jnp.zeros(1)}
    >>> dense = lambda params, x: x @ params["kernel"] + params["bias"]
    >>> pruned = params | {"kernel": jw.sparsify(params["kernel"], 0.5)}
    >>> print(correct_biases(dense, params, pruned, [jnp.array([[1.0, 4.0], [1.0, 8.0]])])["bias"])
    [1.5]

    References: Nagel, van Baalen, Blankevoort and Welling, Data-Free Quantization Through Weight Equalization and Bias
    Correction, arXiv:1906.04721, 2019.
    """
    if not callable(f):
        raise TypeError(f"f must be a function (params, *batch), got {type(f).__name__}: wrap the model in one")
    check_batches(batches)
    by_path = flatten(new_params).by_path
    _check_alike(flatten(params).by_path, by_path)
    (old, rebuild_old), (new, rebuild_new) = split_arrays(params), split_arrays(new_params)

    @jax.jit
    def step(old: list[Any], new: list[Any], batch: tuple[Any, ...]) -> dict[str, tuple[jax.Array, jax.Array]]:
        before, after = densify(rebuild_old(old)), densify(rebuild_new(new))
        return _corrections(flat(f, before, batch), arrays_of(before), arrays_of(after), arrays_of(batch))

    total: dict[str, tuple[jax.Array, jax.Array]] = {}
    for batch in shown(batches, "correct_biases", progress):
        found = step(old, new, as_arguments(batch))
        if not found:
            raise ValueError("f adds no array to the product of a weight, so there is no bias to correct")
        total = jax.tree.map(jnp.add, total, found) if total else found
    if not total:
        raise ValueError("batches is empty: give at least one batch")
    corrected = {
        path: (by_path[path] + sums / count).astype(by_path[path].dtype)
        for path, (sums, count) in total.items()
        if not is_stored(by_path[path])
    }
    return flatten(new_params).replaced(corrected)


def _check_alike(old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Raises unless both trees have the same leaves."""
    if list(old) != list(new):
        strange = next(iter(set(old) ^ set(new)), None)
        raise ValueError(f"new_params must be params with new weights, but only one of them has {strange!r}")
    for path in old:
        one, other = (_form(tree[path]) for tree in (old, new))
        if one != other:
            raise ValueError(f"new_params has {other} at {path!r}, params has {one}: pass the tree it was made from")


def _form(leaf: Any) -> str:
    return f"{leaf.dtype}{tuple(leaf.shape)}" if is_stored(leaf) or is_array(leaf) else type(leaf).__name__


def _corrections(
    program: Flat, old: list[Any], new: list[Any], data: list[Any]
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """{path of a bias: (Σ of the corrections, how many there are)}, each array in the shape of the bias."""
    walk = _Pairs(find_biases(program.program, program.n_params))
    pairs = zip(program.arguments(old, data), program.arguments(new, data), strict=True)
    walk.run(program.program, [_Pair(*pair) for pair in pairs])
    total: dict[str, tuple[jax.Array, jax.Array]] = {}
    for place, corrections in walk.found.items():
        piece = program.pieces[place]
        path, shape = program.paths[piece.place], old[piece.place].shape
        sums, count = total.get(path) or (jnp.zeros(shape, jnp.float32), jnp.zeros(shape, jnp.float32))
        for correction in corrections:
            sums = sums.at[piece.layer].add(correction)
            count = count.at[piece.layer].add(1)
        total[path] = sums, count
    return {path: (sums, jnp.maximum(count, 1)) for path, (sums, count) in total.items()}


class _Pair(NamedTuple):
    """An array of the model as it was, and of the new one."""

    old: Any
    new: Any


class _Pairs(Interpreter[_Pair]):
    """Runs both models, and adds to the new one's biases what makes the means equal.

    Attributes:
      found: {place of a bias: corrections of it}.
    """

    def __init__(self, biases: Mapping[core.Var, Bias]):
        self.biases = biases
        self.found: defaultdict[int, list[jax.Array]] = defaultdict(list)

    def constant(self, aval: Any, value: Any) -> _Pair:
        """The same in both."""
        return _Pair(value, value)

    def other(self, eqn: core.JaxprEqn, ins: list[_Pair]) -> list[_Pair]:
        """Evaluates the equation in both."""
        olds, news = (evaluate(eqn, values) for values in zip(*ins, strict=True)) if ins else (evaluate(eqn, []),) * 2
        outs = list(map(_Pair, olds, news))
        bias = self.biases.get(eqn.outvars[0])
        return outs if bias is None else [self._corrected(outs[0], bias)]

    def _corrected(self, y: _Pair, bias: Bias) -> _Pair:
        error = y.old.astype(jnp.float32) - y.new.astype(jnp.float32)
        others = [a for a in range(error.ndim) if a not in bias.axes]
        shift = jnp.mean(error, others, keepdims=True)
        places = [a for a in bias.axes if a is not None]
        of_bias = jnp.transpose(jnp.squeeze(shift, others), [sorted(places).index(a) for a in places])
        of_bias = jnp.expand_dims(of_bias, [i for i, a in enumerate(bias.axes) if a is None])
        self.found[bias.place].append(bias.sign * of_bias)
        return _Pair(y.old, (y.new + shift).astype(y.new.dtype))
