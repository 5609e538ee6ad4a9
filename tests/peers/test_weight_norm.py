"""Weight normalization against Flax's and torch's: defects of their wrappers that ours avoids."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxweights as jw

KEY = jax.random.key(0)
X, TARGET = jax.random.normal(jax.random.key(1), (64, 16)), jax.random.normal(jax.random.key(2), (64, 8))
RATE, STEPS = 0.1, 50


def linear():
    return nnx.Linear(16, 8, rngs=nnx.Rngs(0))


def linen_losses(model, params):
    """Returns the loss before each step of gradient descent, and the final parameters."""

    def step(params, _):
        loss, grads = jax.value_and_grad(lambda p: jnp.mean((model.apply({"params": p}, X) - TARGET) ** 2))(params)
        return jax.tree.map(lambda p, g: p - RATE * g, params, grads), loss

    params, losses = jax.jit(lambda p: jax.lax.scan(step, p, length=STEPS))(params)
    return np.asarray(losses), params


def nnx_losses(model):
    @nnx.jit
    def step(model):
        loss, grads = nnx.value_and_grad(lambda m: jnp.mean((m(X) - TARGET) ** 2))(model)
        nnx.update(model, jax.tree.map(lambda p, g: p - RATE * g, nnx.state(model, nnx.Param), grads))
        return loss

    return np.asarray([step(model) for _ in range(STEPS)])


def test_linen_and_nnx_train_alike_here_and_apart_in_flax():
    params = {"kernel": linear().kernel[...], "bias": jnp.zeros(8)}
    ours = jw.linen.Transformed(nn.Dense(8), jw.WeightNorm())
    scale = jw.on_tree(jw.WeightNorm()).init(params, KEY).learned
    losses, trained = linen_losses(ours, {**params, "weight_transform": scale})
    model = jw.nnx.transformed(linear(), jw.WeightNorm())
    np.testing.assert_allclose(nnx_losses(model), losses, rtol=1e-4)
    # The scale is trained too, and folds with the direction into ordinary kernels.
    v, g = (np.float64(a) for a in (trained["kernel"], trained["weight_transform"]["kernel"]["scale"]))
    assert np.abs(g - np.float64(scale["kernel"]["scale"])).max() > 0.1
    folded = jw.linen.fold(ours, {"params": trained})["params"]
    for kernel in (folded["kernel"], jw.nnx.fold(model).kernel[...]):
        np.testing.assert_allclose(kernel, g * v / np.linalg.norm(v, axis=0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(nn.Dense(8).apply({"params": folded}, X), model(X), rtol=1e-4, atol=1e-4)

    flax = {"layer_instance": params, "layer_instance/kernel/scale": jnp.ones(8)}
    theirs = linen_losses(nn.WeightNorm(nn.Dense(8)), flax)[0], nnx_losses(nnx.WeightNorm(linear(), rngs=nnx.Rngs(0)))
    assert theirs[0][0] == pytest.approx(theirs[1][0], rel=1e-5)
    assert abs(theirs[0][-1] / theirs[1][-1] - 1) > 0.02


def test_a_call_overwrites_the_kernel_in_flax_and_not_here():
    flax, ours = nnx.WeightNorm(linear(), rngs=nnx.Rngs(0)), jw.nnx.transformed(linear(), jw.WeightNorm())
    for model in (flax, ours):
        model.eval()
        model(X)
    assert not np.allclose(flax.layer_instance.kernel[...], linear().kernel[...], rtol=0.1)
    np.testing.assert_array_equal(ours.kernel[...], linear().kernel[...])


def test_wrapping_changes_the_function_in_flax_and_not_here():
    dense = nn.Dense(8)
    params = dense.init(KEY, X)["params"]
    y = dense.apply({"params": params}, X)
    flax = nn.WeightNorm(nn.Dense(8))
    variables = flax.init(KEY, X)
    variables["params"]["layer_instance"] = params
    assert not np.allclose(flax.apply(variables, X), y, rtol=0.1)
    ours = jw.linen.Transformed(nn.Dense(8), jw.WeightNorm())
    variables = ours.init(KEY, X)
    plain = {n: v for n, v in variables["params"].items() if n != "weight_transform"}
    np.testing.assert_allclose(ours.apply(variables, X), dense.apply({"params": plain}, X), rtol=1e-6, atol=1e-6)


def test_the_scale_is_a_parameter_here():
    flax, ours = nnx.WeightNorm(linear(), rngs=nnx.Rngs(0)), jw.nnx.transformed(linear(), jw.WeightNorm())
    count = lambda m: len(jax.tree.leaves(nnx.state(m, nnx.Param)))
    assert count(flax) == 2  # kernel and bias: the scales never train
    assert count(ours) == 3


def test_a_scale_may_start_at_random_here():
    with pytest.raises(TypeError, match="PRNG key"):
        nnx.WeightNorm(linear(), scale_init=nnx.initializers.normal(), rngs=nnx.Rngs(0))
    ours = jw.nnx.transformed(linear(), jw.WeightNorm())
    ours.weight_transform.learned["kernel"]["scale"][...] = scale = jax.random.normal(KEY, (8,))
    np.testing.assert_allclose(np.linalg.norm(jw.nnx.fold(ours).kernel[...], axis=0), np.abs(scale), rtol=1e-5)


def test_torch_gives_nan_for_a_zero_kernel_and_we_do_not():
    torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'jaxweights[peers]'")
    layer = torch.nn.Linear(8, 4, bias=False)
    with torch.no_grad():
        layer.weight.zero_()
    wrapped = torch.nn.utils.parametrizations.weight_norm(layer)
    assert torch.isnan(wrapped(torch.ones(1, 8))).any()
    w, t = jnp.zeros((8, 4)), jw.WeightNorm()
    np.testing.assert_array_equal(t.apply(w, t.init(w, KEY)), w)
