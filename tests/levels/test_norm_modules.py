"""Norm modules: Flax's checkpoints load, values match Flax's, and Linen and NNX agree."""

import dataclasses
import inspect

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxweights as jw

rng = np.random.default_rng(0)
X = jnp.float32(rng.normal(size=(4, 5, 3, 8)) * 2 + 0.5)
MASK = jnp.asarray(rng.random(X.shape) < 0.7)  # Flax returns NaN where all entries are masked
SCALE, NEITHER = {"use_bias": False}, {"use_bias": False, "use_scale": False}
MODULES = [
    ("LayerNorm", {}),
    ("LayerNorm", {"epsilon": 0.1, **NEITHER}),
    ("RMSNorm", {"epsilon": 0.1}),
    ("GroupNorm", {"num_groups": 4}),
    ("GroupNorm", {"num_groups": None, "group_size": 4, **SCALE}),
    ("InstanceNorm", {}),
]
every_module = pytest.mark.parametrize(("name", "options"), MODULES)


def close(found, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected)


def perturbed(params):
    return jax.tree.map(lambda p: p + jnp.float32(rng.normal(size=p.shape)), params)


@every_module
def test_linen_has_the_parameters_outputs_and_gradients_of_flax(name, options):
    ours, flaxs = getattr(jw.linen, name)(**options), getattr(nn, name)(**options)
    start = flaxs.init(jax.random.key(0), X)
    jax.tree.map(np.testing.assert_array_equal, ours.init(jax.random.key(0), X), start)
    variables = perturbed(start)
    for mask in (None, MASK):

        def loss(module, variables, x, mask=mask):
            y = module.apply(variables, x, mask=mask)
            return jnp.sum(jnp.sin(y) * (1 if mask is None else mask)), y

        grad = jax.jit(jax.grad(loss, (1, 2), has_aux=True), static_argnums=0)
        close(grad(ours, variables, X), grad(flaxs, variables, X))


@every_module
def test_nnx_has_the_parameters_and_outputs_of_flax_and_of_linen(name, options):
    ours, flaxs = getattr(jw.nnx, name)(8, **options), getattr(nnx, name)(8, **options, rngs=nnx.Rngs(0))
    state = nnx.state(flaxs, nnx.Param)
    assert jax.tree.structure(nnx.to_pure_dict(nnx.state(ours, nnx.Param))) == jax.tree.structure(
        nnx.to_pure_dict(state)
    )
    params = perturbed(nnx.to_pure_dict(state))
    for module in (ours, flaxs):
        nnx.update(module, params)
    linen = getattr(jw.linen, name)(**options)
    for mask in (None, MASK):
        y = nnx.jit(lambda m, x, mask=mask: m(x, mask=mask))(ours, X)
        close(y, nnx.jit(lambda m, x, mask=mask: m(x, mask=mask))(flaxs, X))
        same = jax.jit(lambda params, x, mask=mask: linen.apply({"params": params}, x, mask=mask))(params, X)
        np.testing.assert_array_equal(y, same)


@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm", "GroupNorm", "InstanceNorm"])
@pytest.mark.parametrize(("ours", "flaxs"), [(jw.linen, nn), (jw.nnx, nnx)], ids=["linen", "nnx"])
def test_arguments_are_named_as_in_flax(ours, flaxs, name):
    """Defaults match too."""
    ours, flaxs = (signature(getattr(level, name)) for level in (ours, flaxs))
    assert ours.items() <= flaxs.items()


def signature(module):
    if issubclass(module, nn.Module):
        return {f.name: f.default for f in dataclasses.fields(module) if f.name not in ("parent", "name")}
    return {n: p.default for n, p in inspect.signature(module.__init__).parameters.items() if n not in ("self", "rngs")}
