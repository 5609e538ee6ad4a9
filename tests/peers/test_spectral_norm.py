"""Spectral normalization of weights that are not a single matrix: Flax's against ours."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax_modules import scanned

import jaxweights as jw

KEY = jax.random.key(0)


def sigma(w):
    return np.linalg.norm(np.asarray(w, np.float64), 2)


def flax_stats(module, x, n_steps=100):
    """Returns Flax's {path: σ} and the parameters of the module."""
    wrapped = nn.SpectralNorm(module, n_steps=1)

    @jax.jit
    def run(x):
        variables = wrapped.init(KEY, x, update_stats=False)

        def step(stats, _):
            new = {**variables, "batch_stats": stats}
            return wrapped.apply(new, x, update_stats=True, mutable=["batch_stats"])[1]["batch_stats"], None

        stats, _ = jax.lax.scan(step, variables["batch_stats"], length=n_steps)
        return stats, variables["params"]["layer_instance"]

    stats, params = run(x)
    return {name: value for name, value in stats.items() if name.endswith("sigma")}, params


def folded(module, x, params):
    """Our normalized weights for those parameters."""
    wrapped = jw.linen.Transformed(module, jw.SpectralNorm(n_steps=100))

    @jax.jit
    def run(x, params):
        variables = {**wrapped.init(KEY, x), "params": params}
        _, moved = wrapped.apply(variables, x, mutable=["weight_transform"])
        return jw.linen.fold(wrapped, {**variables, **moved})["params"]

    return run(x, params)


def test_the_biases_of_attention_are_matrices_to_flax():
    x = jnp.ones((1, 5, 16))
    module = nn.MultiHeadDotProductAttention(num_heads=4)
    theirs, params = flax_stats(module, x, n_steps=1)
    assert any("query/bias" in name for name in theirs)
    params = jax.tree.map(lambda a: a + 2.0 * (a.ndim < 3), params)
    ours = folded(module, x, params)
    np.testing.assert_array_equal(ours["query"]["bias"], params["query"]["bias"])


def test_a_transposed_convolution_is_read_by_its_inputs_and_outputs():
    x = jnp.ones((1, 6, 6, 12))
    module = nn.ConvTranspose(4, (3, 3), transpose_kernel=True, use_bias=False)
    theirs, params = flax_stats(module, x)
    kernel = params["kernel"]  # (3, 3, out, in)
    true = sigma(jnp.swapaxes(kernel, 2, 3).reshape(-1, 4))
    assert abs(float(next(iter(theirs.values()))) / true - 1) > 0.02
    t = jw.SpectralNorm(n_steps=100, axes=jw.axes.CONV_TRANSPOSE_KERNEL)
    new = jax.jit(lambda w: t.apply(w, t.init(w, KEY)))(kernel)
    assert sigma(jnp.swapaxes(new, 2, 3).reshape(-1, 4)) == pytest.approx(1, abs=1e-4)


def test_each_layer_of_a_stack_has_its_own_norm():
    """Flax flattens a stack (layers, in, out) to one matrix (layers·in, out)."""
    module, x = scanned("dense", length=3), jnp.ones((2, 6))
    theirs, params = flax_stats(module, x)
    (kernel,) = (a for a in jax.tree.leaves(params) if a.ndim == 3)
    (found,) = (float(v) for name, v in theirs.items() if "kernel" in name)
    assert found == pytest.approx(sigma(kernel.reshape(-1, kernel.shape[-1])), rel=1e-2)
    (ours,) = (a for a in jax.tree.leaves(folded(module, x, params)) if a.ndim == 3)
    np.testing.assert_allclose([sigma(layer) for layer in ours], 1, atol=1e-3)
    assert max(sigma(layer) for layer in kernel) / found < 0.95
