"""Scores: how much each weight matters. Pruning keeps the weights with the largest scores.

A score is a function `f(w)`, `f(w, grad)` or `f(w, key)`: it gets the gradient or a random key if it names them.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxweights.core.checks import check_state, check_weight
from jaxweights.core.transform import State
from jaxweights.numerics.dtypes import accumulation_dtype
from jaxweights.numerics.sharding import auto_sharded

Score = Callable[..., jax.Array]
"""A function of a weight, and of `grad` and `key` if it names them, that returns an array of the weight's shape."""


def magnitude(w: jax.Array) -> jax.Array:
    """The magnitude |w|.

    >>> import jax.numpy as jnp
    >>> print(magnitude(jnp.array([-2.0, 1.0])))
    [2. 1.]
    """
    return jnp.abs(check_weight(w))


def gradient(w: jax.Array, grad: jax.Array) -> jax.Array:
    """The magnitude of the gradient |∂L/∂w|, which pruned weights have too: RigL grows by it.

    >>> import jax.numpy as jnp
    >>> print(gradient(jnp.zeros(2), jnp.array([0.5, -3.0])))
    [0.5 3. ]
    """
    return jnp.abs(check_weight(grad, "grad"))


def random(w: jax.Array, key: jax.Array) -> jax.Array:
    """A uniform random number for each weight: SET grows by it.

    >>> import jax, jax.numpy as jnp
    >>> random(jnp.ones((2, 3)), jax.random.key(0)).shape
    (2, 3)
    """
    return auto_sharded(lambda w, key: jax.random.uniform(key, w.shape), check_weight(w), key, like=w)


def saliency(w: jax.Array, grad: jax.Array) -> jax.Array:
    """|w·∂L/∂w|: to first order, the change of the loss if the weight is removed. In float32 or wider.

    With the gradients of one batch at the initial weights and one threshold for all of them (`Global()`), this is SNIP:
    its connection sensitivities are these scores divided by their sum.

    >>> import jax.numpy as jnp
    >>> print(saliency(jnp.array([-2.0, 1.0]), jnp.array([0.5, 3.0])))
    [1. 3.]

    References: Molchanov, Tyree, Karras, Aila and Kautz, Pruning Convolutional Neural Networks for Resource Efficient
    Inference, arXiv:1611.06440, 2016; Lee, Ajanthan and Torr, SNIP: Single-shot Network Pruning based on Connection
    Sensitivity, arXiv:1810.02340, 2018.
    """
    w, grad = check_weight(w), check_weight(grad, "grad")
    return jnp.abs(w.astype(accumulation_dtype(w.dtype)) * grad.astype(accumulation_dtype(grad.dtype)))


@functools.lru_cache(maxsize=256)
def needs(score: Score) -> frozenset[str]:
    """Which of `grad` and `key` the score takes, or an error if it takes anything else."""
    if not callable(score):
        raise TypeError(f"score must be a function of a weight, got {score!r}: pass jaxweights.scores.magnitude")
    names = list(inspect.signature(score).parameters)[1:]
    if unknown := set(names) - {"grad", "key"}:
        raise TypeError(f"score may take grad and key besides the weight, got {sorted(unknown)}: write f(w, grad)")
    return frozenset(names)


def evaluate(score: Score, w: jax.Array, state: State, grad: jax.Array | None) -> jax.Array:
    """Evaluates a score of `w`, a random one with a key derived from the `seed` and the `step` of the state."""
    name, arguments = getattr(score, "__name__", repr(score)), {}
    if "grad" in needs(score):
        if grad is None:
            remedy = "call update(w, state, grad), or in an optax chain use confine"
            raise ValueError(f"the score {name} needs the gradients: {remedy}")
        arguments["grad"] = grad
    if "key" in needs(score):
        check_state(state, seed=jax.ShapeDtypeStruct((2,), jnp.uint32))
        key = jax.random.wrap_key_data(state["seed"], impl="threefry2x32")
        arguments["key"] = jax.random.fold_in(key, state.get("step", 0))
    scored = check_weight(score(w, **arguments), f"the result of the score {name}")
    if scored.shape != w.shape:
        raise ValueError(f"the score {name} must have the shape {w.shape} of w, got {scored.shape}: score each weight")
    return scored
