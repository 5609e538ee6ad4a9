"""Runs claims of docs/measurements/peers.md about Flax, optax and torch, and checks that ours does better."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxweights as jw

KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (8, 64))


def sigma(w):
    return np.linalg.norm(np.asarray(w, np.float64), 2)


def test_evaluation_overwrites_the_kernel_in_flax_and_not_here():
    flax = nnx.SpectralNorm(nnx.Linear(64, 32, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0))
    ours = jw.nnx.transformed(nnx.Linear(64, 32, rngs=nnx.Rngs(0)), jw.SpectralNorm())
    before = np.asarray(ours.kernel[...])
    flax(X, update_stats=False)
    ours.eval()
    ours(X)
    assert not np.array_equal(flax.layer_instance.kernel[...], before)
    np.testing.assert_array_equal(ours.kernel[...], before)


def test_attention_is_normalised_by_its_operator_here():
    x = jnp.ones((1, 5, 64))
    module = nn.MultiHeadDotProductAttention(num_heads=4)
    flax = nn.SpectralNorm(module)

    @jax.jit
    def run(x):
        variables = flax.init(KEY, x, update_stats=False)

        def step(stats, _):
            new = {**variables, "batch_stats": stats}
            return flax.apply(new, x, update_stats=True, mutable=["batch_stats"])[1]["batch_stats"], None

        stats, _ = jax.lax.scan(step, variables["batch_stats"], length=50)
        return stats, {"attention": variables["params"]["layer_instance"]}

    stats, params = run(x)
    kernel = params["attention"]["query"]["kernel"]
    true = sigma(kernel.reshape(64, 64))
    (theirs,) = (v for k, v in stats.items() if "query/kernel/sigma" in k)
    assert abs(float(theirs) / true - 1) > 0.03
    assert float(jw.spectral_norm(kernel, axes=jw.axes.ATTENTION_IN)) == pytest.approx(true, rel=1e-5)
    lifted = jw.on_tree(jw.SpectralNorm(n_steps=200), where="**/query/kernel")
    new = jax.jit(lambda p: lifted.apply(p, lifted.update(p, lifted.init(p, KEY))))(params)
    assert sigma(new["attention"]["query"]["kernel"].reshape(64, 64)) == pytest.approx(1, abs=1e-3)


def test_a_zero_kernel_comes_back_to_life_here():
    for layer, step in (
        (nn.SpectralNorm(nn.Dense(32)), lambda m, v: m.apply(v, X, update_stats=True, mutable=["batch_stats"])[1]),
        (
            jw.linen.Transformed(nn.Dense(32), jw.SpectralNorm()),
            lambda m, v: m.apply(v, X, mutable=["weight_transform"])[1],
        ),
    ):
        ours = isinstance(layer, jw.linen.Transformed)
        step = jax.jit(functools.partial(step, layer))
        variables = jax.jit(lambda x: layer.init(KEY, x, **({} if ours else {"update_stats": False})))(X)  # noqa: B023
        kernel = jax.random.normal(KEY, (64, 32))

        def put(value, variables=variables, ours=ours):
            scope = variables["params"] if ours else variables["params"]["layer_instance"]
            scope["kernel"] = value

        put(jnp.zeros((64, 32)))
        variables.update(step(variables))
        put(kernel)
        for _ in range(100):
            variables.update(step(variables))
        if ours:
            estimate = sigma(kernel) / sigma(jw.linen.fold(layer, variables)["params"]["kernel"])
            assert estimate == pytest.approx(sigma(kernel), rel=1e-3)
        else:
            (u,) = (v for k, v in variables["batch_stats"].items() if k.endswith("kernel/u"))
            assert not np.any(u)


def test_a_constraint_in_a_chain_holds_wherever_it_can_here():
    params = {"w": jnp.full((4, 4), 0.01)}
    grads = {"w": jnp.ones((4, 4))}
    first = optax.chain(optax.keep_params_nonnegative(), optax.sgd(1.0))
    updates, _ = first.update(grads, first.init(params), params)
    assert (optax.apply_updates(params, updates)["w"] < 0).any()  # silently violated, since it has to be last
    last = optax.chain(optax.sgd(1.0), jw.project(jw.ClipWeights(0.1)))
    updates, _ = last.update(grads, last.init(params), params)
    assert (jnp.abs(optax.apply_updates(params, updates)["w"]) <= 0.1).all()


def test_torch_gives_nan_for_a_zero_kernel_and_we_do_not():
    torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'jaxweights[peers]'")
    layer = torch.nn.Linear(8, 4, bias=False)
    with torch.no_grad():
        layer.weight.zero_()
    wrapped = torch.nn.utils.parametrizations.spectral_norm(layer)
    assert torch.isnan(wrapped(torch.ones(1, 8))).any()
    assert np.isfinite(jw.spectral_normalize(jnp.zeros((8, 4)))).all()
