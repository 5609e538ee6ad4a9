"""Initializing a Linen module in the wrapper: the variables of the plain module, as one call makes them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

import jaxweights as jw
from jaxweights.levels.paths import STATE

KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (2, 5, 6))
RNGS = {"params": KEY, "dropout": jax.random.key(2)}
BOTH = jw.Chain(jw.SpectralNorm(), jw.WeightNorm())  # fixed and learned state


class Counting(nn.Module):
    """Counts calls and draws keys, in itself and in submodules, before and after it makes parameters."""

    @nn.compact
    def __call__(self, x):
        keep = lambda name, make: self.variable("kept", name, make)
        uniform = lambda stream: jax.random.uniform(self.make_rng(stream), (3,))
        keep("first", lambda: uniform("params"))
        count = keep("count", lambda: jnp.zeros((), jnp.int32))
        count.value += 1
        y = nn.Dense(4, name="dense")(nn.Dropout(0.5, deterministic=False)(x))
        keep("dropped", lambda: nn.Dropout(0.5, deterministic=False)(jnp.ones((3, 3))))
        keep("last", lambda: uniform("params"))
        self.param("scale", nn.initializers.normal(), (2, 2))
        keep("other", lambda: uniform("dropout"))
        keep("output", lambda: y)
        return y


class Parts(nn.Module):
    def setup(self):
        self.first, self.last = nn.Dense(4), nn.Dense(4)

    def encode(self, x):
        return self.first(x)

    def decode(self, x):
        return self.last(x)


def without_state(variables):
    params = {name: p for name, p in variables["params"].items() if name != STATE}
    return {**{name: v for name, v in variables.items() if name != STATE}, "params": params}


@pytest.mark.parametrize(
    "module",
    [
        Counting(),
        nn.MultiHeadDotProductAttention(num_heads=2, decode=True),
        nn.RNN(nn.LSTMCell(4)),
        nn.Sequential([nn.remat(nn.Dense)(6), nn.BatchNorm(use_running_average=False)]),
    ],
    ids=["counting", "decoding attention", "rnn", "remat and batch norm"],
)
def test_variables_are_those_of_the_plain_module(module):
    """Weights are unchanged at the start under `ClipWeights(100)` and `WeightNorm`, and so are the outputs."""
    model = jw.linen.Transformed(module, jw.Chain(jw.ClipWeights(lambda step: 100.0 - step), jw.WeightNorm()))
    y, variables = model.init_with_output(RNGS, X)
    expected_y, expected = module.init_with_output(RNGS, X)
    plain = without_state(variables)
    jax.tree.map(np.testing.assert_array_equal, plain["params"], expected["params"])
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, plain, expected)
    jax.tree.map(close, y, expected_y)


def test_a_decoding_attention_decodes():
    """Token by token, through the cache, it computes what causal attention computes at once."""
    attention = lambda decode: nn.MultiHeadDotProductAttention(num_heads=2, decode=decode)
    model, plain = (jw.linen.Transformed(attention(decode), jw.ClipWeights(0.3)) for decode in (True, False))
    variables = model.init(KEY, X)
    params = {"params": variables["params"]}
    expected = plain.apply(params, X, mask=nn.make_causal_mask(X[..., 0]))
    step = jax.jit(lambda v, x: model.apply(v, x, mutable=["cache"]))
    for i in range(X.shape[1]):
        y, moved = step(variables, X[:, i : i + 1])
        variables = {**params, **moved}
        np.testing.assert_allclose(y[:, 0], expected[:, i], rtol=1e-4, atol=1e-5)


def test_methods_called_in_turn_each_make_their_parameters():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            parts = jw.linen.Transformed(Parts(), BOTH)
            return parts.encode(x) + parts.decode(x) + parts.encode(x)

    variables = jax.jit(Model().init)(KEY, X)
    (params,), (state,) = variables["params"].values(), variables[STATE].values()
    assert set(params) == {"first", "last", STATE}
    assert set(params[STATE]) == set(state) == {"first", "last"}
    _, moved = jax.jit(lambda v: Model().apply(v, X, mutable=[STATE]))(variables)
    assert jax.tree.structure(moved[STATE]) == jax.tree.structure(variables[STATE])


def test_the_state_is_nested_as_the_parameters_are():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3)(jw.linen.Transformed(Parts(), BOTH, where="first/kernel").encode(x))

    variables = jax.jit(Model().init)(KEY, X)
    assert set(flatten_dict(variables[STATE], sep="/")) == {"Parts_0/first/kernel/0.v", "Parts_0/first/kernel/0.basis"}
    back = unflatten_dict(flatten_dict(variables, sep="/"), sep="/")
    jax.tree.map(np.testing.assert_array_equal, back, variables)


def test_wrappers_further_in_keep_their_state_beside():
    class Inner(nn.Module):
        @nn.compact
        def __call__(self, x):
            return jw.linen.Transformed(nn.Dense(6, name="b"), jw.SpectralNorm(n_steps=3))(nn.Dense(6, name="a")(x))

    model = jw.linen.Transformed(Inner(), jw.SpectralNorm(n_steps=3), where="a/kernel")
    variables = jax.jit(model.init)(KEY, X)
    step = jax.jit(lambda v: model.apply(v, X, mutable=[STATE]))
    for _ in range(20):
        y, moved = step(variables)
        variables |= moved
    expected = np.asarray(X, np.float64)
    for name in ("a", "b"):
        w = np.asarray(variables["params"][name]["kernel"], np.float64)
        expected = expected @ (w / np.linalg.norm(w, 2))
    np.testing.assert_allclose(y, expected, rtol=1e-3, atol=1e-4)
    both = jw.linen.Transformed(Inner(), jw.SpectralNorm())
    with pytest.raises(ValueError, match="'b/kernel', whose state a Transformed further in keeps: exclude it"):
        jax.eval_shape(both.init, KEY, X)


def test_a_param_method_that_wants_a_shape(monkeypatch):
    """Libraries replace `Module.param` to annotate parameters with axes."""
    original = nn.Module.param

    def param(self, name, init_fn, shape, *args, **kwargs):
        return original(self, name, init_fn, shape, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "param", param)
    variables = jax.eval_shape(jw.linen.Transformed(nn.Dense(3), jw.WeightNorm()).init, KEY, X)
    assert variables["params"][STATE]["kernel"]["scale"].shape == (3,)
