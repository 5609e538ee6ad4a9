"""Cross-layer equalization: units scaled so that the weights that make them and those that read them have one range."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxweights.numerics.norms import safe_divide
from jaxweights.programs.flat import flat
from jaxweights.programs.scalings.apply import check_scalable, largest, makers, readers, scalable_groups, scaled
from jaxweights.programs.scalings.groups import Group, Slot
from jaxweights.programs.trace import split_arrays

_MAX_ROUNDS, _TOLERANCE = 100, 1e-3


def equalize(f: Callable[..., Any], params: Any, *args: Any) -> Any:
    """Equalizes the ranges of weights across layers, so that fewer bits hold them. The model computes what it did.

    Between a layer that makes units and one that reads them, with nothing but positively homogeneous functions on the
    way, unit i is divided by s_i in the kernel and the bias that make it and multiplied by s_i in the kernel that reads
    it: s_i = √(r_i/r'_i), the ranges of its weights in the one and in the other. All pairs in turn, until nothing
    changes any more.

    Which layers these are follows from the program. ReLU, leaky ReLU, pooling, dropout in evaluation, means over an
    image, scaling by anything, residual sums and attention's mixing of values are homogeneous; depthwise convolutions
    are equalized on both sides; batch norms are followed but belong folded first, with `fold_batch_norms`. ReLU6, GELU,
    SiLU, softmax and layer norms are not homogeneous: the layers on both sides stay as they are.

    It is meant for formats with one scale for a whole kernel. With a scale for each output unit, the kernels that make
    units gain nothing, and those that read them may lose: measure it.

    Args:
      f: a function (params, *args), as in evaluation.
      params: the tree of weights.
      *args: the data, of arrays or `jax.ShapeDtypeStruct`. Nothing is computed with it.

    Returns:
      The tree with new weights and biases.

    Raises:
      TypeError: `f` is not callable, or a weight is stored.
      ValueError: the program has no such pair of layers; the error says what lies on the way.

    >>> import jax, jax.numpy as jnp
    >>> params = {"up": jnp.array([[8.0, 0.1], [4.0, 0.2]]), "down": jnp.array([[0.5], [5.0]])}
    >>> mlp = lambda params, x: jax.nn.relu(x @ params["up"]) @ params["down"]
    >>> new = equalize(mlp, params, jnp.ones((1, 2)))
    >>> print(new["up"], new["down"].ravel())
    [[2.  0.5]
     [1.  1. ]] [2. 1.]

    References: Nagel, van Baalen, Blankevoort and Welling, Data-Free Quantization Through Weight Equalization and Bias
    Correction, arXiv:1906.04721, 2019; Meller, Finkelstein, Almog and Grobman, Same, Same But Different,
    arXiv:1902.01917, 2019.
    """
    check_scalable(f, params)
    arrays, rebuild = split_arrays(params)
    program = flat(f, params, args)
    groups = scalable_groups(program, lambda group: any(map(_is_kernel, makers(group))))
    return rebuild(program.replaced(arrays, _equalized(program.weights(arrays), groups)))


def _equalized(weights: Sequence[jax.Array], groups: Sequence[Group]) -> dict[int, jax.Array]:
    """The new weights by place, once their ranges are equal."""
    places = sorted({slot.place for group in groups for slot in group.slots})

    def one_round(state: tuple[dict[int, jax.Array], jax.Array, jax.Array]) -> Any:
        weights, _, n_rounds = state
        moved = jnp.float32(0)
        for group in groups:
            made = largest(weights, group, [slot for slot in makers(group) if _is_kernel(slot)])
            read = largest(weights, group, readers(group))
            factor = jnp.sqrt(safe_divide(made, read))
            factor = jnp.where(factor > 0, factor, 1)  # a unit of zeros stays
            weights = weights | scaled(weights, group, factor)
            moved = jnp.maximum(moved, jnp.max(jnp.abs(jnp.log(factor))).astype(jnp.float32))
        return weights, moved, n_rounds + 1

    def goes_on(state: Any) -> jax.Array:
        _, moved, n_rounds = state
        return (moved > _TOLERANCE) & (n_rounds < _MAX_ROUNDS)

    start = {place: weights[place] for place in places}, jnp.float32(jnp.inf), 0
    return jax.jit(lambda start: jax.lax.while_loop(goes_on, one_round, start))(start)[0]


def _is_kernel(slot: Slot) -> bool:
    return slot.coordinates[0].ndim >= 2
