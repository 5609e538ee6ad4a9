"""The shared derivative of the norms: values, residuals, masks, and all orders of differentiation."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from x64 import enable_x64

import jaxweights as jw

SHAPE = (4, 6, 8)
MASK = np.random.default_rng(9).random(SHAPE) < 0.7
POSITIONS = np.array([[True], [True], [False], [True], [False], [True]])  # along axis 1, for every sample and feature


def rms_norm(x, scale, bias, **options):
    return jw.rms_norm(x, scale, **options)


# name: (norm, shape it splits x into, axes of the statistics)
NORMS = {
    "layer": (jw.layer_norm, SHAPE, (2,)),
    "rms": (rms_norm, SHAPE, (2,)),
    "group": (functools.partial(jw.group_norm, n_groups=2), (4, 6, 2, 4), (1, 3)),
    "instance": (jw.instance_norm, SHAPE, (1,)),
    "batch": (jw.batch_norm, SHAPE, (0, 1)),
    "ghost": (functools.partial(jw.batch_norm, ghost_size=2), (2, 2, 6, 8), (1, 2)),
}
every_norm = pytest.mark.parametrize("name", NORMS)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def arguments(dtype):
    return tuple(jnp.asarray(a, dtype) for a in (normal(*SHAPE) * 2 + 1, normal(8, seed=1) + 1, normal(8, seed=2)))


def ours(name, where=None, **options):
    return functools.partial(NORMS[name][0], where=None if where is None else jnp.asarray(where), **options)


def formula(name, where=None, eps=1e-5):
    """Plain two-pass formula. JAX's own derivative of it in float64 is the oracle."""
    _, split, axis = NORMS[name]
    where = np.broadcast_to(True if where is None else where, SHAPE).reshape(split)
    average = lambda y: jnp.sum(y, axis, keepdims=True, where=where) / np.maximum(where.sum(axis, keepdims=True), 1)

    def f(x, scale, bias):
        y = x.reshape(split)
        y = y - (0 if name == "rms" else average(y))
        y = (y / jnp.sqrt(average(y**2) + eps)).reshape(SHAPE) * scale
        return y if name == "rms" else y + bias

    return f


@every_norm
@pytest.mark.parametrize("where", [None, MASK], ids=["whole", "masked"])
def test_values_and_gradients(name, where):
    with enable_x64(True):
        args, cotangent = arguments(jnp.float64), jnp.asarray(normal(*SHAPE, seed=3))
        tangents = tuple(jnp.asarray(normal(*a.shape, seed=4 + i)) for i, a in enumerate(args))

        @jax.jit
        def both(args):
            """Returns (value, directional derivative, gradients) of ours and of the formula."""
            fs = ours(name, where, eps=1e-5), formula(name, where)
            return [(*jax.jvp(f, args, tangents), *jax.vjp(f, *args)[1](cotangent)) for f in fs]

        for found, expected in zip(*both(args), strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("name", ["layer", "batch"])
def test_second_derivatives_in_every_order(name):
    with enable_x64(True):
        (x, scale, bias), v = arguments(jnp.float64), jnp.asarray(normal(*SHAPE, seed=3))

        def orders(f, x, v):
            loss = lambda x: jnp.sum(jnp.sin(f(x, scale, bias)))
            along_v = lambda g: lambda x: jax.jvp(g, (x,), (v,))[1]
            backward_twice = jax.vjp(jax.grad(loss), x)[1](v)[0]
            return along_v(jax.grad(loss))(x), backward_twice, jax.grad(along_v(loss))(x), along_v(along_v(loss))(x)

        run = jax.jit(lambda *args: (orders(ours(name, eps=1e-5), *args), orders(formula(name), *args)[0]))
        (*found, along_v_twice), expected = run(x, v)
        for y in found:
            np.testing.assert_allclose(y, expected, rtol=1e-9)
        np.testing.assert_allclose(along_v_twice, np.vdot(expected, v), rtol=1e-9)


@pytest.mark.parametrize("name", ["layer", "rms"])
def test_jacobians_of_many_directions(name, optimizing):
    """XLA on CPU (jaxlib 0.10) computes wrong sums of products if `vmap` batches only one factor."""
    f, (x, scale, bias) = ours(name), (jnp.float32(normal(*s)) for s in ((8, 6, 16), (16,), (16,)))
    directions = jnp.float32(normal(768, 8, 6, 16, seed=1))
    push = lambda v: jax.jvp(lambda x: f(x, scale, bias), (x,), (v,))[1]
    pull = lambda v: jax.vjp(lambda x: f(x, scale, bias), x)[1](v)[0]
    for linear in (push, pull):
        together = jax.jit(jax.vmap(linear), compiler_options=optimizing)(directions)
        np.testing.assert_allclose(together[-8:], jax.lax.map(linear, directions[-8:]), atol=2e-5)


WIDE = (8, 64, 64)
WIDE_SPLIT = {"group": (8, 64, 2, 32), "ghost": (4, 2, 64, 64)}


def exact(name, x, cotangent, where=True, eps=1e-5):
    """The norm and its gradient in float64. Entries that do not count must have a cotangent of 0."""
    axis, split = NORMS[name][2], WIDE_SPLIT.get(name, WIDE)
    where = np.broadcast_to(where, WIDE).reshape(split)
    average = lambda y: y.mean(axis, keepdims=True, where=where)
    z, cotangent = (np.float64(a).reshape(split) for a in (x, cotangent))
    z = z if name == "rms" else z - average(z)
    deviation = np.sqrt(average(z**2) + eps)
    z = z / deviation
    gradient = cotangent - z * average(cotangent * z) - (0 if name == "rms" else average(cotangent))
    return z.reshape(WIDE), (np.where(where, gradient, 0) / deviation).reshape(WIDE)


def value_and_gradient(f, options):
    return jax.jit(lambda x, ct: (lambda y, pull: (y, *pull(ct)))(*jax.vjp(f, x)), compiler_options=options)


@every_norm
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_a_distant_mean_costs_no_digits(name, masked, optimizing):
    """Float32 holds a mean of 1e4 to 5e-4; with that alone, layer norm is off by 1e-3 at σ = 1, and by 0.1 at 0.005."""
    where = np.random.default_rng(9).random(WIDE) < 0.9 if masked else np.full(WIDE, True)
    run = value_and_gradient(
        lambda x: ours(name, where if masked else None, eps=1e-5)(x, jnp.ones(64), jnp.zeros(64)), optimizing
    )
    cotangent = np.float32(np.where(where, normal(*WIDE, seed=1), 0))
    ramp = np.broadcast_to(np.arange(64) * 2e-4 - 1e-3, WIDE)  # 16 distinct numbers; the first entries are the least
    for deviations, tolerance in ((normal(*WIDE), 2e-6), (0.005 * normal(*WIDE), 1e-5), (ramp, 1e-5)):
        x = np.float32(deviations + 1e4)
        for found, expected in zip(run(x, cotangent), exact(name, x, cotangent, where), strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=tolerance * max(1, np.abs(expected).max() / 4))


@every_norm
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_squares_may_be_beyond_the_range_of_the_dtype(name, masked, optimizing):
    """A power of two as factor changes no digit: without ε, the norm stays and the gradient is divided by it."""
    where = np.random.default_rng(9).random(WIDE) < 0.9 if masked else np.full(WIDE, True)
    norms = [
        lambda x, e=e: ours(name, where if masked else None, eps=e)(x, jnp.ones(64), jnp.zeros(64)) for e in (0.0, 1e-5)
    ]
    without, smoothed = (value_and_gradient(f, optimizing) for f in norms)
    cotangent = np.float32(np.where(where, normal(*WIDE, seed=1), 0))
    x = np.float32(normal(*WIDE) + 0.5)
    x[0, 0, 0], x[1, 1] = 40, 0  # an outlier, and a sample of 0 for layer and RMS norm
    for factor, run in ((2.0**100, without), (2.0**100, smoothed), (2.0**-100, without)):
        with np.errstate(divide="ignore", invalid="ignore"):
            y, gradient = (np.nan_to_num(a, posinf=0, neginf=0) for a in exact(name, x, cotangent, where, 0.0))
        found, slope = run(np.float32(x * factor), cotangent)
        np.testing.assert_allclose(found, y, rtol=1e-5, atol=1e-5)
        sampled = np.ones(WIDE, bool)
        sampled[1, 1] = name not in ("layer", "rms")  # there, the gradient is that of the smoothed root, or 0
        np.testing.assert_allclose((slope * factor)[sampled], gradient[sampled], rtol=1e-4, atol=1e-5)
        assert np.isfinite(slope).all()
    found, y = smoothed(np.float32(x * 2.0**-100), cotangent)[0], exact(name, x * 2.0**-100, cotangent, where)[0]
    np.testing.assert_allclose(found, y, rtol=1e-5, atol=1e-6 * np.abs(y).max())


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_large_samples_alone_are_computed_again(dtype):
    """The branch on CPUs and the sum elsewhere agree, under `vmap` too, to second derivatives."""
    f = lambda x: jw.layer_norm(x, eps=1e-5)
    x, v = (jnp.asarray(normal(3, 5, 64, seed=s), dtype) for s in (0, 1))
    factor = jnp.asarray([1, 2.0**70, 1], dtype)[:, None, None]

    @jax.jit
    def run(x, v):
        along = lambda g: lambda x, v: jax.jvp(g, (x,), (v,))[1]
        return [jax.vmap(g)(x, v) for g in (lambda x, v: f(x), along(f), along(jax.grad(lambda x: f(x)[..., 0].sum())))]

    tolerance = 2e-6 if dtype == jnp.float32 else 2**-6
    for i, (large, plain) in enumerate(zip(run(x * factor, v * factor), run(x, v), strict=True)):
        large = large * factor if i == 2 else large
        np.testing.assert_allclose(np.float32(large), np.float32(plain), rtol=20 * tolerance, atol=tolerance)


def test_a_constant_is_0_even_without_eps():
    constants = jnp.float32([0.1, 1e4 + 0.1, 1e-3, 1e30, 3e-30])
    x = jnp.broadcast_to(constants[:, None], (5, 1000))
    for eps in (0.0, jnp.float32(0.0)):
        np.testing.assert_array_equal(jax.jit(jw.layer_norm)(x, eps=eps).round(2), jnp.zeros_like(x))


# Residuals


def stored(f, *args):
    """Shapes and dtypes of the residuals of the backward pass."""
    return jax.tree.leaves(jax.eval_shape(lambda *args: jax.vjp(f, *args)[1], *args))


def nbytes(arrays):
    return sum(a.size * a.dtype.itemsize for a in arrays)


@every_norm
@pytest.mark.parametrize("where", [None, POSITIONS], ids=["whole", "masked"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_gradient_stores_x_in_its_own_dtype_and_numbers_per_statistic(name, where, dtype):
    args, (_, split, axis) = arguments(dtype), NORMS[name]
    n_statistics = np.prod([s for a, s in enumerate(split) if a not in axis])
    kept = stored(jax.jit(ours(name, where)), *args)
    assert [a.dtype for a in kept if a.size >= args[0].size] == [dtype]
    numbers = (1 if name == "rms" else 3) + (where is not None)
    limit = args[0].nbytes + 4 * n_statistics * numbers + 4 * 8 + 6
    assert nbytes(kept) <= limit


@pytest.mark.parametrize("name", ["layer", "rms", "batch"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_gradient_stores_at_most_half_of_what_flax_does_and_a_quarter_in_16_bits(name, dtype):
    x = jax.ShapeDtypeStruct((256, 512), dtype)
    options = {"use_running_average": False, "dtype": dtype} if name == "batch" else {"dtype": dtype}
    module = {"layer": nn.LayerNorm, "rms": nn.RMSNorm, "batch": nn.BatchNorm}[name](**options)
    variables = jax.eval_shape(module.init, jax.random.key(0), x)
    params, rest = variables["params"], {n: v for n, v in variables.items() if n != "params"}
    rest = jax.tree.map(jnp.zeros_like, rest)
    flax = lambda x, params: module.apply({"params": params, **rest}, x, mutable=list(rest))[0]
    mine = lambda x, params: NORMS[name][0](x, params["scale"], params.get("bias"))
    mine, flax = (nbytes(stored(f, x, params)) for f in (mine, flax))
    assert mine < flax / (1.95 if dtype == jnp.float32 else 3.9)


def test_frozen_statistics_store_x_in_its_own_dtype():
    x, scale, bias = arguments(jnp.bfloat16)
    mean, var = jnp.float32(normal(8, seed=3)), jnp.ones(8)
    kept = stored(lambda *a: jw.batch_norm(*a, mean=mean, var=var), x, scale, bias)
    assert [a.dtype for a in kept if a.size >= x.size] == [jnp.bfloat16]


@pytest.mark.parametrize("name", ["layer", "batch"])
def test_gradients_of_16_bits_are_summed_in_32(name, optimizing):
    """Compares with float64 on the rounded input. Summing 4,096 terms in bfloat16 would be off by several percent."""
    x, ct = (jnp.asarray(normal(4096, 4, seed=s), jnp.bfloat16) for s in (0, 1))
    f = NORMS[name][0]
    pull = jax.jit(lambda *args: jax.vjp(f, *args)[1](ct + 1), compiler_options=optimizing)
    dx, d_scale, d_bias = pull(x, jnp.ones(4), jnp.zeros(4))
    exact_x, exact_ct = np.float64(x), np.float64(ct + 1)
    axis = -1 if name == "layer" else 0
    z = exact_x - exact_x.mean(axis, keepdims=True)
    r = 1 / np.sqrt((z**2).mean(axis, keepdims=True) + (1e-6 if name == "layer" else 1e-5))
    z *= r
    average = lambda y: y.mean(axis, keepdims=True)
    np.testing.assert_allclose(d_scale, (z * exact_ct).sum(0), rtol=1e-5, atol=1e-3)
    np.testing.assert_allclose(d_bias, exact_ct.sum(0), rtol=1e-5)
    expected = r * (exact_ct - average(exact_ct) - z * average(z * exact_ct))
    np.testing.assert_allclose(np.float64(dx), expected, rtol=2**-8, atol=2e-2 * np.abs(expected).max() * 2**-6)


# Masks


def test_a_sample_in_which_nothing_counts_becomes_its_bias():
    x, scale, bias = arguments(jnp.float32)
    where = np.ones(SHAPE, bool)
    where[1] = False
    names = ("layer", "rms", "group", "instance")

    @jax.jit
    def run(*args):
        pull = lambda f: (lambda y, pull: (y, *pull(jnp.ones_like(y))))(*jax.vjp(f, *args))
        masked = {name: (*pull(ours(name, where)), ours(name)(*args)) for name in names}
        return masked, pull(ours("batch", np.zeros(SHAPE, bool)))

    masked, (y, dx, *_) = run(x, scale, bias)
    np.testing.assert_array_equal(y, np.broadcast_to(bias, SHAPE))
    assert not dx.any()
    for name, (y, dx, d_scale, _, whole) in masked.items():
        np.testing.assert_array_equal(y[1], np.broadcast_to(0 if name == "rms" else bias, SHAPE[1:]), err_msg=name)
        assert not dx[1].any() and np.isfinite(dx).all() and np.isfinite(d_scale).all(), name
        np.testing.assert_allclose(y[0], whole[0], rtol=1e-5, atol=1e-5, err_msg=name)


@every_norm
def test_what_does_not_count_may_be_nan_or_infinite(name):
    """Other entries and their gradients are unaffected if the loss ignores the masked entries."""
    x, scale, bias = arguments(jnp.float32)
    weight = jnp.where(MASK, normal(*SHAPE, seed=3), 0)

    @jax.jit
    def run(fill):
        y, pull = jax.vjp(ours(name, MASK), jnp.where(MASK, x, fill), scale, bias)
        return jnp.where(MASK, y, 0), *pull(weight)

    fills = np.zeros(SHAPE, np.float32), np.where(normal(*SHAPE, seed=5) < 0, np.nan, np.inf).astype(np.float32)
    for clean, filled in zip(*map(run, fills), strict=True):
        np.testing.assert_array_equal(clean, filled)


@pytest.mark.parametrize("name", ["layer", "group", "ghost"])
def test_a_mask_may_have_any_shape_that_broadcasts(name):
    masks = [normal(*shape, seed=4) > -0.5 for shape in ((), (8,), (6, 1), (4, 1, 1))]
    run = jax.jit(lambda *args: [[ours(name, w)(*args) for w in (m, np.broadcast_to(m, SHAPE))] for m in masks])
    for mask, (found, expected) in zip(masks, run(*arguments(jnp.float32)), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6, err_msg=str(mask.shape))
