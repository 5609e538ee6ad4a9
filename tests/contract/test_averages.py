"""Averages of two states: the transform keeps its promise on the averaged weights, or refuses them with the remedy."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import KEY, TRANSFORMS
from contract.table import weight
from flax import nnx

import jaxweights as jw


@functools.cache
def stateful(floating):
    """The cases whose states hold floating-point numbers alone, or integers, too."""
    found = []
    for case in TRANSFORMS:
        state = jax.eval_shape(case.transform().init, weight(case), KEY)
        if state and all(jnp.issubdtype(a.dtype, jnp.floating) for a in state.values()) == floating:
            found.append(case)
    return found


mean = lambda a, b: jax.tree.map(lambda a, b: 0.9 * a.astype(jnp.float32) + 0.1 * b.astype(jnp.float32), a, b)
floating = lambda a, b: jax.tree.map(lambda a, b: mean(a, b) if jnp.issubdtype(b.dtype, jnp.floating) else b, a, b)


def path(case):
    """Where the weight of a case is in the tree: named so, it is read (..., in, out)."""
    return f"{case.name}/kernel"


def lifted(cases):
    return jw.on_tree({path(case): case.transform() for case in cases})


def two_steps(cases):
    """The weights and states of two steps of a fast optimizer, by case."""
    t, moved = lifted(cases), lambda case: weight(case) + 0.1 * weight(case, seed=1)
    first, second = {path(case): weight(case) for case in cases}, {path(case): moved(case) for case in cases}
    before = t.update(first, t.init(first, KEY))
    return first, second, before, t.update(second, before)


def largest(matrices):
    return np.linalg.svd(np.float64(matrices), compute_uv=False)[..., 0]


def conv_map(kernel):
    """The matrix of the convolution of the table."""
    images = np.eye(480, dtype=np.float32).reshape(480, 5, 6, 16)
    numbers = ("NHWC", "HWIO", "NHWC")
    out = jax.lax.conv_general_dilated(images, kernel, (2, 2), "SAME", dimension_numbers=numbers)
    return np.asarray(out).reshape(480, -1)


MATRICES = {
    "spectral_norm": lambda w: w,
    "spectral_norm soft": lambda w: w,
    "spectral_norm attention": lambda w: w.reshape(32, 16),
    "spectral_norm conv": lambda w: w.reshape(-1, 32),
    "spectral_norm stack": lambda w: w,
    "spectral_norm depthwise": lambda w: w.reshape(9, 32, 8).swapaxes(0, 1),
    "conv_spectral_norm": conv_map,
    "conv_spectral_norm soft": conv_map,
}
STORED = {"lsq", "lsq mxfp4 stack", "lsq offset conv", "fake_quantize moving"}
UNITS = {"weight_norm": 0, "weight_norm attention": 0, "weight_norm scale": 0, "weight_norm vector": 0}


def zeros_of(mask, shape):
    return ~np.asarray(jw.sparse.unpack_mask(mask, shape))


kinds_or_all = pytest.mark.parametrize(
    "kinds", [pytest.param(True, id="kinds"), pytest.param(False, id="all", marks=pytest.mark.slow)]
)
"""In one program: one case of each kind, and in a slow test all."""


@kinds_or_all
def test_the_mean_of_floating_states_keeps_the_promise(kinds):
    cases = [case for case in stateful(floating=True) if case.kind or not kinds]

    @jax.jit
    def run():
        t, (w1, w2, s1, s2) = lifted(cases), two_steps(cases)
        w = mean(w1, w2)
        state = t.update(w, mean(s1, s2))
        return t.apply(w, state), state, w

    new, state, average = run()
    assert {"spectral_norm/kernel", "weight_norm/kernel"} <= new.keys()
    for case in cases:
        w = np.asarray(new[path(case)])
        if case.name in MATRICES:
            np.testing.assert_allclose(largest(MATRICES[case.name](w)), 1, rtol=1e-3, err_msg=case.name)
        elif case.name in UNITS:
            scale = state.learned[path(case)]["scale"]
            np.testing.assert_allclose(np.linalg.norm(w, axis=0), scale, rtol=1e-5, err_msg=case.name)
        elif case.name == "weight_norm centred":
            np.testing.assert_allclose(np.linalg.norm(w), state.learned[path(case)]["1.scale"], rtol=1e-5)
        elif case.name == "weight_standardization":
            np.testing.assert_allclose(w.mean((0, 1, 2)), 0, atol=1e-5)
        elif case.name in STORED:
            parts = (part.get(path(case), {}) for part in state)
            stored = case.transform().store(average[path(case)], {n: a for part in parts for n, a in part.items()})
            assert np.isclose(stored.todense(), w, rtol=1e-6).mean() > 0.99, case.name  # but for ties, in two programs
        elif case.name == "fake_quantize moving min-max":
            assert len(np.unique(w)) <= 2**8 < w.size
        elif case.name == "around clip_weights":
            assert np.abs(w - np.asarray(state.fixed[path(case)]["center"])).max() <= np.float32(0.05)
        else:
            pytest.fail(f"write down what {case.name} promises")


def test_a_mean_of_integers_is_refused_with_the_remedy():
    for case in stateful(floating=False):
        t, w = lifted([case]), {path(case): jax.ShapeDtypeStruct(case.shape, jnp.float32)}
        state = jax.eval_shape(lambda w, t=t: mean(*2 * [t.init(w, KEY)]), w)
        for verb in (t.update, t.apply):
            with pytest.raises(TypeError, match=rf"(?s) at '{path(case)}'.*averaged or cast.*from the last step"):
                jax.eval_shape(verb, w, state)


@kinds_or_all
def test_the_remedy_keeps_the_promise(kinds):
    """The mean of the floating entries, and all others of the last step."""
    cases = [case for case in stateful(floating=False) if case.kind or not kinds]

    @jax.jit
    def run():
        t, (w1, w2, s1, s2) = lifted(cases), two_steps(cases)
        w = mean(w1, w2)
        state = t.update(w, floating(s1, s2))
        return t.apply(w, state), t.apply(w, t.update(w, s2)), state, s2

    new, expected, state, last = run()
    for case in cases:
        w, name = np.asarray(new[path(case)]), case.name
        if name in MATRICES:
            assert largest(MATRICES[name](w)).max() <= 0.125 * (1 + 1e-3)  # the schedule of the third update
        else:  # The floating entries are values of schedules, which `update` sets, or belong to a learned scale.
            np.testing.assert_allclose(w, expected[path(case)], rtol=1e-3, atol=1e-6, err_msg=name)
        if "mask" in last.fixed[path(case)]:
            assert (w[zeros_of(state.fixed[path(case)]["mask"], case.shape)] == 0).all()


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(16, name="out")(nn.relu(nn.Dense(32, name="hidden")(x)))


X = jax.random.normal(jax.random.key(1), (64, 24))


@pytest.mark.filterwarnings("ignore::jaxweights.StaleStateWarning")  # another call updates it
def test_an_ema_of_all_linen_variables_is_normalized_after_update_state():
    model, ema, tx = jw.linen.Transformed(Net(), jw.SpectralNorm()), optax.ema(0.99), optax.adam(1e-2)

    @jax.jit
    def run(key):
        variables = model.init(key, X)

        def step(carry, _):
            variables, opt, averaging = carry
            loss = lambda params: jnp.mean((model.apply({**variables, "params": params}, X) - X[:, :16]) ** 2)
            updates, opt = tx.update(jax.grad(loss)(variables["params"]), opt)
            moved = {**variables, "params": optax.apply_updates(variables["params"], updates)}
            moved |= model.apply(moved, X, mutable=["weight_transform"])[1]
            average, averaging = ema.update(moved, averaging)
            return (moved, opt, averaging), average

        carry = (variables, tx.init(variables["params"]), ema.init(variables))
        averages = jax.lax.scan(step, carry, length=60)[1]
        average = jax.tree.map(lambda a: a[-1], averages)
        return average, jw.linen.fold(model, jw.linen.update_state(model, average))["params"]

    average, folded = run(KEY)
    assert largest(average["params"]["hidden"]["kernel"]) > 1.2
    for layer in ("hidden", "out"):
        np.testing.assert_allclose(largest(folded[layer]["kernel"]), 1, atol=1e-3)


def test_an_average_of_nnx_states_is_normalized_after_update_state():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.hidden, self.out = nnx.Linear(24, 32, rngs=rngs), nnx.Linear(32, 16, rngs=rngs)

        def __call__(self, x):
            return self.out(nnx.relu(self.hidden(x)))

    rngs = nnx.Rngs(0)
    model = jw.nnx.transformed(Model(rngs), jw.SpectralNorm(), rngs=rngs)
    graphdef, start = nnx.split(model)

    @jax.jit
    def run(start):
        def step(carry, _):
            state, average = carry
            moving = nnx.merge(graphdef, state)
            grads = nnx.grad(lambda m: jnp.mean((m(X) - X[:, :16]) ** 2))(moving)
            nnx.update(moving, jax.tree.map(lambda p, g: p - 0.1 * g, nnx.state(moving, nnx.Param), grads))
            state = nnx.state(moving)
            average = jax.tree.map(lambda a, b: 0.9 * a + 0.1 * b, average, state)
            return (state, average), None

        (_, average), _ = jax.lax.scan(step, (start, start), length=40)
        averaged = nnx.merge(graphdef, average)
        jw.nnx.update_state(averaged)
        return nnx.state(jw.nnx.fold(averaged), nnx.Param)

    folded = run(start)
    for layer in ("hidden", "out"):
        np.testing.assert_allclose(largest(folded[layer]["kernel"][...]), 1, atol=1e-3)
