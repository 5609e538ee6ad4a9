"""Layer, RMS, group and instance normalization, against float64 NumPy and PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from x64 import enable_x64

import jaxweights as jw


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def standardized(x, over, eps=1e-6):
    x = np.float64(x)
    return (x - x.mean(over, keepdims=True)) / np.sqrt(x.var(over, keepdims=True) + eps)


LAYERS = [  # shape, axis, feature shape, and feature shape that broadcasts over samples
    ((6,), -1, (6,), (6,)),
    ((4, 6), -1, (6,), (6,)),
    ((4, 5, 6), 1, (5,), (5, 1)),
    ((4, 5, 6), (1, 2), (5, 6), (5, 6)),
    ((4, 5, 6), (-1, 0), (4, 6), (4, 1, 6)),
]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_layer_and_rms_norm(dtype):
    xs = [jnp.asarray(normal(*shape) * 2 + 3, dtype) for shape, *_ in LAYERS]
    scales, biases = ([np.float32(normal(*of, seed=seed)) for _, _, of, _ in LAYERS] for seed in (1, 2))

    def norms(x, scale, bias, axis):
        layer = jw.layer_norm(x, scale, bias, axis=axis), jw.layer_norm(x, axis=axis, eps=0.5)
        return *layer, jw.rms_norm(x, axis=axis), jw.rms_norm(x, scale, axis=axis)

    run = jax.jit(lambda *args: [norms(*arrays, axis) for *arrays, (_, axis, *_) in zip(*args, LAYERS, strict=True)])
    for x, scale, bias, found, layer in zip(xs, scales, biases, run(xs, scales, biases), LAYERS, strict=True):
        _, axis, _, expand = layer
        exact, scale, bias = np.float64(x), scale.reshape(expand), bias.reshape(expand)
        rms = exact / np.sqrt((exact**2).mean(axis, keepdims=True) + 1e-6)
        goals = standardized(x, axis) * scale + bias, standardized(x, axis, 0.5), rms, rms * scale
        for out, goal in zip(found, goals, strict=True):
            assert out.dtype == dtype
            tolerance = 16 * float(jnp.finfo(dtype).eps)
            np.testing.assert_allclose(np.float64(out), goal, atol=tolerance, err_msg=f"{layer}")


def test_group_norm():
    cases = [((3, 6), 2), ((3, 6), 1), ((2, 4, 6), 3), ((2, 4, 5, 6), 6)]
    scale, bias = np.float32(normal(6, seed=1)), np.float32(normal(6, seed=2))
    ours = lambda x, n: (jw.group_norm(x, n_groups=n), jw.group_norm(x, scale, bias, n_groups=n))
    xs = [np.float32(normal(*shape) + 2) for shape, _ in cases]
    run = jax.jit(lambda xs: [ours(x, n) for x, (_, n) in zip(xs, cases, strict=True)])
    for x, (plain, affine), (shape, n_groups) in zip(xs, run(xs), cases, strict=True):
        grouped = np.float64(x).reshape(shape[0], -1, n_groups, 6 // n_groups)
        expected, case = standardized(grouped, (1, 3)).reshape(shape), f"{shape} in {n_groups} groups"
        tolerance = 16 * float(jnp.finfo(jnp.float32).eps)
        np.testing.assert_allclose(np.float64(plain), expected, atol=tolerance, err_msg=case)
        np.testing.assert_allclose(np.float64(affine), expected * scale + bias, atol=tolerance, err_msg=case)


@pytest.mark.parametrize("shape", [(3, 5, 4), (2, 3, 4, 5)])
def test_instance_norm(shape):
    x, scale = jnp.float32(normal(*shape) + 2), np.float32(normal(shape[-1], seed=1))
    expected = standardized(x, tuple(range(1, len(shape) - 1))) * scale
    np.testing.assert_allclose(jax.jit(jw.instance_norm)(x, scale), expected, atol=1e-5)


def vjp(f, cotangent, *args):
    """Value and gradients of `f`, compiled together."""

    @jax.jit
    def run(cotangent, *args):
        out, pull = jax.vjp(f, *args)
        return out, pull(cotangent)

    return run(jnp.asarray(cotangent), *map(jnp.asarray, args))


@pytest.mark.parametrize("name", ["layer", "rms", "group", "instance"])
def test_torch(name):
    torch = pytest.importorskip("torch", reason="PyTorch is the second oracle")
    functional = torch.nn.functional
    scale, bias = normal(6, seed=1), normal(6, seed=2)
    first = lambda x: torch.movedim(x, -1, 1)
    last = lambda x: torch.movedim(x, 1, -1)
    ours, theirs = {
        "layer": (jw.layer_norm, lambda x, w, b: functional.layer_norm(x, (6,), w, b, eps=1e-6)),
        "rms": (lambda x, w, b: jw.rms_norm(x, w), lambda x, w, b: functional.rms_norm(x, (6,), w, eps=1e-6)),
        "group": (
            lambda x, w, b: jw.group_norm(x, w, b, n_groups=2),
            lambda x, w, b: last(functional.group_norm(first(x), 2, w, b, eps=1e-6)),
        ),
        "instance": (
            jw.instance_norm,
            lambda x, w, b: last(functional.instance_norm(first(x), weight=w, bias=b, eps=1e-6)),
        ),
    }[name]
    for precision, tolerance in ((np.float32, 1e-5), (np.float64, 1e-12)):
        args = [a.astype(precision) for a in (normal(4, 5, 3, 6) * 2 + 1, scale, bias)]
        cotangent = normal(4, 5, 3, 6, seed=5).astype(precision)
        tensors = [torch.from_numpy(a).requires_grad_() for a in args]
        expected = theirs(*tensors)
        expected.backward(torch.from_numpy(cotangent))
        with enable_x64(precision is np.float64):
            out, gradients = vjp(ours, cotangent, *args)
        np.testing.assert_allclose(out, expected.detach().numpy(), atol=tolerance)
        for found, tensor in zip(gradients, tensors, strict=True):
            if tensor.grad is not None:
                np.testing.assert_allclose(found, tensor.grad.numpy(), atol=20 * tolerance)


def test_gradient():
    over_batch, in_groups = lambda x: jw.layer_norm(x, axis=(0, 2)), lambda x: jw.group_norm(x, n_groups=2)
    norms = jw.layer_norm, jw.rms_norm, over_batch, in_groups, jw.instance_norm
    with enable_x64(True):
        check_grads(jax.jit(lambda x: [f(x) for f in norms]), (jnp.asarray(normal(3, 2, 4)),), order=1, rtol=1e-6)


NORMS = [jw.layer_norm, jw.rms_norm, lambda x, **k: jw.group_norm(x, n_groups=1, **k), jw.instance_norm]


@pytest.mark.parametrize("f", NORMS)
def test_constant_samples(f):
    both = lambda x: [f(x, eps=eps) for eps in (1e-6, 0.0)]
    run = jax.jit(lambda x: (both(x), jax.vjp(both, x)[1]([jnp.ones_like(x)] * 2)[0]))
    for value in (0.0, 3.0):
        outs, gradient = run(jnp.full((2, 3, 4), value))
        for out in outs:
            np.testing.assert_allclose(out, np.full((2, 3, 4), f is jw.rms_norm and value > 0), atol=1e-6)
        assert jnp.isfinite(gradient).all()


@pytest.mark.parametrize("f", NORMS)
def test_nothing(f):
    for shape in ((0, 3, 4), (2, 0, 4), (2, 3, 0)):
        assert f(jnp.ones(shape)).shape == shape


@pytest.mark.parametrize("f", NORMS)
def test_float16_is_computed_in_float32(f):
    x = jnp.float16([[[6e4], [-6e4], [6e4], [-6e4]]]).swapaxes(1, 1 if f is jw.instance_norm else 2)
    np.testing.assert_array_equal(jax.jit(f)(x).ravel(), [1, -1, 1, -1])


def test_a_sample_whose_sum_is_beyond_the_range_is_nan():
    out = jax.jit(jw.layer_norm)(jnp.stack([jnp.full(64, 1e38).at[0].set(0), jnp.arange(64.0)]))
    assert jnp.isnan(out[0]).all() and jnp.isfinite(out[1]).all()


def test_nan_stays_in_its_sample():
    out = jw.layer_norm(jnp.array([[jnp.nan, 1.0], [1.0, 3.0]]))
    assert jnp.isnan(out[0]).all()
    np.testing.assert_allclose(out[1], [-1, 1], atol=1e-5)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: jw.layer_norm(jnp.float32(1)), ValueError, "scalar"),
        (lambda: jw.layer_norm(jnp.ones((2, 3)), jnp.ones(2)), ValueError, r"scale must have shape \(3,\)"),
        (lambda: jw.layer_norm(jnp.ones((2, 3)), axis=2), ValueError, "axis"),
        (lambda: jw.layer_norm(jnp.ones((2, 3)), axis=(1, -1)), ValueError, "axis"),
        (lambda: jw.layer_norm(jnp.ones((2, 3)), axis=()), ValueError, "axis"),
        (lambda: jw.layer_norm(jnp.ones((2, 3)), eps=-1.0), ValueError, "eps"),
        (lambda: jw.group_norm(jnp.ones((2, 3)), n_groups=2), ValueError, "does not divide"),
        (lambda: jw.group_norm(jnp.ones(3), n_groups=1), ValueError, "batch"),
        (lambda: jw.instance_norm(jnp.ones((2, 3))), ValueError, "positions"),
    ],
)
def test_errors(make, error, message):
    with pytest.raises(error, match=message):
        make()
