"""Peers normalize a convolution by its kernel read as a matrix, so the layer does not have norm 1."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxweights as jw

torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'jaxweights[peers]'")
KEY, SIDE = jax.random.key(0), 10
KERNELS = {
    "random 3x3": (np.random.default_rng(0).normal(size=(3, 3, 2, 4)), 1.5),
    "mean of 7x7": (np.ones((7, 7, 1, 1)) / 49, 7 - 1e-4),
}


def norm(layer, n_in):
    """Largest singular value of a linear layer on images, from its outputs for all one-hot images."""
    n = SIDE * SIDE * n_in
    return np.linalg.norm(np.float64(layer(np.eye(n, dtype=np.float32).reshape(n, SIDE, SIDE, n_in))).reshape(n, -1), 2)


@pytest.mark.parametrize(("kernel", "least"), KERNELS.values(), ids=KERNELS)
def test_a_normalized_convolution_has_norm_1_only_here(kernel, least):
    *window, n_in, n_out = kernel.shape
    kernel = np.float32(kernel)

    conv = torch.nn.Conv2d(n_in, n_out, window, padding="same", padding_mode="circular", bias=False)
    conv.weight.data = torch.tensor(kernel).permute(3, 2, 0, 1)
    conv = torch.nn.utils.parametrizations.spectral_norm(conv, n_power_iterations=100).eval()
    with torch.no_grad():
        in_torch = norm(lambda x: conv(torch.tensor(x).permute(0, 3, 1, 2)), n_in)

    flax = nn.SpectralNorm(nn.Conv(n_out, window, padding="CIRCULAR", use_bias=False))

    @jax.jit
    def searched(x, variables):
        step = lambda stats: flax.apply(variables | stats, x, update_stats=True, mutable=["batch_stats"])[1]
        return jax.lax.fori_loop(0, 100, lambda _, stats: step(stats), {"batch_stats": variables["batch_stats"]})

    x = jnp.ones((1, SIDE, SIDE, n_in))
    variables = flax.init(KEY, x, update_stats=False) | {"params": {"layer_instance": {"kernel": jnp.asarray(kernel)}}}
    stats = searched(x, variables)
    in_flax = norm(jax.jit(lambda x: flax.apply(variables | stats, x, update_stats=False)), n_in)

    sigma = jax.jit(lambda k: jw.conv_spectral_norm(k, (SIDE, SIDE, n_in), padding="CIRCULAR"))(kernel)
    layer = nn.Conv(n_out, window, padding="CIRCULAR", use_bias=False, precision="highest")
    ours = norm(jax.jit(lambda x: layer.apply({"params": {"kernel": kernel / sigma}}, x)), n_in)

    assert ours == pytest.approx(1, abs=1e-5)
    assert in_torch == pytest.approx(in_flax, rel=1e-3)
    assert least < in_torch < np.sqrt(np.prod(window)) + 1e-3
