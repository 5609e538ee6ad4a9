"""Batch norms in traced programs: which layer each can be folded into, and why not; the folded model is the model."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from x64 import enable_x64

import jaxweights as jw

KEY = jax.random.key(0)
X = np.float32(np.random.default_rng(0).normal(size=(2, 7, 7, 4)))


def norm(name, **options):
    return nn.BatchNorm(use_running_average=True, name=name, **options)


def random(tree, dtype=jnp.float64):
    """The tree with random numbers away from 0."""
    leaves, structure = jax.tree.flatten(tree)
    rng = np.random.default_rng(1)
    return structure.unflatten(
        [jnp.asarray(rng.uniform(0.3, 1.3, a.shape) * rng.choice([-1, 1]), dtype) for a in leaves]
    )


class ResNet(nn.Module):
    """Blocks with and without a projection, as in Flax's examples, and a norm without a scale."""

    norm: Any = nn.BatchNorm

    @nn.compact
    def __call__(self, x, train: bool = True):
        def normed(x, name, **options):
            return self.norm(use_running_average=not train, name=f"{name}_norm", epsilon=1e-3, **options)(x)

        x = nn.relu(normed(nn.Conv(6, (3, 3), use_bias=False, name="stem")(x), "stem"))
        for i, stride in enumerate((1, 2)):
            y = nn.relu(normed(nn.Conv(6, (3, 3), (stride, stride), name=f"a{i}")(x), f"a{i}", use_scale=False))
            y = normed(nn.Conv(6, (3, 3), use_bias=False, name=f"b{i}")(y), f"b{i}", use_bias=i == 0)
            if stride != 1:
                x = normed(nn.Conv(6, (1, 1), (2, 2), use_bias=False, name=f"c{i}")(x), f"c{i}")
            x = nn.relu(x + y)
        return nn.Dense(3, name="head")(x.mean((1, 2)))


class Kinds(nn.Module):
    """Kinds of layers before a norm. The transposed convolution is square: its shape does not tell how it is read."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(norm("n0")(nn.Conv(4, (3, 3), name="conv")(x)))
        x = nn.relu(norm("n1")(nn.Conv(4, (3, 3), feature_group_count=4, use_bias=False, name="depthwise")(x)))
        x = nn.relu(norm("n2", epsilon=0.1)(nn.ConvTranspose(4, (3, 3), transpose_kernel=True, name="square")(x)))
        x = nn.relu(norm("n3")(nn.ConvTranspose(4, (2, 2), (2, 2), use_bias=False, name="transposed")(x)))
        x = norm("n4")(nn.Dense(5, name="dense")(x.reshape(len(x), -1)))
        return jw.linen.BatchNorm(True, epsilon=0.0, name="n5")(nn.Dense(1, use_bias=False, name="one")(nn.tanh(x)))


class After(nn.Module):
    """Norms behind a nonlinearity: the layer after them takes them. The last convolution has a norm on each side."""

    @nn.compact
    def __call__(self, x):
        x = norm("n0", epsilon=0.5)(nn.relu(nn.Conv(4, (3, 3), name="a")(x)))
        x = norm("n1")(nn.relu(nn.Conv(6, (3, 3), padding="VALID", feature_group_count=2, name="grouped")(x)))
        x = nn.relu(norm("n2", use_scale=False)(nn.Conv(3, (2, 2), (2, 2), padding="VALID", name="both")(x)))
        x = jw.linen.BatchNorm(True, name="n3")(x.mean((1, 2)) ** 2)
        return nn.Dense(2, name="head")(x)


class Step(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        y = norm("n0")(nn.remat(nn.Dense)(6, use_bias=False, name="inner")(x))
        y = norm("n1")(nn.tanh(y))
        return x + nn.Dense(4, name="outer")(y), None


class Stack(nn.Module):
    """A scan over layers, with a norm on either side."""

    @nn.compact
    def __call__(self, x):
        scan = nn.scan(Step, variable_axes={"params": 0, "batch_stats": 0}, split_rngs={"params": True}, length=3)
        return scan(name="stack")(x, None)[0]


AFTER = {"n0": ("grouped", True), "n1": ("both", True), "n2": ("both", False), "n3": ("head", True)}
BEFORE = {"n0": "conv", "n1": "depthwise", "n2": "square", "n3": "transposed", "n4": "dense", "n5": "one"}
MODELS = {
    "residual": (ResNet(), {f"{n}_norm": (n, False) for n in ("stem", "a0", "b0", "a1", "b1", "c1")}),
    "residual, ours": (
        ResNet(jw.linen.BatchNorm),
        {f"{n}_norm": (n, False) for n in ("stem", "a0", "b0", "a1", "b1", "c1")},
    ),
    "kinds": (Kinds(), {n: (layer, False) for n, layer in BEFORE.items()}),
    "after": (After(), AFTER),
    "stack": (Stack(), {"stack/n0": ("stack/inner", False), "stack/n1": ("stack/outer", True)}),
}


@pytest.mark.parametrize(("model", "expected"), MODELS.values(), ids=MODELS)
def test_the_unmodified_model_computes_the_same_on_what_is_folded(model, expected):
    options = {"train": False} if isinstance(model, ResNet) else {}
    with enable_x64(True):
        shapes = jax.eval_shape(lambda: model.init(KEY, jnp.float64(X), **options))
        folds = jw.linen.norm_folds(model, shapes, jax.ShapeDtypeStruct(X.shape, jnp.float64), **options)
        assert {n: (fold.layer, fold.follows) for n, fold in folds.items()} == expected
        variables = random(shapes)
        variables["batch_stats"] = jax.tree.map(abs, variables["batch_stats"])
        params, stats = jw.fold_batch_norms(variables["params"], variables["batch_stats"], folds, keep_norms=True)
        f = jax.jit(lambda v: model.apply(v, jnp.float64(X), **options))
        before, after = f(variables), f({"params": params, "batch_stats": stats})
    assert jax.tree.structure(variables["params"]) == jax.tree.structure(params)
    np.testing.assert_allclose(after, before, rtol=1e-9, atol=1e-9 * np.abs(before).max())
    for path, entry in ((n, stats) for n in folds):
        for name in path.split("/"):
            entry = entry[name]
        np.testing.assert_allclose(np.asarray(entry["var"]) + folds[path].eps, 1, rtol=1e-7)


def test_a_model_without_norms_computes_the_same_on_what_is_folded():
    with enable_x64(True):
        model, x = After(), jnp.float64(X)
        variables = random(jax.eval_shape(model.init, KEY, x))
        variables["batch_stats"] = jax.tree.map(abs, variables["batch_stats"])
        folds = jw.linen.norm_folds(model, variables, x)
        params = jw.fold_batch_norms(variables["params"], variables["batch_stats"], folds)

        def skip_norms(call, args, kwargs, context):
            is_norm = isinstance(context.module, nn.BatchNorm | jw.linen.BatchNorm)
            return args[0] if is_norm else call(*args, **kwargs)

        before = jax.jit(model.apply)(variables, x)
        with nn.intercept_methods(skip_norms):
            after = jax.jit(lambda p: model.apply({"params": p}, x))(params)
    assert set(params) == {"a", "grouped", "both", "head"}
    np.testing.assert_allclose(after, before, rtol=1e-9, atol=1e-9 * np.abs(before).max())


WEIGHTS = {
    "a": {"kernel": (4, 3), "bias": (3,)},
    "b": {"kernel": (3, 3), "bias": (3,)},
    "n": {"scale": (3,), "bias": (3,)},
    "m": {},
}
SHAPES = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, jnp.float32), WEIGHTS, is_leaf=lambda s: isinstance(s, tuple))
STAT = jax.ShapeDtypeStruct((3,), jnp.float32)
STATS = {"n": {"mean": STAT, "var": STAT}}
BATCH = jax.ShapeDtypeStruct((5, 4), jnp.float32)


def dense(x, p):
    return x @ p["kernel"] + p["bias"]


def flax(x, p, s):
    return (x - s["mean"]) * (jax.lax.rsqrt(s["var"] + 1e-3) * p["scale"]) + p["bias"]


def keras(x, p, s):
    inverse = jax.lax.rsqrt(s["var"] + 1e-3) * p["scale"]
    return x * inverse + (p["bias"] - s["mean"] * inverse)


def torch(x, p, s):
    return p["bias"] + p["scale"] * ((x - s["mean"]) / jnp.sqrt(s["var"] + 1e-3))


def in_order(x, p, s):
    return p["bias"] - (s["mean"] - x) / (s["var"] + 1e-3) ** 0.5 * p["scale"]


@pytest.mark.parametrize("norm", [flax, keras, torch, in_order])
def test_a_norm_is_known_however_it_is_written(norm):
    def before(p, s, x):
        return jax.nn.relu(norm(dense(x, p["a"]), p["n"], s["n"]))

    def after(p, s, x):
        return jnp.concatenate([dense(norm(jnp.sin(x[:, :3]), p["n"], s["n"]).astype(x.dtype), p["b"])])

    assert jw.norm_folds(before, SHAPES, STATS, BATCH)["n"] == jw.Fold("a", False, jw.Axes((0,), (1,)), 1e-3)
    assert jw.norm_folds(after, SHAPES, STATS, BATCH)["n"] == jw.Fold("b", True, jw.Axes((0,), (1,)), 1e-3)


def twice(p, norm, x):
    return norm(dense(jnp.sin(norm(dense(x, p["b"]))), p["b"]))


def in_a_loop(p, norm, x):
    return jax.lax.fori_loop(0, 3, lambda i, x: 2 * dense(norm(jnp.sin(x)), p["b"]), x)


def in_a_scan(p, norm, x):
    return jax.lax.scan(lambda x, _: (jnp.sin(norm(dense(x, p["b"]))), None), x, length=3)[0]


def in_a_branch(p, norm, x):
    y = dense(x, p["b"])
    return jax.lax.cond(x.sum() > 0, lambda: norm(y), lambda: jnp.zeros_like(y))


@pytest.mark.parametrize(
    ("f", "follows"), [(twice, False), (in_a_loop, True), (in_a_scan, False), (in_a_branch, False)]
)
def test_a_layer_and_a_norm_that_are_shared_are_folded_once(f, follows):
    with enable_x64(True):
        params, stats = random(SHAPES), jax.tree.map(abs, random(STATS))
        x = jnp.float64(X[0, 0, :, :3])
        folds = jw.norm_folds(normed(f), params, stats, x)
        assert folds["n"][:2] == ("b", follows)
        new = jw.fold_batch_norms(params, stats, folds, keep_norms=True)
        before, after = (normed(f)(*trees, x) for trees in ((params, stats), new))
    assert not np.allclose(new[0]["b"]["kernel"], params["b"]["kernel"])
    np.testing.assert_allclose(after, before, rtol=1e-10)


def test_a_layer_and_a_norm_of_different_loops_are_not_folded():
    """Each layer of the stack meets every norm of the other stack."""
    params, stats = jax.tree.map(lambda a: jax.ShapeDtypeStruct((3, *a.shape), a.dtype), (SHAPES, STATS))

    def f(p, s, x):
        def outer(x, b):
            return jax.lax.scan(lambda x, n: (jnp.sin(flax(dense(x, b), *n)), None), x, (p["n"], s["n"]))[0], None

        return jax.lax.scan(outer, x, p["b"])[0]

    fold = jw.norm_folds(f, params, stats, jax.ShapeDtypeStruct((5, 3), jnp.float32))["n"]
    assert fold.layer is None
    assert NO_LAYER in fold.why


def normed(f):
    """A function of the parameters, of the norm and of the data, to which no norm is to be folded."""
    return lambda p, s, x: f(p, lambda y: flax(y, p["n"], s["n"]), x)


def shared(p, norm, x):
    y = norm(dense(x, p["a"]))
    return y, jnp.sin(dense(jnp.cos(x), p["a"]))


def scaled_twice(p, norm, x):
    return jnp.sin(norm(2 * (x @ p["a"]["kernel"]) + p["a"]["bias"]))


def without_bias(p, norm, x):
    return dense(norm(jnp.sin(x[:, :3])), {"kernel": p["b"]["kernel"], "bias": 0.0})


def late_bias(p, norm, x):
    return 2 * (norm(jnp.sin(x[:, :3])) @ p["b"]["kernel"]) + p["b"]["bias"]


def transformed(p, norm, x):
    kernel = p["a"]["kernel"] / jnp.linalg.norm(p["a"]["kernel"], axis=0)
    return jnp.sin(norm(x @ kernel + p["a"]["bias"]))


def penalized(p, norm, x):
    return jnp.sin(norm(dense(x, p["a"]))), (p["a"]["kernel"] ** 2).sum()


def skips(p, norm, x):
    y = dense(x, p["a"])
    return norm(y) + y


def two_layers(p, norm, x):
    y = norm(jnp.sin(x[:, :3]))
    return dense(y, p["b"]), y @ p["a"]["kernel"][:3]


def other_data(p, norm, x):
    return dense(norm(jnp.sin(x[:, :3])), p["b"]), dense(x[:, 1:], p["b"])


def backwards(p, norm, x):
    return jnp.sin(norm(x @ p["a"]["kernel"][:, ::-1] + p["a"]["bias"]))


def other_axis(p, norm, x):
    y = x[:3] @ p["a"]["kernel"]
    return jnp.sin(norm(y.T))


def more_than_a_norm(p, norm, x):
    return jnp.sin(norm(dense(x, p["a"]) + p["b"]["bias"]))


def of_a_branch(p, norm, x):
    y = jax.lax.cond(x.sum() > 0, lambda: dense(x, p["a"]), lambda: x[:, :3])
    return jnp.sin(norm(y))


def own_statistics(p, norm, x):
    y = dense(x, p["a"])
    return flax(y, p["n"], {"mean": y.mean(0), "var": y.var(0)})


NO_LAYER = "before it, there is no layer whose output alone it is applied to"
NOT_APPLIED = "does not apply it with its running statistics"
REFUSED = {
    shared: "before it, the output of 'a' is used without it too",
    scaled_twice: NO_LAYER,
    without_bias: "after it, 'b' does not use its kernel and bias as they are, or is not alone in using them",
    late_bias: "after it, 'b' does not use its kernel and bias as they are, or is not alone in using them",
    transformed: NO_LAYER,
    penalized: "before it, 'a' does not use its kernel and bias as they are, or is not alone in using them",
    skips: "before it, the output of 'a' is used without it too; after it, there is no layer that alone reads it",
    two_layers: "after it, there is no layer that alone reads it",
    other_data: "after it, 'b' reads other data too",
    backwards: "before it, 'a' runs backwards along its features",
    other_axis: NO_LAYER,
    more_than_a_norm: NO_LAYER,
    of_a_branch: NO_LAYER,
    own_statistics: NOT_APPLIED,
}


@pytest.mark.parametrize(("f", "why"), REFUSED.items(), ids=[f.__name__ for f in REFUSED])
def test_what_cannot_be_folded_is_named(f, why):
    fold = jw.norm_folds(normed(f), SHAPES, STATS, BATCH)["n"]
    assert fold.layer is None
    assert why in fold.why
