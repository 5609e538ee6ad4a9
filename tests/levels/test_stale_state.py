"""Training that leaves the state of a transform as it is warns, and nothing else does."""

import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import jaxweights as jw
from jaxweights.levels.paths import STATE

KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (4, 6))
LOOSENED = jw.ClipWeights(lambda step: 1.0 + step)  # moves, and compiles fast
MODEL = jw.linen.Transformed(nn.Dense(3), LOOSENED)
VARIABLES = jax.jit(MODEL.init)(KEY, X)
PARAMS = VARIABLES["params"]


def loss(params, x=X, **kwargs):
    return jnp.sum(MODEL.apply({**VARIABLES, "params": params}, x, **kwargs))


def stale(f, *args):
    """The warnings in a call."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        f(*args)
    return [w.message for w in caught if w.category is jw.StaleStateWarning]


def scanned(params):
    return jax.lax.scan(lambda total, _: (total + loss(params), None), 0.0, length=2)[0]


def batched(params):
    return jax.vmap(lambda x: loss(params, x))(X).sum()


@pytest.mark.parametrize(
    "f",
    [
        jax.grad(loss),
        jax.jit(jax.grad(loss)),
        jax.grad(jax.jit(loss)),
        jax.grad(jax.checkpoint(loss)),
        jax.grad(scanned),
        jax.grad(batched),
        lambda params: jax.jvp(loss, (params,), (params,)),
    ],
    ids=["grad", "jit of grad", "grad of jit", "remat", "scan", "vmap", "jvp"],
)
def test_linen_training_without_mutable_warns(f):
    (message,) = stale(f, PARAMS)
    assert f'mutable=["{STATE}"]' in str(message) and "project(ClipWeights(" in str(message)


def test_a_caller_that_keeps_everything_in_params_is_warned():
    assert stale(jax.grad(lambda v: MODEL.apply(v, X).sum(), allow_int=True), VARIABLES)


def kernel_only(bias):
    return loss({**PARAMS, "bias": bias})


def mutable(params):
    y, moved = MODEL.apply({**VARIABLES, "params": params}, X, mutable=[STATE])
    return y.sum(), moved


@pytest.mark.parametrize(
    ("f", "argument"),
    [
        pytest.param(loss, PARAMS, id="evaluation"),
        pytest.param(jax.grad(mutable, has_aux=True), PARAMS, id="mutable"),
        pytest.param(jax.grad(lambda x: loss(PARAMS, x)), X, id="gradient in the inputs"),
        pytest.param(jax.grad(kernel_only), PARAMS["bias"], id="gradient in another parameter"),
        pytest.param(jax.grad(lambda p: MODEL.init_with_output(KEY, X)[0].sum() + p), 1.0, id="init"),
    ],
)
def test_no_warning_without_training_or_with_mutable(f, argument):
    assert not stale(f, argument)


@pytest.mark.parametrize(
    ("transform", "moves"),
    [
        (jw.SpectralNorm(), True),
        (jw.Prune(lambda step: 0.5), True),
        (jw.Chain(jw.WeightNorm(), LOOSENED), True),
        (jw.WeightNorm(), False),
        (jw.ClipWeights(1.0), False),
        (jw.Prune(0.5), False),
        (jw.ShareWeights(3), False),
        (jw.Around(jw.ClipWeights(0.1)), False),
        (jw.Chain(jw.WeightNorm(), jw.Prune(0.5)), False),
    ],
    ids=lambda value: None if isinstance(value, bool) else repr(value)[:40],
)
def test_only_state_that_moves_can_be_stale(transform, moves):
    model = jw.linen.Transformed(nn.Dense(3), transform)
    variables = jax.eval_shape(model.init, KEY, X)
    grad = lambda v: jax.grad(lambda p: model.apply({**v, "params": p}, X).sum())(v["params"])
    assert bool(stale(jax.eval_shape, grad, variables)) == moves


def test_one_warning_for_many_layers_and_steps():
    """With the filters that Python sets, which show a message once."""
    model = jw.linen.Transformed(nn.Sequential([nn.Dense(6), nn.Dense(3)]), LOOSENED)
    variables = jax.jit(model.init)(KEY, X)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            jax.grad(lambda p: model.apply({**variables, "params": p}, X).sum())(variables["params"])
    assert len(caught) == 1


def test_nnx_training_in_evaluation_mode_warns():
    module = jw.nnx.transformed(nnx.Linear(6, 3, rngs=nnx.Rngs(0)), LOOSENED)
    grad = lambda m: nnx.grad(lambda m: m(X).sum())(m)
    assert not stale(grad, module)
    module.eval()
    (message,) = stale(nnx.jit(grad), module)
    assert "train()" in str(message)
    assert not stale(jax.grad(lambda x: module(x).sum()), X)
