"""Shared by the bad-input tables: weights, trees, specs, one-call levels, and remedies."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

import jaxweights as jw

KEY = jax.random.key(0)
W = jnp.arange(24, dtype=jnp.float32).reshape(4, 6) / 8
x = jnp.ones((2, 4))


def tree(w=W, name="encoder"):
    return {name: {"kernel": w, "bias": w[0]}}


PARAMS, BIASES, OTHER = tree(), {"encoder": {"bias": W[0]}}, tree(W[:2])
V, T = ValueError, TypeError
clip, spectral, norm, beyond = jw.ClipWeights(1.0), jw.SpectralNorm(), jw.WeightNorm(), jw.Axes(2)
CLIP, SPECTRAL, NORM = jw.on_tree(clip), jw.on_tree(spectral), jw.on_tree(norm)
HEAD = {**PARAMS, "head": W}
STATE, OTHER_STATE, HEAD_STATE = (SPECTRAL.init(params, KEY) for params in (PARAMS, OTHER, HEAD))
NO_STATE = jw.TreeState({}, {})
narrow, prune, project, decay = jw.ClipNorm(1.0, beyond), jw.Prune(0.5), jw.project(clip), jw.add_weight_decay(0.1)
HE = {"**/kernel": jw.he_normal}
AROUND = jw.Around(clip)
DENSE = {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}
DENSE_NORM = {"a": {"kernel": W}, "n": {"scale": W[0]}}
NORM_STATS = {"n": {"mean": W[0], "var": W[0]}}
OLD_MASK = {"params": DENSE, "weight_transform": {"kernel": {"mask": W > 0}}}


def lift(transform, where=None, params=PARAMS):
    return jw.on_tree(transform, where).init(params, KEY)


def step(tx, updates, params, init=PARAMS):
    return tx.update(updates, tx.init(init), params)


def linen(transform, where=None, module=None):
    return jw.linen.Transformed(module or nn.Dense(3), transform, where).init(KEY, x)


def linen_apply(transform, variables):
    return jw.linen.Transformed(nn.Dense(3), transform).apply(variables, x)


def linen_norm(stats, evaluate=False, **options):
    options |= {"use_running_average": evaluate, "use_scale": False, "use_bias": False}
    return jw.linen.BatchNorm(**options).apply({"batch_stats": stats}, W, mutable=["batch_stats"])


def dense():
    return nnx.Linear(4, 3, rngs=nnx.Rngs(0))


def redraw(rules, params=PARAMS):
    return jw.reinitialize(params, KEY, rules)


def fed(batches, where=None):
    return jw.capture(lambda params, x: x @ params["encoder"]["kernel"], PARAMS, batches, where)


def drawing(shape=None, dtype=None):
    return {"**/kernel": lambda _, old_shape, old_dtype: jnp.zeros(shape or old_shape, dtype or old_dtype)}


def at(name, message):
    return f"{name} at 'encoder/kernel': {message}"


def integers(w):
    return w.astype(jnp.int32)


FLOAT = "convert it with .astype(jnp.float32)"
ARRAY = "for a tree use jax.tree.map, on_tree or one_shot; else convert it with jnp.asarray"
REAL = "transform .real and .imag on their own"
NUMBER = "pass a real number"
NAN = "look where it was computed"
CALLABLE = "evaluate it at the step first"
SCALAR = "pass one number"
INTEGER = "pass a Python int"
ONE_ROLE = "give every axis one role"
INIT = "pass the state that init returned for this weight"
WRITE_AXES = "write Axes(input=..., output=...)"
PATHS = "The floating-point arrays of this tree are: encoder/bias (6,), encoder/kernel (4, 6)"
CHAIN_LINEN = "Transformed(module, Chain(inner, outer))"
CHAIN_NNX = "transformed(module, Chain(inner, outer))"
GRADIENTS = "pass the parameters of these gradients"
LEAVES = "It has: encoder/bias, encoder/kernel"
SN = "SpectralNorm"
COLLECTIONS = "(in Flax Linen, all its collections)"
EMPTY = "give {glob: transform}, or one transform"
WHERE = "where must be a glob, a list of globs or a predicate (path, array) -> bool"
FLAX_PATHS = "arrays of this tree are: bias (3,), kernel (4, 3)"
ONE_SHAPE = "they must have one shape and dtype"
UPDATE = "call tx.update(grads, state, params)"
SHAPE = "write (2, 3), or (2,) for one axis"
TOWARD = "add_weight_decay at 'encoder/kernel': toward"
