"""Bad input, case by case: the type of the error and the part of its message that says what to do."""

import inspect
import math
import re
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxweights as jw
from jaxweights.transform import Transform

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


def drawing(shape=None, dtype=None):
    return {"**/kernel": lambda _, old_shape, old_dtype: jnp.zeros(shape or old_shape, dtype or old_dtype)}


def at(name, message):
    return f"{name} at 'encoder/kernel': {message}"


def integers(w):
    return w.astype(jnp.int32)


FLOAT = "convert it with .astype(jnp.float32)"
ARRAY = "for a tree of weights use jaxweights.on_tree, else convert it with jnp.asarray"
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

# A case is (name, function, error, remedy). A function with an argument is called with W, and once more under jit.
ARRAYS = [
    # Weights of the wrong kind. Every array function checks its own.
    *(
        (f"{name} of {kind}", lambda w, f=f, bad=bad: f(bad(w)), T, remedy)
        for name, f in {
            "clip_weights": lambda w: jw.clip_weights(w, 1.0),
            "clip_norm": lambda w: jw.clip_norm(w, 1.0),
            "clip_range": lambda w: jw.clip_range(w, 0.0),
            "bound_norm": lambda w: jw.bound_norm(w, 1.0, 1.0),
            "project_simplex": lambda w: jw.project_simplex(w),
            "project_l1_ball": lambda w: jw.project_l1_ball(w, 1.0),
            "sparsify": lambda w: jw.sparsify(w, 1.0),
            "magnitude_mask": lambda w: jw.magnitude_mask(w, 0.5),
            "weight_normalize": jw.weight_normalize,
            "spectral_norm": jw.spectral_norm,
            "spectral_normalize": jw.spectral_normalize,
            "cluster": lambda w: jw.cluster(w, 2),
            "fake_quantize": lambda w: jw.fake_quantize(w, 4),
            "quantize": lambda w: jw.quantize(w, 4),
            "matmul": lambda w: jw.matmul(w, jw.quantize(W.T, 4)),
            "orthogonalize": jw.orthogonalize,
            "clip_singular_values": lambda w: jw.clip_singular_values(w, 1.0),
            "Orthogonalize": lambda w: jw.Orthogonalize().apply(w, {}),
            "ClipSingularValues": lambda w: jw.ClipSingularValues(1.0).apply(w, {}),
            "share": lambda w: jw.share(w, np.zeros(3, int)),
            "weight_decay": lambda w: jw.weight_decay(W, w, 0.1),
            "weight_decay's grad": lambda w: jw.weight_decay(w, W, 0.1),
            "weight_decay's toward": lambda w: jw.weight_decay(W, W, 0.1, toward=w),
            "batch_norm": jw.batch_norm,
            "batch_renorm": lambda w: jw.batch_renorm(w, mean=W[0], var=W[0], r_max=3.0, d_max=5.0),
            "batch_stats": jw.batch_stats,
            "layer_norm": jw.layer_norm,
            "rms_norm": jw.rms_norm,
            "group_norm": lambda w: jw.group_norm(w, n_groups=2),
            "instance_norm": jw.instance_norm,
            "fold_batch_norm": lambda w: jw.fold_batch_norm(w, mean=W[0], var=W[0]),
            "WeightNorm": lambda w: jw.WeightNorm().init(w, KEY),
            "SpectralNorm": lambda w: jw.SpectralNorm().init(w, KEY),
            "ShareWeights": lambda w: jw.ShareWeights(2).init(w, KEY),
            "Prune": lambda w: jw.Prune(0.5).init(w, KEY),
            "ClipWeights": lambda w: jw.ClipWeights(1.0).apply(w, {}),
            "ClipNorm": lambda w: jw.ClipNorm(1.0).apply(w, {}),
            "ClipRange": lambda w: jw.ClipRange(0.0).apply(w, {}),
            "BoundNorm": lambda w: jw.BoundNorm(1.0, 1.0).apply(w, {}),
            "Simplex": lambda w: jw.Simplex().apply(w, {}),
            "L1Ball": lambda w: jw.L1Ball(1.0).apply(w, {}),
            "Around": lambda w: AROUND.init(w, KEY),
            "Around's update": lambda w: AROUND.update(w, {"center": W}),
            "Around's apply": lambda w: AROUND.apply(w, {"center": W}),
            "Sparsify": lambda w: jw.Sparsify(1.0).apply(w, {}),
            "FakeQuantize": lambda w: jw.FakeQuantize(4).apply(w, {}),
            "Chain": lambda w: jw.Chain(jw.ClipWeights(1.0)).apply(w, {}),
        }.items()
        for kind, bad, remedy in [
            ("integers", integers, FLOAT),
            ("a list", lambda w: [w], ARRAY),
        ]
    ),
    ("weight of booleans", lambda w: jw.clip_weights(w > 1, 1.0), T, FLOAT),
    ("weight complex", lambda w: jw.clip_weights(w + 1j, 1.0), T, REAL),
    ("weight a dict", lambda w: jw.clip_weights({"w": w}, 1.0), T, ARRAY),
    ("weight None", lambda w: jw.clip_weights(None, 1.0), T, ARRAY),
    ("weight True", lambda w: jw.clip_weights(True, 1.0), T, ARRAY),
    ("weight an integer", lambda w: jw.clip_weights(3, 1.0), T, ARRAY),
    ("weight a string", lambda w: jw.clip_weights("w", 1.0), T, ARRAY),
    # Hyper-parameters.
    ("limit < 0", lambda w: jw.clip_weights(w, -1.0), V, "limit must be at least 0, got -1.0"),
    ("limit < 0 in an array", lambda w: jw.clip_weights(w, np.array(-1.0)), V, "must be at least 0"),
    ("limit NaN", lambda w: jw.clip_weights(w, math.nan), V, NAN),
    ("limit NaN in numpy", lambda w: jw.clip_weights(w, np.float32("nan")), V, NAN),
    ("limit string", lambda w: jw.clip_weights(w, "1"), T, NUMBER),
    ("limit bool", lambda w: jw.clip_weights(w, True), T, NUMBER),
    ("limit None", lambda w: jw.clip_weights(w, None), T, NUMBER),
    ("limit complex", lambda w: jw.clip_weights(w, 1j), T, NUMBER),
    ("limit complex array", lambda w: jw.clip_weights(w, w[0, 0] * 1j), T, NUMBER),
    ("limit boolean array", lambda w: jw.clip_weights(w, w[0, 0] > 0), T, NUMBER),
    ("limit list", lambda w: jw.clip_weights(w, [1.0]), T, NUMBER),
    ("limit vector", lambda w: jw.clip_weights(w, w[0]), V, SCALAR),
    ("limit schedule", lambda w: jw.clip_weights(w, lambda step: 1.0), T, CALLABLE),
    ("max_norm < 0", lambda w: jw.clip_norm(w, -1), V, "max_norm must be at least 0"),
    ("max_norm vector", lambda w: jw.clip_norm(w, w[0]), V, SCALAR),
    ("singular limit < 0", lambda w: jw.clip_singular_values(w, -1.0), V, "limit must be at least 0"),
    ("singular limit vector", lambda w: jw.clip_singular_values(w, w[0]), V, SCALAR),
    ("gain string", lambda w: jw.orthogonalize(w, gain="1"), T, NUMBER),
    ("gain vector", lambda w: jw.orthogonalize(w, gain=w[0]), V, SCALAR),
    ("orthogonalize in 0 steps", lambda w: jw.orthogonalize(w, n_steps=0), V, "n_steps must be at least 1"),
    ("orthogonalize in 2.0 steps", lambda w: jw.orthogonalize(w, n_steps=2.0), T, INTEGER),
    ("low NaN", lambda w: jw.clip_range(w, math.nan), V, NAN),
    ("high string", lambda w: jw.clip_range(w, 0.0, "1"), T, NUMBER),
    ("low > high", lambda w: jw.clip_range(w, 1.0, -1), V, "low must be at most high, got 1.0 and -1: swap them"),
    ("low norm < 0", lambda w: jw.bound_norm(w, -1.0, 1.0), V, "low must be at least 0"),
    ("high norm NaN", lambda w: jw.bound_norm(w, 0.0, math.nan), V, NAN),
    ("low norm > high", lambda w: jw.bound_norm(w, 2.0, np.array(1.0)), V, "low must be at most high"),
    ("rate of the norm 2", lambda w: jw.bound_norm(w, 0.0, 1.0, rate=2.0), V, "rate must be in [0, 1], got 2.0"),
    ("total < 0", lambda w: jw.project_simplex(w, -1.0), V, "total must be at least 0"),
    ("total schedule", lambda w: jw.project_simplex(w, lambda step: 1.0), T, CALLABLE),
    ("radius < 0", lambda w: jw.project_l1_ball(w, -1.0), V, "radius must be at least 0"),
    ("radius None", lambda w: jw.project_l1_ball(w, None), T, NUMBER),
    ("threshold < 0", lambda w: jw.sparsify(w, -0.1), V, "threshold must be at least 0"),
    ("threshold matrix", lambda w: jw.sparsify(w, w), V, SCALAR),
    ("threshold string", lambda w: jw.sparsify(w, "0.1"), T, NUMBER),
    ("sparsity 1.5", lambda w: jw.magnitude_mask(w, 1.5), V, "sparsity must be in [0, 1], got 1.5"),
    ("sparsity < 0", lambda w: jw.magnitude_mask(w, -0.5), V, "sparsity must be in [0, 1]"),
    ("sparsity NaN", lambda w: jw.magnitude_mask(w, math.nan), V, NAN),
    ("rate < 0", lambda w: jw.weight_decay(w, w, -0.1), V, "rate must be at least 0"),
    ("rate schedule", lambda w: jw.weight_decay(w, w, optax.constant_schedule(1)), T, CALLABLE),
    ("decay shapes", lambda w: jw.weight_decay(w, w[0], 0.1), V, "pass the gradient of this weight"),
    ("decay toward", lambda w: jw.weight_decay(w, w, 0.1, toward=w[0]), V, "pass the centre of this weight"),
    ("penalty by name", lambda w: jw.weight_decay(w, w, 0.1, penalty_grad="l1"), T, "pass jnp.sign for L1"),
    ("penalty summed", lambda w: jw.weight_decay(w, w, 0.1, penalty_grad=jnp.sum), V, "penalty_grad must return"),
    ("bits 0", lambda w: jw.fake_quantize(w, 0), V, "bits must be from 1 to 16, got 0"),
    ("bits 33", lambda w: jw.fake_quantize(w, 33), V, "bits must be from 1 to 16, got 33"),
    ("bits 1.5", lambda w: jw.fake_quantize(w, 1.5), T, INTEGER),
    ("bits True", lambda w: jw.fake_quantize(w, True), T, INTEGER),
    ("bits array", lambda w: jw.fake_quantize(w, integers(w)[0, 0]), T, INTEGER),
    ("bits 1 stored", lambda w: jw.quantize(w, 1), V, "bits must be from 2 to 8, got 1"),
    ("bits 9 stored", lambda w: jw.quantize(w, 9), V, "bits must be from 2 to 8, got 9"),
    ("bits '8' stored", lambda w: jw.quantize(w, "8"), T, INTEGER),
    ("n_clusters 0", lambda w: jw.cluster(w, 0), V, "n_clusters must be at least 1, got 0"),
    ("n_clusters 2.0", lambda w: jw.cluster(w, 2.0), T, INTEGER),
    ("cluster nothing", lambda w: jw.cluster(w[:0], 2), V, "leave it out of `where`"),
    ("eps < 0, batch", lambda w: jw.batch_norm(w, eps=-1e-5), V, "eps must be at least 0"),
    ("eps < 0, layer", lambda w: jw.layer_norm(w, eps=-1e-5), V, "eps must be at least 0"),
    ("eps NaN, rms", lambda w: jw.rms_norm(w, eps=math.nan), V, NAN),
    ("eps string, group", lambda w: jw.group_norm(w, n_groups=2, eps="0"), T, NUMBER),
    ("eps vector, instance", lambda w: jw.instance_norm(w[None], eps=w[0]), V, SCALAR),
    ("eps < 0, fold", lambda w: jw.fold_batch_norm(w, mean=w[0], var=w[0], eps=-1.0), V, "at least 0"),
    # Axes that do not fit.
    ("axes a tuple", lambda w: jw.weight_normalize(w, axes=(0, 1)), T, WRITE_AXES),
    ("axes 0", lambda w: jw.spectral_norm(w, axes=0), T, WRITE_AXES),
    ("axes the class", lambda w: jw.clip_norm(w, 1.0, axes=jw.Axes), T, WRITE_AXES),
    ("axes 1", lambda w: jw.orthogonalize(w, axes=1), T, WRITE_AXES),
    ("axes of the input", lambda w: jw.clip_singular_values(w, 1.0, axes=jw.Axes(2)), V, "use axes from -2 to 1"),
    ("axes ()", lambda w: jw.FakeQuantize(4, per_unit=True, axes=()).apply(w, {}), T, WRITE_AXES),
    ("input out of range", lambda w: jw.quantize(w, 8, axes=jw.Axes(input=2)), V, "use axes from -2 to 1"),
    ("batch out of range", lambda w: jw.spectral_norm(w, axes=jw.Axes(batch=-3)), V, "use axes from -2 to 1"),
    ("axis twice", lambda w: jw.clip_norm(w, 1.0, axes=jw.Axes(-1, -1)), V, ONE_ROLE),
    ("axis twice, two signs", lambda w: jw.fake_quantize(w, 4, axes=jw.Axes(0, -2)), V, ONE_ROLE),
    ("axis without a role", lambda w: jw.Axes(0, (), window=()).matrix(w), V, "input, output, batch or window"),
    ("groups 4 of 6", lambda w: jw.spectral_norm(w, axes=jw.axes.depthwise(4)), V, "does not divide the 6"),
    ("groups without output", lambda w: jw.Axes((0, 1), (), groups=2).matrix(w), V, "exactly one output axis"),
    # Shapes that do not fit.
    ("scale shape", lambda w: jw.weight_normalize(w, w[:, 0]), V, "must have shape (6,), one length per"),
    ("scale integer", lambda w: jw.weight_normalize(w, integers(w)[0]), T, "scale must be of a floating dtype"),
    ("scale list", lambda w: jw.weight_normalize(w, [1.0]), T, "scale must be a floating-point array"),
    ("sigma shape", lambda w: jw.spectral_normalize(w, w[0]), V, "sigma must have shape ()"),
    ("sigma integer", lambda w: jw.spectral_normalize(w, 2), T, "sigma must be a floating-point array"),
    ("codebook 2-D", lambda w: jw.share(w, np.zeros(3, int)), V, "ravel it"),
    ("codebook empty", lambda w: jw.share(w[0, :0], np.zeros(3, int)), V, "one-dimensional and not empty"),
    ("index float", lambda w: jw.share(w[0], w), T, "use cluster or conv_index"),
    ("index bool", lambda w: jw.share(w[0], w > 1), T, "use cluster or conv_index"),
    ("index list", lambda w: jw.share(w[0], [0, 1]), T, "use cluster or conv_index"),
    ("matmul shapes", lambda w: jw.matmul(w, jw.quantize(w, 8)), V, "x must end in the input axes (4,) of q"),
    ("matmul scalar", lambda w: jw.matmul(w[0, 0], jw.quantize(w, 8)), V, "x must end in the input axes (4,)"),
    ("matmul array", lambda w: jw.matmul(w.T, w), T, "make one with quantize(w, bits)"),
    ("matmul batch", lambda w: jw.matmul(w, jw.quantize(w, 8, axes=jw.Axes(batch=0, input=()))), V, "jax.vmap"),
    ("dequantize array", lambda w: jw.dequantize(w), T, "make one with quantize(w, bits)"),
    # Norms.
    ("mean without var", lambda w: jw.batch_norm(w, mean=w[0]), V, "give mean and var together, or neither"),
    ("var without mean", lambda w: jw.batch_norm(w, var=w[0]), V, "give mean and var together, or neither"),
    ("mean and where", lambda w: jw.batch_norm(w, mean=w[0], var=w[0], where=w > 0), V, "leave them out where"),
    ("where floats", lambda w: jw.batch_norm(w, where=w), T, "compare it with a number"),
    ("where list", lambda w: jw.batch_stats(w, where=[True]), T, "compare it with a number"),
    ("where shape", lambda w: jw.batch_norm(w, where=w[:, 0] > 0), V, "add axes with [..., None]"),
    ("where bigger than x", lambda w: jw.batch_stats(w, where=w[None] > 0), V, "where must broadcast to x"),
    ("batch scale shape", lambda w: jw.batch_norm(w, w[:, 0]), V, "scale must have shape (6,), one per feature"),
    ("batch bias shape", lambda w: jw.batch_norm(w, None, w), V, "bias must have shape (6,), one per feature"),
    ("batch mean shape", lambda w: jw.batch_norm(w, mean=w, var=w), V, "mean must have shape (6,)"),
    ("batch var integer", lambda w: jw.batch_norm(w, mean=w[0], var=integers(w)[0]), T, FLOAT),
    ("batch of a scalar", lambda w: jw.batch_norm(w[0, 0], mean=w[0, 0], var=w[0, 0]), V, "x[None]"),
    ("stats of a scalar", lambda w: jw.batch_stats(w[0, 0]), V, "x[None]"),
    ("momentum 2", lambda w: jw.running_stats((w[0], w[0]), (w[0],) * 3, 2.0), V, "momentum must be in [0, 1]"),
    ("momentum string", lambda w: jw.running_stats((w[0], w[0]), (w[0],) * 3, "0.9"), T, NUMBER),
    ("running shapes", lambda w: jw.running_stats((w[0, :1],) * 2, (w[0],) * 3, 0.9), V, "one entry per feature"),
    ("batch without count", lambda w: jw.running_stats((w[0],) * 2, (w[0],) * 2, 0.9), V, "from batch_stats"),
    ("convention", lambda w: jw.running_stats((w[0],) * 2, (w[0],) * 3, convention="keras"), V, "'flax', 'torch', got"),
    ("merge two", lambda w: jw.merge_stats((w[0], w[0]), (w[0],) * 3), V, "a must be (mean, var, count)"),
    ("merge shapes", lambda w: jw.merge_stats((w[0],) * 3, (w[:, 0],) * 3), V, "pass statistics of one layer"),
    (
        "merge integers",
        lambda w: jw.merge_stats((w[0],) * 3, (w[0], w[0], integers(w)[0])),
        T,
        "the count of b must be",
    ),
    ("ghosts of 3", lambda w: jw.batch_norm(w, ghost_size=3), V, "ghost_size=3 must divide the first axis"),
    ("ghosts of 0", lambda w: jw.batch_stats(w, ghost_size=0), V, "ghost_size must be at least 1"),
    ("ghosts of a vector", lambda w: jw.batch_norm(w[0], ghost_size=2), V, "must divide the first axis"),
    ("ghosts and devices", lambda w: jw.batch_stats(w, ghost_size=2, axis_name="d"), V, "give one of them"),
    ("ghosts and mean", lambda w: jw.batch_norm(w, mean=w[0], var=w[0], ghost_size=2), V, "leave them out where"),
    (
        "renorm r_max",
        lambda w: jw.batch_renorm(w, mean=w[0], var=w[0], r_max=0.5, d_max=0.0),
        V,
        "at least 1",
    ),
    (
        "renorm d_max",
        lambda w: jw.batch_renorm(w, mean=w[0], var=w[0], r_max=1.0, d_max=-1.0),
        V,
        "at least 0",
    ),
    (
        "renorm mean",
        lambda w: jw.batch_renorm(w, mean=w, var=w[0], r_max=1.0, d_max=0.0),
        V,
        "mean must have shape (6,)",
    ),
    ("fold mean", lambda w: jw.fold_batch_norm(w, mean=w[:, 0], var=w[0]), V, "mean must have shape (6,)"),
    ("fold two outputs", lambda w: jw.fold_batch_norm(w, mean=w, var=w, axes=jw.Axes((), (0, 1))), V, "one output"),
    ("layer axis", lambda w: jw.layer_norm(w, axis=2), V, "axis must name axes of x (4, 6) from -2 to 1"),
    ("layer axis twice", lambda w: jw.layer_norm(w, axis=(1, -1)), V, "once each"),
    ("layer axis ()", lambda w: jw.rms_norm(w, axis=()), V, "axis must name axes of x (4, 6) from -2 to 1"),
    ("layer axis 1.5", lambda w: jw.layer_norm(w, axis=1.5), T, "name axes as in (0, 1)"),
    ("layer axis True", lambda w: jw.rms_norm(w, axis=True), T, "name axes as in (0, 1)"),
    ("layer of a scalar", lambda w: jw.layer_norm(w[0, 0]), V, "x[None]"),
    ("layer scale", lambda w: jw.layer_norm(w, w[:, 0]), V, "scale must have shape (6,)"),
    ("layer bias", lambda w: jw.layer_norm(w, None, w), V, "bias must have shape (6,)"),
    ("rms scale", lambda w: jw.rms_norm(w, w[:, 0], axis=(0, 1)), V, "scale must have shape (4, 6)"),
    ("group indivisible", lambda w: jw.group_norm(w, n_groups=4), V, "n_groups=4 does not divide the 6 features"),
    ("group 0", lambda w: jw.group_norm(w, n_groups=0), V, "n_groups must be at least 1"),
    ("group 2.0", lambda w: jw.group_norm(w, n_groups=2.0), T, INTEGER),
    ("group of a vector", lambda w: jw.group_norm(w[0], n_groups=2), V, "add a batch axis with x[None]"),
    ("group scale", lambda w: jw.group_norm(w, w[0, :2], n_groups=2), V, "scale must have shape (6,)"),
    ("instance without positions", lambda w: jw.instance_norm(w), V, "(batch, *positions, features)"),
    ("instance bias", lambda w: jw.instance_norm(w[None], None, w[:, 0]), V, "bias must have shape (6,)"),
    # States that belong to something else.
    ("no state", lambda w: jw.SpectralNorm().apply(w, {}), V, INIT),
    ("state None", lambda w: jw.ClipWeights(1.0).apply(w, None), T, "pass init(w, key)"),
    ("chain state None", lambda w: jw.Chain(jw.ClipWeights(1.0)).apply(w, None), T, "pass init(w, key)"),
    ("state shape", lambda w: jw.SpectralNorm().update(w, jw.SpectralNorm().init(w.T, KEY)), V, INIT),
    ("state shape, apply", lambda w: jw.SpectralNorm().apply(w, jw.SpectralNorm().init(w.T, KEY)), V, INIT),
    ("no scale", lambda w: jw.WeightNorm().apply(w, jw.SpectralNorm().init(w, KEY)), V, INIT),
    ("scale of the transpose", lambda w: jw.WeightNorm().apply(w, {"scale": w[:, 0]}), V, "scale must have shape"),
    ("no mask", lambda w: jw.Prune(0.5).apply(w, {}), V, INIT),
    ("mask shape", lambda w: jw.Prune(0.5).apply(w, {"mask": w[0] > 0}), V, INIT),
    ("index shape", lambda w: jw.ShareWeights(2).apply(w, {"index": integers(w)[0]}), V, INIT),
    ("schedule without state", lambda w: jw.ClipWeights(lambda s: 1.0).apply(w, {}), V, INIT),
    ("no centre", lambda w: AROUND.apply(w, {}), V, INIT),
    ("centre shape", lambda w: AROUND.update(w, {"center": w[0]}), V, INIT),
    ("schedule without step", lambda w: jw.ClipWeights(lambda s: 1.0).update(w, {}), V, INIT),
    ("pruning without step", lambda w: jw.Prune(lambda s: 0.5).update(w, {"mask": w > 0}), V, INIT),
    ("schedule of vectors", lambda w: jw.ClipWeights(lambda s: w[0]).init(w, KEY), V, SCALAR),
    ("schedule of None", lambda w: jw.Sparsify(lambda s: None).init(w, KEY), T, "value of the schedule threshold"),
    ("no apply", lambda w: Transform().apply(w, {}), T, "a transform is at least apply(w, state)"),
]

SPECS = [
    # Transforms, axes, indices and initializers refuse when they are made.
    ("ClipWeights < 0", lambda: jw.ClipWeights(-1.0), V, "limit must be at least 0, got -1.0"),
    ("ClipWeights NaN", lambda: jw.ClipWeights(math.nan), V, NAN),
    ("ClipWeights string", lambda: jw.ClipWeights("1"), T, NUMBER),
    ("ClipWeights vector", lambda: jw.ClipWeights(jnp.ones(3)), V, SCALAR),
    ("ClipNorm < 0", lambda: jw.ClipNorm(-1.0), V, "max_norm must be at least 0"),
    ("ClipNorm None", lambda: jw.ClipNorm(None), T, NUMBER),
    ("ClipSingularValues < 0", lambda: jw.ClipSingularValues(-1.0), V, "limit must be at least 0"),
    ("Orthogonalize gain", lambda: jw.Orthogonalize(gain="1"), T, NUMBER),
    ("Orthogonalize 0", lambda: jw.Orthogonalize(n_steps=0), V, "n_steps must be at least 1"),
    ("ClipRange NaN", lambda: jw.ClipRange(math.nan), V, NAN),
    ("ClipRange None", lambda: jw.ClipRange(None), T, NUMBER),
    ("ClipRange swapped", lambda: jw.ClipRange(1.0, 0.0), V, "swap them"),
    ("BoundNorm < 0", lambda: jw.BoundNorm(-1.0, 1.0), V, "low must be at least 0"),
    ("BoundNorm swapped", lambda: jw.BoundNorm(1.0, 0.0), V, "swap them"),
    ("BoundNorm rate", lambda: jw.BoundNorm(1.0, 1.0, -1.0), V, "rate must be in [0, 1], got -1.0"),
    ("Simplex < 0", lambda: jw.Simplex(-1.0), V, "total must be at least 0"),
    ("L1Ball NaN", lambda: jw.L1Ball(math.nan), V, NAN),
    ("Around 3", lambda: jw.Around(3), T, "Around needs a jaxweights.Transform, got int"),
    ("Around a class", lambda: jw.Around(jw.ClipWeights), T, "make an instance, ClipWeights(...)"),
    ("Sparsify < 0", lambda: jw.Sparsify(-1.0), V, "threshold must be at least 0"),
    ("Prune 1.5", lambda: jw.Prune(1.5), V, "sparsity must be in [0, 1], got 1.5"),
    ("Prune 50", lambda: jw.Prune(50), V, "sparsity must be in [0, 1], got 50"),
    ("Prune list", lambda: jw.Prune([0.5]), T, NUMBER),
    ("FakeQuantize 0", lambda: jw.FakeQuantize(0), V, "bits must be from 1 to 16, got 0"),
    ("FakeQuantize 33", lambda: jw.FakeQuantize(33), V, "bits must be from 1 to 16, got 33"),
    ("FakeQuantize 1.5", lambda: jw.FakeQuantize(1.5), T, INTEGER),
    ("FakeQuantize axes", lambda: jw.FakeQuantize(4, axes=jw.Axes()), V, "give per_unit=True too"),
    ("FakeQuantize True", lambda: jw.FakeQuantize(True), T, INTEGER),
    ("SpectralNorm 0", lambda: jw.SpectralNorm(0), V, "n_steps must be at least 1"),
    ("SpectralNorm 1.0", lambda: jw.SpectralNorm(1.0), T, INTEGER),
    ("ShareWeights 0", lambda: jw.ShareWeights(0), V, "n must be from 1 to"),
    ("ShareWeights seed", lambda: jw.ShareWeights(2, seed=-1), V, "seed must be at least 0"),
    ("Chain()", lambda: jw.Chain(), V, "Chain(t1, t2, ...)"),
    ("Chain(3)", lambda: jw.Chain(3), T, "Chain needs a jaxweights.Transform, got int"),
    ("Chain([...])", lambda: jw.Chain([jw.ClipWeights(1.0)]), T, "Chain needs a jaxweights.Transform, got list"),
    ("Chain of a class", lambda: jw.Chain(jw.SpectralNorm), T, "make an instance, SpectralNorm(...)"),
    ("Axes 1.5", lambda: jw.Axes(input=1.5), T, "name axes as in (0, 1)"),
    ("Axes string", lambda: jw.Axes(output="out"), T, "name axes as in (0, 1)"),
    ("Axes True", lambda: jw.Axes(batch=True), T, "name axes as in (0, 1)"),
    ("Axes None", lambda: jw.Axes(input=None), T, "name axes as in (0, 1)"),
    ("groups 0", lambda: jw.Axes(groups=0), V, "groups must be at least 1"),
    ("groups 2.0", lambda: jw.Axes(groups=2.0), T, INTEGER),
    ("stacked at -1", lambda: jw.Axes().stacked(-1), V, "axis must be at least 0"),
    ("stacked at '0'", lambda: jw.Axes().stacked("0"), T, INTEGER),
    ("stacked from the front", lambda: jw.Axes(0, 1).stacked(), V, "counted from the end (negative)"),
    ("fans of an integer", lambda: jw.fans(5), T, SHAPE),
    ("fans of floats", lambda: jw.fans((2.0, 3)), T, INTEGER),
    ("fans < 0", lambda: jw.fans((-1, 3)), V, "each size in shape must be at least 0"),
    ("fans with a tuple", lambda: jw.fans((2, 3), (0, 1)), T, WRITE_AXES),
    *(
        (f"{name} {what}", lambda name=name, args=args: getattr(jw, name)(KEY, *args), error, remedy)
        for name in ("xavier_normal", "xavier_uniform", "he_normal", "he_uniform", "lecun_normal", "lecun_uniform")
        for what, args, error, remedy in [
            ("dtype int", ((2, 3), int), T, "use jnp.float32"),
            ("dtype complex", ((2, 3), jnp.complex64), T, "use jnp.float32"),
            ("dtype None", ((2, 3), None), T, "use jnp.float32"),
            ("without inputs", ((0, 3),), V, "a weight without inputs has no scale"),
            ("shape 3", (3,), T, SHAPE),
        ]
    ),
    ("initializer axes", lambda: jw.he_normal(KEY, (2, 3), axes=jw.Axes(2)), V, "use axes from -2 to 1"),
    ("conv channels", lambda: jw.conv_index((3, 3, 2, 4), (8, 8, 3)), V, "(*window, in, out) and (*space, in)"),
    ("conv ranks", lambda: jw.conv_index((3, 2, 4), (8, 8, 2)), V, "(*window, in, out) and (*space, in)"),
    ("conv of too little", lambda: jw.conv_index((3,), ()), V, "(*window, in, out) and (*space, in)"),
    ("conv shape 3", lambda: jw.conv_index(3, (8, 1)), T, SHAPE),
    ("conv floats", lambda: jw.conv_index((3.0, 1, 1), (8, 1)), T, INTEGER),
    ("conv padding", lambda: jw.conv_index((3, 1, 1), (8, 1), padding="FULL"), V, '"SAME", "VALID" or'),
    ("conv padding 1", lambda: jw.conv_index((3, 1, 1), (8, 1), padding=1), V, "(before, after) for each"),
    ("conv padding [1]", lambda: jw.conv_index((3, 1, 1), (8, 1), padding=[1]), V, "(before, after) for each"),
    ("conv paddings", lambda: jw.conv_index((3, 1, 1), (8, 1), padding=[(1, 1)] * 2), V, "each of 1 axes"),
    ("conv padding .5", lambda: jw.conv_index((3, 1, 1), (8, 1), padding=[(0.5, 1)]), V, "must be integers"),
    ("conv stride 0", lambda: jw.conv_index((3, 1, 1), (8, 1), strides=0), V, "strides must be at least 1"),
    ("conv stride 1.5", lambda: jw.conv_index((3, 1, 1), (8, 1), strides=1.5), T, INTEGER),
    ("conv strides", lambda: jw.conv_index((3, 1, 1), (8, 1), strides=(1, 1)), V, "or one per axis"),
    ("conv too wide", lambda: jw.conv_index((9, 1, 1), (8, 1), padding="VALID"), V, "does not fit in (8,)"),
    ("hash of 0", lambda: jw.hash_index((3,), 0), V, "n must be from 1 to"),
    ("hash of 2.0", lambda: jw.hash_index((3,), 2.0), T, INTEGER),
    ("hash shape", lambda: jw.hash_index(3, 2), T, SHAPE),
    ("hash seed", lambda: jw.hash_index((3,), 2, seed="0"), T, INTEGER),
    ("no such name", lambda: jw.keras, AttributeError, "module 'jaxweights' has no attribute 'keras'"),
]


LEVELS = [
    # Trees.
    ("fold no such norm", lambda: jw.fold_batch_norms(DENSE_NORM, NORM_STATS, {"m": "a"}), V, "There are: n"),
    ("fold no such layer", lambda: jw.fold_batch_norms(DENSE_NORM, NORM_STATS, {"n": "b"}), V, "Kernels are at: a"),
    ("fold leaves out", lambda: jw.fold_batch_norms(DENSE_NORM, NORM_STATS, {}), V, "name the layer before each"),
    ("fold pairs", lambda: jw.fold_batch_norms(DENSE_NORM, NORM_STATS, [("n", "a")]), T, "{batch norm: layer}"),
    ("on_tree of a function", lambda: lift(jnp.abs), T, "on_tree needs a jaxweights.Transform"),
    ("on_tree of a class", lambda: lift(jw.SpectralNorm), T, "make an instance, SpectralNorm(...)"),
    ("on_tree of None", lambda: lift(None), T, "on_tree needs a jaxweights.Transform, got NoneType"),
    ("rules {}", lambda: lift({}), V, EMPTY),
    ("rules with a bad key", lambda: lift({3: clip}), T, "must be {glob: transform}, got the key 3"),
    ("rules with a class", lambda: lift({"**": jw.WeightNorm}), T, "make an instance, WeightNorm(...)"),
    ("a rule for nothing", lambda: lift({"**/w": clip}), V, PATHS),
    ("where a glob", lambda: lift(norm, "kernel"), V, PATHS),
    ("where one bad glob", lambda: lift(norm, ["**/kernel", "**/w"]), V, "where='**/w' selects no weight"),
    ("where a predicate", lambda: lift(norm, lambda p, a: a.ndim > 2), V, PATHS),
    ("where []", lambda: lift(norm, []), T, WHERE),
    ("where [3]", lambda: lift(norm, [3]), T, WHERE),
    ("biases only", lambda: lift(norm, None, BIASES), V, "tree are: encoder/bias (6,)"),
    ("no tree", lambda: lift(norm, None, None), V, "The floating-point arrays of this tree are: none"),
    ("integers only", lambda: lift(norm, None, tree(integers(W))), V, "tree are: none"),
    ("tree axes", lambda w: jw.on_tree(narrow).apply(tree(w), NO_STATE), V, at("ClipNorm", "axes names")),
    ("tree axes, init", lambda w: lift(jw.SpectralNorm(axes=beyond), None, tree(w)), V, at(SN, "axes names")),
    ("bias by 2-D axes", lambda: lift(jw.WeightNorm(jw.Axes()), "**"), V, "WeightNorm at 'encoder/bias': axes names"),
    ("cluster size 0", lambda w: lift(jw.ShareWeights(2), None, tree(w[:, :0])), V, at("ShareWeights", "w of shape")),
    ("chain at", lambda: lift(jw.Chain(jw.SpectralNorm(axes=beyond))), V, at("Chain", "axes names")),
    ("state missing", lambda w: SPECTRAL.apply(tree(w), NO_STATE), V, at(SN, "the state has no 'u'")),
    ("scale missing", lambda w: NORM.apply(tree(w), NO_STATE), V, at("WeightNorm", "the state has no 'scale'")),
    ("tree state shape", lambda w: SPECTRAL.apply(tree(w), OTHER_STATE), V, at(SN, "the state has 'u' of shape (2,)")),
    ("tree update", lambda w: SPECTRAL.update(tree(w), OTHER_STATE), V, at(SN, "the state has 'u' of shape (2,)")),
    ("tree scale", lambda w: NORM.apply(tree(w), NORM.init(tree(w.T), KEY)), V, at("WeightNorm", "scale must have")),
    ("foreign state", lambda w: SPECTRAL.apply(tree(w), HEAD_STATE), V, "'head'"),
    ("foreign state, update", lambda w: SPECTRAL.update(tree(w), HEAD_STATE), V, "'head'"),
    ("state no TreeState", lambda w: CLIP.apply(tree(w), {}), T, "must be the TreeState that init returned"),
    ("tie a path not there", lambda: jw.tie(PARAMS, {"head": "encoder/kernel"}), V, LEAVES),
    ("tie to a path not there", lambda: jw.tie(PARAMS, {"encoder/kernel": "head"}), V, LEAVES),
    ("tie shapes", lambda: jw.tie(PARAMS, {"encoder/kernel": "encoder/bias"}), V, ONE_SHAPE),
    ("tie dtypes", lambda: jw.tie({"a": W, "b": integers(W)}, {"a": "b"}), V, ONE_SHAPE),
    ("tie a chain", lambda: jw.tie({"a": W, "b": W, "c": W}, {"a": "b", "b": "c"}), V, "name the last one"),
    ("tie to itself", lambda: jw.tie({"a": W}, {"a": "a"}), V, "name the last one"),
    ("tie nothing", lambda: jw.tie(PARAMS, {}), V, "give {path: path}"),
    ("tie a list", lambda: jw.tie(PARAMS, [("a", "b")]), T, "must be a dict {path: path}"),
    ("redraw by nothing", lambda: redraw({}), V, "give {glob: initializer}"),
    ("redraw by a function", lambda: redraw(jw.he_normal), T, "must be a dict {glob: initializer}"),
    ("redraw by a number", lambda: redraw({"**": 0.0}), T, "(key, shape, dtype) -> array"),
    ("redraw by bad keys", lambda: redraw({3: jw.he_normal}), T, "write it as a string"),
    ("redraw no weight", lambda: redraw({"**/w": jw.he_normal}), V, PATHS),
    ("redraw shape", lambda: redraw(drawing((2, 2))), V, at("reinitialize", "the initializer returned float32[2, 2]")),
    ("redraw dtype", lambda: redraw(drawing(dtype=jnp.int32)), V, at("reinitialize", "the initializer returned int32")),
    ("redraw by a factory", lambda: redraw({"**": jax.nn.initializers.he_normal}), T, "call it first"),
    ("redraw without inputs", lambda: redraw(HE, tree(W[:, :0])), V, at("reinitialize", "shape (4, 0)")),
    # Optax.
    ("project without params", lambda: step(project, PARAMS, None), V, UPDATE),
    ("project a class", lambda: jw.project(jw.ClipWeights), T, "make an instance, ClipWeights(...)"),
    ("project rules {}", lambda: jw.project({}), V, EMPTY),
    ("project nothing", lambda: jw.project(clip).init(BIASES), V, "selects no weight"),
    ("project tree", lambda w: step(project, tree(w, "head"), PARAMS), V, GRADIENTS),
    ("project shapes", lambda w: step(project, tree(w[:2]), PARAMS), V, GRADIENTS),
    ("project axes", lambda: step(jw.project(narrow), PARAMS, PARAMS), V, at("ClipNorm", "axes names")),
    ("project state", lambda w: step(jw.project(spectral), tree(w), tree(w), OTHER), V, at(SN, "the state has 'u'")),
    ("rate < 0, optax", lambda: jw.add_weight_decay(-0.1), V, "rate must be at least 0"),
    ("rate NaN, optax", lambda: jw.add_weight_decay(math.nan), V, NAN),
    ("rate string, optax", lambda: jw.add_weight_decay("0.1"), T, NUMBER),
    ("rate vector, optax", lambda: jw.add_weight_decay(jnp.ones(2)), V, SCALAR),
    ("rate of vectors", lambda w: step(jw.add_weight_decay(lambda s: w[0]), tree(w), tree(w)), V, SCALAR),
    ("decay without params", lambda: step(decay, PARAMS, None), V, UPDATE),
    ("decay nothing", lambda: jw.add_weight_decay(0.1).init(BIASES), V, "selects no weight"),
    ("decay no glob", lambda: jw.add_weight_decay(0.1, "**/w").init(PARAMS), V, PATHS),
    ("decay tree", lambda w: step(decay, tree(w, "head"), PARAMS), V, GRADIENTS),
    ("decay tree shapes", lambda w: step(decay, tree(w[:2]), PARAMS), V, GRADIENTS),
    ("penalty by name, optax", lambda: jw.add_weight_decay(0.1, penalty_grad="l1"), T, "pass jnp.sign for L1"),
    (
        "toward another tree",
        lambda: jw.add_weight_decay(0.1, toward=HEAD["head"]).init(PARAMS),
        V,
        TOWARD.format("missing"),
    ),
    ("toward shapes", lambda: jw.add_weight_decay(0.1, toward=OTHER).init(PARAMS), V, TOWARD.format("of shape (2, 6)")),
    # Linen.
    ("linen class", lambda: linen(jw.ClipWeights), T, "make an instance, ClipWeights(...)"),
    ("linen rules {}", lambda: linen({}), V, EMPTY),
    ("linen where", lambda: linen(clip, "**/w"), V, FLAX_PATHS),
    ("linen axes", lambda: linen(jw.SpectralNorm(axes=beyond)), V, f"{SN} at 'kernel': axes names input axis 2"),
    ("linen twice", lambda: linen(clip, None, jw.linen.Transformed(nn.Dense(3), clip)), V, CHAIN_LINEN),
    ("linen without state", lambda: linen_apply(spectral, {"params": DENSE}), V, COLLECTIONS),
    ("linen without scale", lambda: linen_apply(norm, {"params": DENSE}), V, COLLECTIONS),
    ("linen without mask", lambda: linen_apply(prune, {"params": DENSE}), V, "Prune at 'kernel': the state has no"),
    ("linen state shape", lambda: linen_apply(prune, OLD_MASK), V, "Prune at 'kernel': the state has 'mask' of"),
    ("linen norm twice told", lambda: jw.linen.BatchNorm(False).init(KEY, x, True), V, "use_running_average"),
    ("linen norm mask", lambda: jw.linen.BatchNorm(False).init(KEY, x, mask=x), T, "compare it with a number"),
    ("linen norm features", lambda: linen_norm({"mean": x[0], "var": x[0]}, True), V, "mean must have shape (6,)"),
    ("linen norm features, train", lambda: linen_norm({"mean": x[0], "var": x[0]}), V, "one entry per feature"),
    ("linen norm momentum", lambda: linen_norm({"mean": W[0], "var": W[0]}, momentum=2.0), V, "must be in [0, 1]"),
    ("linen norm eps", lambda: jw.linen.BatchNorm(False, epsilon=-1.0).init(KEY, x), V, "eps must be at least 0"),
    ("linen layer axis", lambda: jw.linen.LayerNorm(reduction_axes=5).init(KEY, x), V, "axis must name axes of x"),
    ("linen layer integers", lambda: jw.linen.LayerNorm().init(KEY, integers(x)), T, FLOAT),
    ("linen layer eps", lambda: jw.linen.LayerNorm(epsilon="0").init(KEY, x), T, NUMBER),
    # NNX.
    ("nnx of Linen", lambda: jw.nnx.transformed(nn.Dense(3), clip), T, "Linen has linen.Transformed"),
    ("nnx of a function", lambda: jw.nnx.transformed(jnp.abs, clip), T, "module must be an nnx.Module"),
    ("nnx class", lambda: jw.nnx.transformed(dense(), jw.ClipWeights), T, "make an instance, ClipWeights(...)"),
    ("nnx rules {}", lambda: jw.nnx.transformed(dense(), {}), V, EMPTY),
    ("nnx where", lambda: jw.nnx.transformed(dense(), clip, "**/w"), V, FLAX_PATHS),
    ("nnx axes", lambda: jw.nnx.transformed(dense(), jw.SpectralNorm(axes=beyond)), V, f"{SN} at 'kernel': axes names"),
    ("nnx twice", lambda: jw.nnx.transformed(jw.nnx.transformed(dense(), clip), clip), V, CHAIN_NNX),
    ("nnx norm features", lambda: jw.nnx.BatchNorm(3)(x), V, "one entry per feature"),
    ("nnx norm one feature", lambda: jw.nnx.BatchNorm(1)(x), V, "one entry per feature"),
    ("nnx norm features, eval", lambda: jw.nnx.BatchNorm(3, use_running_average=True)(x), V, "must have shape (4,)"),
    ("nnx norm momentum", lambda: jw.nnx.BatchNorm(4, momentum=-1)(x), V, "momentum must be in [0, 1]"),
    ("nnx norm eps", lambda: jw.nnx.BatchNorm(4, epsilon=-1)(x), V, "eps must be at least 0"),
    ("nnx norm convention", lambda: jw.nnx.BatchNorm(4, convention="keras")(x), V, "convention must be one of"),
    ("nnx norm renorm", lambda: jw.nnx.BatchNorm(4, renorm=3.0)(x), V, "renorm must be (r_max, d_max)"),
    ("nnx norm both", lambda: jw.nnx.BatchNorm(4, renorm=(3.0, 5.0), ghost_size=2)(x), V, "give one of them"),
    ("nnx norm mask", lambda: jw.nnx.BatchNorm(4)(x, mask=x[:, 0] > 0), V, "add axes with [..., None]"),
    ("nnx layer features", lambda: jw.nnx.LayerNorm(3)(x), V, "scale must have shape (4,)"),
    ("nnx layer axes", lambda: jw.nnx.LayerNorm(4, reduction_axes=(0, 2))(x), V, "axis must name axes of x (2, 4)"),
    ("nnx layer integers", lambda: jw.nnx.LayerNorm(4)(integers(x)), T, FLOAT),
    ("where 3", lambda: lift(norm, 3), T, WHERE),
    ("state missing, update", lambda w: SPECTRAL.update(tree(w), NO_STATE), V, at(SN, "the state has no 'u'")),
    ("grads of another tree", lambda w: SPECTRAL.update(tree(w), STATE, {"head": w}), V, "'head'"),
    ("grads of another shape", lambda w: SPECTRAL.update(tree(w), STATE, OTHER), V, "'encoder/kernel'"),
    ("decay integers", lambda w: step(decay, tree(integers(w)), PARAMS), T, at("add_weight_decay", "grad must be")),
    ("linen of a module class", lambda: linen(clip, None, nn.Dense), T, "make an instance, Dense(...)"),
    ("linen of an NNX module", lambda: linen(clip, None, dense()), T, "nnx.transformed"),
    ("linen norm list", lambda: jw.linen.BatchNorm(False).init(KEY, [1.0]), T, ARRAY),
    ("linen norm of a scalar", lambda: jw.linen.BatchNorm(False).init(KEY, x[0, 0]), V, "x[None]"),
    ("nnx norm of a scalar", lambda: jw.nnx.BatchNorm(4)(x[0, 0]), V, "x[None]"),
    ("linen layer axis 1.5", lambda: jw.linen.LayerNorm(reduction_axes=1.5).init(KEY, x), T, "name axes as in (0, 1)"),
    ("linen layer of a scalar", lambda: jw.linen.LayerNorm().init(KEY, x[0, 0]), V, "x[None]"),
    ("linen layer list", lambda: jw.linen.LayerNorm().init(KEY, [1.0]), T, ARRAY),
    ("nnx of a module class", lambda: jw.nnx.transformed(nnx.Linear, clip), T, "make an instance, Linear(...)"),
    ("nnx rngs a key", lambda: jw.nnx.transformed(dense(), clip, rngs=KEY), T, "rngs must be an nnx.Rngs"),
    ("nnx norm size '4'", lambda: jw.nnx.BatchNorm("4"), T, INTEGER),
    ("nnx norm size -1", lambda: jw.nnx.BatchNorm(-1), V, "each size in num_features must be at least 0"),
    ("nnx layer size 1.5", lambda: jw.nnx.LayerNorm(1.5), T, INTEGER),
]

CASES = ARRAYS + SPECS + LEVELS
TRACED = [case for case in CASES if inspect.signature(case[1]).parameters.get("w")]


def parametrized(cases):
    return pytest.mark.parametrize(("function", "error", "remedy"), [pytest.param(*c[1:], id=c[0]) for c in cases])


def check(function, error, remedy):
    """It raises exactly `error`, not a subclass, and says `remedy`."""
    with pytest.raises(error) as info:
        function()
    assert type(info.value) is error
    assert remedy in str(info.value)


@parametrized(CASES)
def test_error_names_the_remedy(function, error, remedy):
    check((lambda: function(W)) if "w" in inspect.signature(function).parameters else function, error, remedy)


@parametrized(TRACED)
def test_error_is_the_same_under_jit(function, error, remedy):
    check(lambda: jax.jit(lambda w: function(w))(W), error, remedy)


def test_ids_are_unique():
    names = [case[0] for case in CASES]
    assert sorted(set(names)) == sorted(names)


def test_every_public_name_has_a_case():
    table = Path(__file__).read_text().partition("\nARRAYS = [")[2].partition("\nCASES = ")[0]
    without = {"QuantizedArray", "TreeTransform"}  # made by quantize and on_tree
    assert {name for name in jw.__all__ if not re.search(rf"\b{name}\b", table)} == without


SCHEDULED = (
    *(jw.ClipWeights, jw.ClipNorm, jw.ClipRange, jw.ClipSingularValues),
    *(jw.Simplex, jw.L1Ball, jw.Orthogonalize, jw.Sparsify, jw.Prune),
)
NUMBERS = {
    "clip_weights": jw.clip_weights,
    "clip_norm": jw.clip_norm,
    "clip_range": lambda w, n: jw.clip_range(w, -n, n),
    "bound_norm": lambda w, n: jw.bound_norm(w, n, n, rate=n),
    "project_simplex": jw.project_simplex,
    "project_l1_ball": jw.project_l1_ball,
    "clip_singular_values": jw.clip_singular_values,
    "orthogonalize": lambda w, n: jw.orthogonalize(w[:, :3], gain=n),
    "sparsify": jw.sparsify,
    "magnitude_mask": jw.magnitude_mask,
    "weight_decay": lambda w, n: jw.weight_decay(w, w, n),
    "batch_norm": lambda w, n: jw.batch_norm(w, eps=n),
    "layer_norm": lambda w, n: jw.layer_norm(w, eps=n),
    "rms_norm": lambda w, n: jw.rms_norm(w, eps=n),
    "group_norm": lambda w, n: jw.group_norm(w, n_groups=2, eps=n),
    "fold_batch_norm": lambda w, n: jw.fold_batch_norm(w, mean=w[0], var=w[0], eps=n)[1],
    "running_stats": lambda w, n: jw.running_stats((w[0], w[0]), (w[1], w[1], w[1]), n)[0],
    **{t.__name__: lambda w, n, t=t: applied(t(n), w) for t in SCHEDULED},
}


def applied(transform, w):
    lifted = jw.on_tree(transform)
    state = lifted.update(tree(w), lifted.init(tree(w), KEY))
    return lifted.apply(tree(w), state)["encoder"]["kernel"]


@pytest.mark.parametrize("name", NUMBERS)
def test_hyper_parameters_may_be_arrays_traced_or_not(name):
    expected = NUMBERS[name](W, 0.25)
    for number in (np.float32(0.25), np.array(0.25, np.float32), jnp.array(0.25)):
        np.testing.assert_allclose(NUMBERS[name](W, number), expected, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(NUMBERS[name])(W, 0.25), expected, rtol=1e-6)


@pytest.mark.parametrize("name", [t.__name__ for t in SCHEDULED])
@pytest.mark.parametrize(
    "schedule",
    [lambda step: 0.25, lambda step: np.float32(0.25), lambda step: 0 * step + 0.25, optax.constant_schedule(0.25)],
    ids=["float", "numpy", "array", "optax"],
)
def test_hyper_parameters_may_be_schedules(name, schedule):
    expected = NUMBERS[name](W, 0.25)
    np.testing.assert_allclose(NUMBERS[name](W, schedule), expected, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(lambda w: NUMBERS[name](w, schedule))(W), expected, rtol=1e-6)


def test_injected_hyper_parameters_pass():
    tx = optax.inject_hyperparams(jw.add_weight_decay)(rate=optax.constant_schedule(0.25))
    updates, _ = jax.jit(lambda w: step(tx, tree(w), tree(w)))(W)
    np.testing.assert_allclose(updates["encoder"]["kernel"], 1.25 * W)


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.uint8, jnp.int16, jnp.uint32])
def test_indices_of_every_integer_dtype_pass(dtype):
    codebook = jnp.arange(200.0)
    np.testing.assert_array_equal(jw.share(codebook, jnp.array([0, 100], dtype)), [0, 100])


@pytest.mark.parametrize("seed", [0, 7, 2**64 + 7])
def test_hash_seeds_of_every_size_pass(seed):
    np.testing.assert_array_equal(jw.hash_index((50,), 5, seed), jw.hash_index((50,), 5, seed % 2**64))
