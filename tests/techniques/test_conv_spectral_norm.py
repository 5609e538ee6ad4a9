"""The spectral norm of a convolution, against the dense matrix of the Flax layer."""

import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from x64 import enable_x64

import jaxweights as jw
from jaxweights.core.convolution import Convolution


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


@functools.partial(jax.jit, static_argnums=range(1, 6))
def outputs(kernel, input_shape, strides, padding, dilation, groups):
    """The layer's outputs for all one-hot images."""
    n_out, window, n = kernel.shape[-1], kernel.shape[:-2], math.prod(input_shape)
    options = {"kernel_dilation": dilation, "feature_group_count": groups, "use_bias": False}
    layer = nn.Conv(n_out, window, strides, padding, **options, param_dtype=kernel.dtype)
    basis = jnp.eye(n, dtype=kernel.dtype).reshape(n, *input_shape)
    return layer.apply({"params": {"kernel": kernel}}, basis).reshape(n, -1)


def matrix(kernel, input_shape, *, strides=1, padding="SAME", dilation=1, groups=1):
    """The matrix of the layer, from Flax in float64."""
    padding = tuple(padding) if isinstance(padding, list) else padding
    with enable_x64(True):
        return np.asarray(outputs(np.float64(kernel), input_shape, strides, padding, dilation, groups))


def sigma(kernel, input_shape, **options):
    return np.linalg.svd(matrix(kernel, input_shape, **options), compute_uv=False)[0]


# The operator

SPACE = {1: (8,), 2: (6, 4), 3: (4, 3, 3)}
WINDOW = {1: (3,), 2: (3, 2), 3: (2, 1, 2)}
PADS = ((2, 1), (0, 3), (1, -1))
PADDINGS = ("SAME", "VALID", "CIRCULAR", "pads")
# Covers all pairs of values of (axes, padding, strides, dilation, groups).
GRID = [
    (1 + i % 3, PADDINGS[j], *((1, 1, 1), (2, 1, 2), (1, 2, 2), (2, 2, 1))[(i + j) % 4])
    for i in range(3)
    for j in range(4)
]


@pytest.mark.parametrize(("n", "padding", "strides", "dilation", "groups"), GRID)
def test_the_operator_is_the_layer(n, padding, strides, dilation, groups):
    padding = PADS[:n] if padding == "pads" else padding
    options = {"strides": strides, "padding": padding, "dilation": dilation, "groups": groups}
    kernel, input_shape = normal(*WINDOW[n], 2, 4), (*SPACE[n], 2 * groups)
    dense = matrix(kernel, input_shape, **options)
    conv = Convolution.of(kernel.shape, input_shape, **options)
    assert math.prod(conv.input_shape) == len(dense) and math.prod(conv.output_shape) == dense.shape[1]
    x, y = normal(*conv.input_shape, seed=1), normal(*conv.output_shape, seed=2)
    forward, back = jax.jit(lambda k, x, y: (conv(k, x), conv.transpose(k, y)))(*map(jnp.float32, (kernel, x, y)))
    np.testing.assert_allclose(forward.ravel(), x.ravel() @ dense, atol=1e-5)
    np.testing.assert_allclose(back.ravel(), dense @ y.ravel(), atol=1e-5)


# conv_spectral_norm

EXACT = [
    ((3, 2, 4), (7, 2), {}),
    ((5, 2, 3), (3, 2), {}),  # the window wraps around the image
    ((4, 3, 4), (9, 3), {"strides": 3, "dilation": 2}),
    ((3, 3, 4, 2), (5, 6, 4), {"dilation": (2, 1)}),
    ((3, 3, 2, 6), (6, 8, 4), {"strides": (1, 2), "groups": 2, "dilation": (2, 1)}),
    ((3, 2, 1, 4), (4, 5, 4), {"groups": 4}),
    ((2, 3, 2, 2, 2), (3, 4, 3, 2), {}),
    ((3, 3, 2, 2, 2), (4, 4, 2, 2), {"strides": 2}),
    ((4, 3), (4,), {}),  # no window: a dense layer
]
SEARCHED = [
    ((5, 4, 2), (11, 4), {"strides": 2, "padding": "VALID", "dilation": 2}),
    ((4, 2, 2), (7, 2), {"strides": 3, "padding": "CIRCULAR"}),  # the strides do not divide the image
    ((4, 4, 2, 4), (9, 8, 2), {"strides": 2}),
    ((3, 2, 2, 4), (6, 6, 4), {"padding": [(0, 2), (3, 1)], "groups": 2, "dilation": (1, 2)}),
    ((2, 3, 2, 2, 2), (3, 4, 3, 2), {"strides": (1, 2, 1)}),
]


def test_exact_norms():
    kernels = [normal(*shape) for shape, _, _ in EXACT]
    ours = lambda k, image, options: jw.conv_spectral_norm(k, image, padding="CIRCULAR", **options)
    run = jax.jit(lambda ks: [ours(k, image, options) for k, (_, image, options) in zip(ks, EXACT, strict=True)])
    norms = run(jax.tree.map(jnp.float32, kernels))
    for kernel, found, (shape, image, options) in zip(kernels, norms, EXACT, strict=True):
        assert found.dtype == jnp.float32 and found.shape == ()
        expected = sigma(kernel, image, padding="CIRCULAR", **options)
        np.testing.assert_allclose(found, expected, rtol=1e-5, err_msg=f"{shape} on {image} with {options}")


@pytest.mark.parametrize(
    ("kernel_shape", "input_shape", "options"),
    [*SEARCHED[:2], *(pytest.param(*case, marks=pytest.mark.slow) for case in SEARCHED[2:])],
)
def test_searched_norms(kernel_shape, input_shape, options):
    kernel = normal(*kernel_shape)
    found = jax.jit(lambda k: jw.conv_spectral_norm(k, input_shape, **options))(jnp.float32(kernel))
    assert found.dtype == jnp.float32 and found.shape == ()
    np.testing.assert_allclose(found, sigma(kernel, input_shape, **options), rtol=1e-5)


CIRCULAR = {"padding": "CIRCULAR"}
both = pytest.mark.parametrize("options", [CIRCULAR, {}], ids=["exact", "searched"])
SHAPE, IMAGE = (3, 2, 2, 4), (6, 5, 2)


@both
def test_gradient_and_vmap_with_zero_huge_and_nan_kernels(options):
    kernel, direction = np.float32(normal(*SHAPE)), normal(*SHAPE, seed=1)
    kernels = jnp.stack([kernel, 0 * kernel, 1e30 * kernel, 1e-30 * kernel, np.nan * kernel])
    norm = lambda k: jw.conv_spectral_norm(k, IMAGE, **options)
    found, gradients = jax.jit(jax.vmap(jax.value_and_grad(norm)))(kernels)
    exact = lambda step: sigma(kernel + step * direction, IMAGE, **options)
    np.testing.assert_allclose(found, exact(0) * np.array([1, 0, 1e30, 1e-30, np.nan]), rtol=1e-5)
    assert jnp.isfinite(gradients[:4]).all()
    # The gradient does not depend on the scale of the kernel.
    slope = (exact(1e-5) - exact(-1e-5)) / 2e-5
    np.testing.assert_allclose(np.sum(np.float64(gradients[:4:2]) * direction, (1, 2, 3, 4)), slope, rtol=1e-3)


def test_16_bits():
    kernels = [jnp.asarray(normal(*SHAPE), dtype) for dtype in (jnp.bfloat16, jnp.float16)]
    run = jax.jit(lambda kernels: [jw.conv_spectral_norm(k, IMAGE, **CIRCULAR) for k in kernels])
    for kernel, found in zip(kernels, run(kernels), strict=True):
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, sigma(np.float64(kernel), IMAGE, **CIRCULAR), rtol=1e-5)


@pytest.mark.parametrize(("kernel_shape", "input_shape"), [((3, 0, 2), (5, 0)), ((3, 2, 0), (5, 2))])
@both
def test_nothing(kernel_shape, input_shape, options):
    assert jw.conv_spectral_norm(jnp.zeros(kernel_shape), input_shape, **options) == 0


@pytest.mark.parametrize(("strides", "dilation"), [(1, 1), (2, 1), (2, 2)])
def test_circular_padding_of_a_larger_image_bounds_zero_padding(strides, dilation):
    for seed in range(3):
        kernel = normal(3, 2, 2, 3, seed=seed)
        options = {"strides": strides, "dilation": dilation}
        larger = [-(-(n + dilation * (k - 1)) // strides) * strides for n, k in zip((5, 6), (3, 2), strict=True)]
        bound = sigma(kernel, (*larger, 2), padding="CIRCULAR", **options)
        for padding in ("SAME", "VALID", [(2, 3), (1, 2)]):
            assert sigma(kernel, (5, 6, 2), padding=padding, **options) <= bound * (1 + 1e-12)


# ConvSpectralNorm

LAYERS = [
    ((4, 4, 2, 4), (9, 8, 2), {"strides": 2}),
    ((3, 1, 4), (8, 4), {"groups": 4, "padding": "CIRCULAR"}),
]


@pytest.mark.parametrize(("kernel_shape", "input_shape", "options"), LAYERS)
def test_transform_makes_the_layer_of_norm_1(kernel_shape, input_shape, options):
    t = jw.ConvSpectralNorm(input_shape, n_steps=30, **options)

    @jax.jit
    def run(w, state):
        state = t.update(w, state)
        loss = lambda w: (lambda new: (jnp.sum(jnp.sin(new)), new))(t.apply(w, state))
        gradient, new = jax.grad(loss, has_aux=True)(w)
        return new, gradient, state

    w, direction, h = np.float32(normal(*kernel_shape)), normal(*kernel_shape, seed=1), 1e-5
    start = jax.jit(t.init)(w, jax.random.key(0))
    new, gradient, _ = run(w, start)
    np.testing.assert_allclose(sigma(np.float64(new), input_shape, **options), 1, rtol=1e-4)
    total = lambda w: np.sum(np.sin(w / sigma(w, input_shape, **options)))
    slope = (total(w + h * direction) - total(w - h * direction)) / (2 * h)
    np.testing.assert_allclose(np.sum(np.float64(gradient) * direction), slope, rtol=1e-2)
    # A zero kernel is kept, and the search resumes once it is nonzero.
    new, _, state = run(0 * w, start)
    assert not new.any()
    new, _, _ = run(w, state)
    np.testing.assert_allclose(sigma(np.float64(new), input_shape, **options), 1, rtol=1e-4)


def test_transform_takes_lists_and_stays_hashable():
    t = jw.ConvSpectralNorm([6, 5, 2], strides=[1, 2], padding=[[1, 1], (0, 1)], dilation=[1, 1])
    same = jw.ConvSpectralNorm((6, 5, 2), strides=(1, 2), padding=((1, 1), (0, 1)), dilation=(1, 1))
    assert t == same and hash(t) == hash(same)


def test_target_and_soft():
    kernel_shape, input_shape, options = LAYERS[0]
    t = jw.ConvSpectralNorm(input_shape, n_steps=30, target=lambda step: 1.0 + 0.5 * step, **options)

    @jax.jit
    def run(w):
        start = t.init(w, jax.random.key(0))
        state = jax.lax.fori_loop(0, 2, lambda _, state: t.update(w, state), start)  # steps 0 and 1
        return t.apply(w, state), dataclasses.replace(t, soft=True).apply(w, state)

    for size in (10, 0.01):
        w = jnp.float32(size * normal(*kernel_shape))
        hard, soft = run(w)
        np.testing.assert_allclose(sigma(np.float64(hard), input_shape, **options), 1.5, rtol=1e-4)
        if size == 10:
            np.testing.assert_allclose(sigma(np.float64(soft), input_shape, **options), 1.5, rtol=1e-4)
        else:
            np.testing.assert_array_equal(soft, w)
