"""The state after the last optimizer step, after loading and after averaging: one update before evaluation."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxweights as jw
from jaxweights.levels.paths import STATE

KEY = jax.random.key(0)
X = jnp.eye(6)
SPECTRAL = jw.SpectralNorm(n_steps=2)
NOISE = jax.random.normal(KEY, (6, 6))


def sigma(w):
    return np.linalg.norm(np.asarray(w, np.float64), 2)


def trained():
    """A weight, its state after 20 steps, and the weight after the optimizer step that follows."""
    w = jnp.diag(jnp.array([3.0, 2.0, 1.0, 0.5, 0.2, 0.1]))
    state = SPECTRAL.init(w, KEY)
    for _ in range(20):
        state = SPECTRAL.update(w, state)
    return state, w + 0.3 * NOISE


def check(before, after):
    """The largest singular value of the transformed weight, by an exact SVD."""
    assert sigma(before) > 1.02
    assert sigma(after) == pytest.approx(1, abs=2e-3)


def test_array_and_tree():
    state, w = trained()
    check(SPECTRAL.apply(w, state), SPECTRAL.apply(w, SPECTRAL.update(w, state)))
    lifted, params, tree = jw.on_tree(SPECTRAL), {"a": {"kernel": w}}, jw.TreeState({}, {"a/kernel": state})
    new = lifted.apply(params, lifted.update(params, tree))
    check(lifted.apply(params, tree)["a"]["kernel"], new["a"]["kernel"])


def test_project_needs_none():
    _, w = trained()
    tx = optax.chain(optax.sgd(1.0), jw.project(jw.SpectralNorm(n_steps=30)))
    updates, _ = tx.update({"w": -0.3 * NOISE}, tx.init({"w": w}), {"w": w})
    assert sigma(optax.apply_updates({"w": w}, updates)["w"]) == pytest.approx(1, abs=2e-3)


def test_linen():
    state, w = trained()
    model = jw.linen.Transformed(nn.Dense(6), jw.Chain(SPECTRAL, jw.WeightNorm()))
    fixed = {"kernel": {f"0.{n}": a for n, a in state.items()}}
    scale = {"kernel": {"1.scale": 2 * jnp.ones(6)}}
    variables = {
        "params": {"kernel": w, "bias": jnp.zeros(6), STATE: scale},
        STATE: fixed,
        "cache": {"i": jnp.ones(())},
    }
    new = jax.jit(lambda v: jw.linen.update_state(model, v))(variables)
    assert jax.tree.structure(new) == jax.tree.structure(variables)
    for name in ("params", "cache"):
        jax.tree.map(np.testing.assert_array_equal, new[name], variables[name])
    alone = lambda v: SPECTRAL.apply(w, {n.removeprefix("0."): a for n, a in v[STATE]["kernel"].items()})
    check(alone(variables), alone(new))
    # What a training step would store.
    _, moved = model.apply(variables, X, mutable=[STATE])
    jax.tree.map(np.testing.assert_array_equal, new[STATE], moved[STATE])


def test_linen_inside_a_larger_model():
    """The part of the wrapper through `update_state`, or the whole model through `apply`."""
    layer = jw.linen.Transformed(nn.Dense(6, use_bias=False), SPECTRAL)

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return jw.linen.Transformed(nn.Dense(6, use_bias=False, name="layer"), SPECTRAL)(nn.Dense(6, name="d")(x))

    state, w = trained()
    variables = jax.jit(Model().init)(KEY, X)
    variables["params"]["layer"]["kernel"], variables[STATE]["layer"]["kernel"] = w, state
    part = {name: collection["layer"] for name, collection in variables.items()}
    new = jw.linen.update_state(layer, part)
    check(layer.apply(part, X), layer.apply(new, X))
    _, moved = jax.jit(lambda v: Model().apply(v, X, mutable=[STATE]))(variables)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), moved[STATE]["layer"], new[STATE])


def test_linen_keeps_the_state_of_a_wrapper_further_in():
    class Inner(nn.Module):
        @nn.compact
        def __call__(self, x):
            return jw.linen.Transformed(nn.Dense(6, name="b"), SPECTRAL)(nn.Dense(6, name="a")(x))

    model = jw.linen.Transformed(Inner(), SPECTRAL, where="a/kernel")
    variables = jax.jit(model.init)(KEY, X)
    new = jw.linen.update_state(model, variables)
    assert jax.tree.structure(new) == jax.tree.structure(variables)
    jax.tree.map(np.testing.assert_array_equal, new[STATE]["b"], variables[STATE]["b"])
    assert not np.array_equal(new[STATE]["a"]["kernel"]["v"], variables[STATE]["a"]["kernel"]["v"])


@pytest.mark.parametrize("jit", [lambda f: f, nnx.jit], ids=["eager", "jit"])
def test_nnx_in_place_in_evaluation_mode(jit):
    """Two modules inside a model, one of them in a list."""
    state, w = trained()

    def layer():
        linear = nnx.Linear(6, 6, use_bias=False, rngs=nnx.Rngs(0))
        new = jw.nnx.transformed(linear, SPECTRAL)
        new.kernel[...] = w
        for name, value in state.items():
            new.weight_transform.fixed["kernel"][name][...] = value
        return new

    class Model(nnx.Module):
        def __init__(self):
            self.first = layer()
            self.rest = nnx.Sequential(layer(), nnx.Linear(6, 6, rngs=nnx.Rngs(0)))

    model = Model()
    model.eval()
    layers = [model.first, model.rest.layers[0]]
    before = [layer(X) for layer in layers]
    jit(jw.nnx.update_state)(model)
    assert model.first.weight_transform.deterministic
    for layer, y in zip(layers, before, strict=True):
        check(y, layer(X))
        np.testing.assert_array_equal(layer.kernel[...], w)


def test_nnx_learned_entries_stay():
    model = jw.nnx.transformed(nnx.Linear(6, 6, rngs=nnx.Rngs(0)), jw.Chain(SPECTRAL, jw.WeightNorm()))
    scale = model.weight_transform.learned["kernel"]["1.scale"][...]
    jw.nnx.update_state(model)
    np.testing.assert_array_equal(model.weight_transform.learned["kernel"]["1.scale"][...], scale)


def test_averaged_weights():
    """The recipe: average the parameters, keep the state of the last step, update it. Linen and NNX agree."""
    model = jw.linen.Transformed(nn.Dense(6, use_bias=False), SPECTRAL)
    ema, averaged = optax.ema(0.9), None
    variables = {"params": {"kernel": jnp.diag(jnp.array([3.0, 2.0, 1.0, 0.5, 0.2, 0.1]))}}
    variables[STATE] = jax.jit(model.init)(KEY, X)[STATE]
    average = ema.init(variables["params"])
    step = jax.jit(lambda v: model.apply(v, X, mutable=[STATE])[1])
    for i in range(30):
        variables |= step(variables)
        noise = jax.random.normal(jax.random.fold_in(KEY, i), (6, 6))
        variables["params"] = {"kernel": variables["params"]["kernel"] + 0.1 * noise}
        averaged, average = ema.update(variables["params"], average)
    old = {**variables, "params": averaged}
    new = jw.linen.update_state(model, old)
    assert abs(sigma(model.apply(new, X)) - 1) < abs(sigma(model.apply(old, X)) - 1) / 3
    module = jw.nnx.transformed(nnx.Linear(6, 6, use_bias=False, rngs=nnx.Rngs(0)), SPECTRAL)
    nnx.update(module, {"kernel": averaged["kernel"], STATE: {"fixed": variables[STATE]}})
    jw.nnx.update_state(module)
    module.eval()
    np.testing.assert_allclose(module(X), model.apply(new, X), rtol=1e-5, atol=1e-6)
