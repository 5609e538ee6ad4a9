"""The programs to compare: each function returns ours and the peer's, on the same data."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import nnx
from timing import Program, compilation, function, step

import jaxweights as jw

KEY = jax.random.key(0)
Pair = tuple[Program, Program]


@dataclasses.dataclass(frozen=True)
class Size:
    """Sizes: a tree of `leaves` square weights, a batch of activations, and a tree of `many` leaves to compile."""

    leaves: int = 100
    side: int = 1000
    batch: int = 16384
    features: int = 1024
    rows: int = 256
    many: int = 100


FULL = Size()
QUICK = Size(leaves=3, side=64, batch=256, features=64, rows=16, many=50)


def weights(size: Size, dtype=jnp.float32) -> dict[str, jax.Array]:
    keys = jax.random.split(KEY, size.leaves)
    shape = (size.side, size.side)
    return {f"layer_{i}_kernel": 0.05 * jax.random.normal(k, shape).astype(dtype) for i, k in enumerate(keys)}


# One technique on a tree, against a read and write of the same bytes.


def against_copy(transform: jw.Transform, size: Size) -> Pair:
    params, lifted = weights(size), jw.on_tree(transform)
    copy = lambda params: jax.tree.map(lambda w: 0.5 * w, params)
    return function(lifted.apply, params, lifted.init(params, KEY)), function(copy, params)


def decay_against_optax(size: Size) -> Pair:
    params = weights(size)

    def update(tx: optax.GradientTransformation) -> Program:
        return function(lambda grads, params: tx.update(grads, tx.init(params), params)[0], params, params)

    return update(jw.add_weight_decay(0.01)), update(optax.add_decayed_weights(0.01))


def norm_against_flax(ours: Callable, theirs: nn.Module, size: Size) -> Pair:
    x = jax.random.normal(KEY, (size.batch, size.features)) + 1
    scale, bias = jnp.ones(size.features), jnp.zeros(size.features)
    variables = theirs.init(KEY, x)
    call = lambda variables, x: theirs.apply(variables, x, mutable=["batch_stats"])[0]
    return function(ours, x, scale, bias), function(call, variables, x)


# A step of Adam with decay, clipping and a mask.

CLIP, MASK = jw.ClipWeights(0.1), jw.Prune(0.5)
BOTH = jw.Chain(CLIP, MASK)


def adam(*between: optax.GradientTransformation, after: tuple[optax.GradientTransformation, ...] = ()):
    return optax.chain(optax.scale_by_adam(), *between, optax.scale_by_learning_rate(1e-3), *after)


def adam_step(
    tx: optax.GradientTransformation,
    size: Size,
    dtype=jnp.float32,
    init: Callable = lambda params: (),
    finish: Callable = lambda params, extra: params,
) -> Program:
    """One update of the whole tree, followed by `finish(params, init(params))`."""
    params = weights(size, dtype)
    grads = jax.tree.map(lambda w: 0.1 * w, params)

    def update(carry, grads):
        params, state, extra = carry
        updates, state = tx.update(grads, state, params)
        return finish(optax.apply_updates(params, updates), extra), state, extra

    return step(update, (params, tx.init(params), init(params)), grads)


def projected(transform: jw.Transform, size: Size, dtype=jnp.float32) -> Program:
    return adam_step(adam(jw.add_weight_decay(0.01), after=(jw.project(transform),)), size, dtype)


def projected_against_adam(transform: jw.Transform, size: Size, dtype=jnp.float32) -> Pair:
    return projected(transform, size, dtype), adam_step(adam(), size, dtype)


def applied_against_adam(size: Size) -> Pair:
    ours, lifted = adam(jw.add_weight_decay(0.01)), jw.on_tree(BOTH)
    init = lambda params: lifted.init(params, KEY)
    return adam_step(ours, size, init=init, finish=lifted.apply), adam_step(adam(), size)


def projected_against_optax(size: Size) -> Pair:
    """optax provides decay and boxes; the mask is applied by hand."""

    def finish(params, masks):
        low, high = (jax.tree.map(lambda _, bound=bound: bound, params) for bound in (-0.1, 0.1))
        boxed = optax.projections.projection_box(params, low, high)
        return jax.tree.map(jnp.multiply, boxed, masks)

    masks = lambda params: jax.tree.map(lambda w: jw.magnitude_mask(w, 0.5), params)
    theirs = adam_step(adam(optax.add_decayed_weights(0.01)), size, init=masks, finish=finish)
    return projected(BOTH, size), theirs


# Forward and backward through a dense layer, ours against Flax's wrapper or norm.


def linen_step(build: Callable[[int], nn.Module], size: Size, **options) -> Program:
    model, x = build(size.features), jax.random.normal(KEY, (size.rows, size.features))
    variables = model.init(KEY, x, **options)
    params, rest = variables["params"], {k: v for k, v in variables.items() if k != "params"}

    def loss(params, rest, x):
        y, rest = model.apply({"params": params, **rest}, x, mutable=list(rest), **options)
        return jnp.mean(jnp.square(y)), rest

    return function(jax.value_and_grad(loss, has_aux=True), params, rest, x)


def nnx_step(build: Callable[[int, nnx.Rngs], nnx.Module], size: Size) -> Program:
    x = jax.random.normal(KEY, (size.rows, size.features))
    graphdef, params, rest = nnx.split(build(size.features, nnx.Rngs(0)), nnx.Param, ...)

    def loss(params, rest, x):
        model = nnx.merge(graphdef, params, rest, copy=True)
        y = model(x)
        return jnp.mean(jnp.square(y)), nnx.state(model)

    return function(jax.value_and_grad(loss, has_aux=True), params, rest, x)


def linen_modules(ours: Callable, theirs: Callable, size: Size, **options) -> Pair:
    return linen_step(ours, size), linen_step(theirs, size, **options)


def nnx_modules(ours: Callable, theirs: Callable, size: Size) -> Pair:
    return nnx_step(ours, size), nnx_step(theirs, size)


# Tracing and compiling update and apply on a tree of many leaves of five shapes.


def shapes(n: int) -> dict[str, jax.ShapeDtypeStruct]:
    sides = ((64, 64), (64, 128), (128, 64), (128, 128), (128, 256))
    return {f"layer_{i}_kernel": jax.ShapeDtypeStruct(sides[i % 5], jnp.float32) for i in range(n)}


def tree_compilation(transform: jw.Transform, n: int) -> Program:
    lifted, params = jw.on_tree(transform), shapes(n)

    def both(params, state):
        state = lifted.update(params, state)
        return lifted.apply(params, state), state

    return compilation(both, params, jax.eval_shape(lifted.init, params, KEY))


def leaf_compilation(transform: jw.Transform, n: int) -> Program:
    params = shapes(n)

    def both(params, states):
        states = {path: transform.update(w, states[path]) for path, w in params.items()}
        return {path: transform.apply(w, states[path]) for path, w in params.items()}, states

    states = jax.eval_shape(lambda params: {path: transform.init(w, KEY) for path, w in params.items()}, params)
    return compilation(both, params, states)


def compile_against_loop(transform: jw.Transform, size: Size) -> Pair:
    return tree_compilation(transform, size.many), leaf_compilation(transform, size.many)


def compile_growth(transform: jw.Transform, size: Size) -> Pair:
    return tree_compilation(transform, size.many), tree_compilation(transform, size.many // 10)
