"""Batch normalization: against float64 NumPy and PyTorch, and folded into the preceding layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from x64 import enable_x64

import jaxweights as jw
from jaxweights.core.axes import CONV_TRANSPOSE_KERNEL


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def affine(n):
    return normal(n, seed=3) + 1, normal(n, seed=4)


def oracle(x, scale=1.0, bias=0.0, eps=1e-5, where=None):
    x, over = np.float64(x), tuple(range(np.ndim(x) - 1))
    where = True if where is None else np.broadcast_to(where, x.shape)
    mean, var = x.mean(over, where=where), x.var(over, where=where)
    return (x - mean) / np.sqrt(var + eps) * scale + bias


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_formula(dtype):
    xs = [jnp.asarray(normal(*shape) * 2 + 3, dtype) for shape in ((8, 3), (4, 5, 3), (2, 4, 5, 3))]
    scale, bias = np.float32(affine(3))

    @jax.jit
    def run(x):
        return jw.batch_norm(x, scale, bias), jw.batch_norm(x, eps=0.5), jw.batch_stats(x)

    tolerance = 16 * float(jnp.finfo(dtype).eps)
    for x in xs:
        out, smoothed, (mean, var, count) = run(x)
        over = tuple(range(x.ndim - 1))
        assert out.dtype == dtype
        np.testing.assert_allclose(np.float64(out), oracle(x, scale, bias), atol=tolerance)
        np.testing.assert_allclose(np.float64(smoothed), oracle(x, eps=0.5), atol=tolerance)
        np.testing.assert_allclose(mean, np.float64(x).mean(over), rtol=1e-6)
        np.testing.assert_allclose(var, np.float64(x).var(over), rtol=1e-5)
        assert (count == np.prod(x.shape[:-1])).all()
    mean, var, _ = jw.batch_stats(xs[0])
    given, own = (np.float32(jw.batch_norm(xs[0], **options)) for options in ({"mean": mean, "var": var}, {}))
    np.testing.assert_allclose(given, own, rtol=0, atol=tolerance)


def test_torch():
    torch = pytest.importorskip("torch", reason="PyTorch is the second oracle")
    scale, bias = affine(3)
    for precision, tolerance in ((np.float32, 2e-6), (np.float64, 1e-13)):
        x = (normal(6, 4, 5, 3) * 2 + 1).astype(precision)
        channels_first = torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1))).requires_grad_()
        weights = [torch.from_numpy(a.astype(precision)).requires_grad_() for a in (scale, bias)]
        theirs = torch.nn.functional.batch_norm(channels_first, None, None, *weights, training=True)
        cotangent = normal(6, 4, 5, 3, seed=5).astype(precision)
        theirs.backward(torch.from_numpy(np.moveaxis(cotangent, -1, 1).copy()))
        with enable_x64(precision is np.float64):
            run = lambda cotangent, *args: (lambda y, pull: (y, pull(cotangent)))(*jax.vjp(jw.batch_norm, *args))
            ours, gradients = jax.jit(run)(cotangent, x, *(a.astype(precision) for a in (scale, bias)))
        np.testing.assert_allclose(ours, np.moveaxis(theirs.detach().numpy(), 1, -1), atol=tolerance)
        expected = [np.moveaxis(channels_first.grad.numpy(), 1, -1), *(w.grad.numpy() for w in weights)]
        for found, grad in zip(gradients, expected, strict=True):
            np.testing.assert_allclose(found, grad, atol=50 * tolerance)


def test_gradient():
    with enable_x64(True):
        args = tuple(map(jnp.asarray, (normal(4, 3, 2), *affine(2))))
        where = jnp.asarray(normal(4, 3, 1, seed=6) > -0.5)
        both = jax.jit(lambda *args: (jw.batch_norm(*args), jw.batch_norm(*args, where=where)))
        check_grads(both, args, order=1, rtol=1e-6)


def test_where():
    x, where = np.float32(normal(6, 5, 3)), np.random.default_rng(1).random((6, 5, 1)) < 0.5
    out = jax.jit(lambda x, where: jw.batch_norm(x, where=where))(x, where)
    np.testing.assert_allclose(out, oracle(x, where=where), atol=1e-5)


@pytest.mark.parametrize("n_devices", [2, 4])
def test_axis_name_is_one_big_batch(n_devices):
    x, where = np.float32(normal(8, 3) + 5), np.random.default_rng(2).random((8, 1)) < 0.5
    where[:2], where[2:4] = True, False  # uneven counts; one device of four has none
    split = lambda a: jnp.asarray(a).reshape(n_devices, -1, a.shape[-1])
    synced = jax.jit(jax.vmap(lambda x, w: jw.batch_norm(x, where=w, axis_name="d"), axis_name="d"))
    np.testing.assert_allclose(synced(split(x), split(where)).reshape(8, 3), oracle(x, where=where), atol=1e-5)


def test_a_distant_running_mean_is_one_float(optimizing):
    """In evaluation the error is that of the mean as given, 5e-4 at 1e4."""
    x, scale = np.float32(normal(512, 8) + 1e4), np.float32(normal(8, seed=1))
    mean, var = x.mean(0, dtype=np.float64) + 2e-4, x.var(0, dtype=np.float64)
    rounded = np.float64(np.float32(mean))
    out = jax.jit(lambda x: jw.batch_norm(x, scale, mean=mean, var=var), compiler_options=optimizing)(x)
    np.testing.assert_allclose(out, (x - rounded) / np.sqrt(var + 1e-5) * scale, rtol=1e-5, atol=2e-6)
    assert np.abs(rounded - mean).max() > 1e-4


def test_constant_features():
    x = jnp.full((5, 2), 3.0)
    for eps in (1e-5, 0.0):
        norm = lambda x, eps=eps: jw.batch_norm(x, None, jnp.array([1.0, 2.0]), eps=eps)
        out, gradient = jax.jit(lambda x, f=norm: (f(x), jax.vjp(f, x)[1](jnp.ones_like(x))[0]))(x)
        np.testing.assert_array_equal(out, [[1, 2]] * 5)
        assert jnp.isfinite(gradient).all()


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0,)])
def test_nothing(shape):
    assert jw.batch_norm(jnp.ones(shape)).shape == shape


def test_no_entry_counts():
    mean, var, count = jw.batch_stats(jnp.ones((4, 2)), where=jnp.zeros((4, 1), bool))
    assert not mean.any() and not var.any() and not count.any()


def test_float16_is_computed_in_float32():
    x = jnp.float16([[6e4], [-6e4], [6e4], [-6e4]])
    np.testing.assert_array_equal(jw.batch_norm(x), [[1], [-1], [1], [-1]])


def test_nan_stays_in_its_feature():
    out = jw.batch_norm(jnp.array([[jnp.nan, 1.0], [1.0, 3.0]]))
    assert jnp.isnan(out[:, 0]).all()
    np.testing.assert_allclose(out[:, 1], [-1, 1], atol=1e-4)


# Folding


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_fold_of_a_dense_layer(dtype):
    kernel, x = normal(5, 3).astype(dtype), normal(7, 5)
    bias, mean, offset, scale = (normal(3, seed=s) for s in (1, 2, 3, 4))
    var = np.array([1e-12, 0.5, 30.0])
    arrays = {"mean": mean, "var": var, "scale": scale, "offset": offset}
    folded, shift = jw.fold_batch_norm(
        jnp.asarray(kernel), jnp.float32(bias), **{k: jnp.float32(v) for k, v in arrays.items()}
    )
    assert folded.dtype == shift.dtype == dtype
    before = x @ np.float64(kernel) + bias
    expected = (before - mean) / np.sqrt(var + 1e-5) * scale + offset
    size = np.abs(expected).max(0)
    np.testing.assert_allclose(
        (x @ np.float64(folded) + np.float64(shift)) / size, expected / size, atol=4 * float(jnp.finfo(dtype).eps)
    )


def test_fold_of_a_transposed_convolution():
    kernel, mean, var = normal(3, 3, 4, 2), normal(4, seed=1), np.exp(normal(4, seed=2))
    folded, shift = jw.fold_batch_norm(
        jnp.float32(kernel), mean=jnp.float32(mean), var=jnp.float32(var), axes=CONV_TRANSPOSE_KERNEL
    )
    factor = 1 / np.sqrt(var + 1e-5)
    np.testing.assert_allclose(folded, kernel * factor[:, None], rtol=1e-5)
    np.testing.assert_allclose(shift, -mean * factor, rtol=1e-5)


@pytest.mark.parametrize("axes", [jw.Axes(-2, -1, batch=0), jw.Axes(-1, -2, batch=0)])
def test_fold_into_a_stack_of_layers_after_it(axes):
    kernel, bias, x = normal(2, 4, 3), normal(2, 3, seed=5), normal(2, 7, 4)
    mean, offset, scale = (normal(2, 4, seed=s) for s in (1, 2, 3))
    var = np.exp(normal(2, 4, seed=4))
    arrays = {"mean": mean, "var": var, "scale": scale, "offset": offset, "bias": bias}
    stored = kernel if axes.output == (-1,) else kernel.transpose(0, 2, 1)
    folded, shift = jw.fold_batch_norm(
        jnp.float32(stored), **{k: jnp.float32(v) for k, v in arrays.items()}, eps=0.1, axes=axes, follows=True
    )
    normed = (x - mean[:, None]) / np.sqrt(var[:, None] + 0.1) * scale[:, None] + offset[:, None]
    found = x @ np.asarray(axes.matrix(folded), np.float64) + np.float64(shift)[:, None]
    np.testing.assert_allclose(found, normed @ kernel + bias[:, None], rtol=1e-4, atol=1e-5)


def test_fold_of_a_dead_channel_is_finite():
    zero = jnp.zeros(2)
    for eps in (1e-5, 0.0):
        folded, shift = jw.fold_batch_norm(jnp.ones((3, 2)), mean=zero, var=zero, eps=eps)
        assert jnp.isfinite(folded).all() and jnp.isfinite(shift).all()


# Running statistics


def test_running_stats():
    old = (jnp.array([1.0, 2.0]), jnp.array([3.0, 4.0]))
    new = (jnp.array([5.0, 9.0]), jnp.array([7.0, 9.0]), jnp.array([2.0, 0.0]))
    mean, var = jw.running_stats(old, new, 0.75)
    np.testing.assert_array_equal(mean, [2, 2])
    np.testing.assert_array_equal(var, [4, 4])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: jw.batch_norm(jnp.float32(1)), ValueError, "scalar"),
        (lambda: jw.batch_norm(jnp.ones((2, 3)), jnp.ones(2)), ValueError, r"scale must have shape \(3,\)"),
        (lambda: jw.batch_norm(jnp.ones((2, 3)), mean=jnp.ones(3)), ValueError, "var is missing"),
        (lambda: jw.batch_norm(jnp.ones((2, 3)), eps=-1.0), ValueError, "eps"),
        (lambda: jw.batch_norm(jnp.ones((2, 3)), where=jnp.ones(3)), TypeError, "boolean"),
        (lambda: jw.batch_norm(jnp.ones((2, 3)), where=jnp.ones(2, bool)), ValueError, "broadcast"),
        (lambda: jw.fold_batch_norm(jnp.ones((2, 3)), mean=jnp.ones(2), var=jnp.ones(3)), ValueError, "mean must"),
    ],
)
def test_errors(make, error, message):
    with pytest.raises(error, match=message):
        make()
