"""Quantization: fake and stored, against float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from x64 import enable_x64

import jaxweights as jw
from jaxweights.core.axes import ATTENTION_IN, ATTENTION_OUT, CONV, DENSE

FLOATS = [jnp.float32, jnp.bfloat16, jnp.float16]
READINGS = [
    ((40, 30), DENSE, (0,)),
    ((3, 2, 8, 5), CONV, (0, 1, 2)),
    ((20, 4, 3), ATTENTION_IN, (0,)),
    ((4, 5, 6), ATTENTION_OUT, (0, 1)),
    ((3, 20, 4), DENSE.stacked(), (1,)),
    ((50,), None, (0,)),
]


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


# fake_quantize


def min_max(w, bits, over=None):
    """Returns the formula's result, and the distance of each weight from the nearest rounding tie in steps."""
    low, high = w.min(over, keepdims=True), w.max(over, keepdims=True)
    levels = 2**bits - 1
    position = (w - low) / (high - low) * levels
    return np.round(position) * (high - low) / levels + low, np.abs(position - np.floor(position) - 0.5)


fake_quantize = jax.jit(jw.fake_quantize, static_argnames=("bits", "axes"))


def test_fake_quantize_float64():
    w, all_bits = normal(30, 40), (1, 2, 4, 8, 16)
    with enable_x64(True):
        found = jax.jit(lambda w: [jw.fake_quantize(w, bits) for bits in all_bits])(w)
    for bits, out in zip(all_bits, found, strict=True):
        np.testing.assert_allclose(out, min_max(w, bits)[0], rtol=1e-12, atol=1e-15, err_msg=f"{bits} bits")


@pytest.mark.parametrize(("bits", "offset"), [(1, 0), (3, 10), (8, 0), (12, 10)])
def test_fake_quantize(bits, offset):
    weights = [jnp.asarray(normal(30, 40) + offset, dtype) for dtype in FLOATS]
    outs = jax.jit(lambda weights: [jw.fake_quantize(w, bits) for w in weights])(weights)
    for w, out in zip(weights, outs, strict=True):
        assert out.dtype == w.dtype
        expected, to_tie = min_max(np.float64(w), bits)
        sure = to_tie > 1e-5 * 2**bits
        assert sure.mean() > 0.9
        atol = 2 * float(jnp.finfo(w.dtype).eps) * np.abs(np.float64(w)).max()
        np.testing.assert_allclose(np.float64(out)[sure], expected[sure], atol=atol, err_msg=f"{w.dtype}")
        assert out.min() == w.min() and out.max() == w.max()


def test_fake_quantize_keeps_the_digits_of_a_distant_range():
    w = np.float32(1000 + np.linspace(0, 1, 200))
    expected, to_tie = min_max(w.astype(np.float64), 12)
    sure = to_tie > 0.01
    np.testing.assert_allclose(fake_quantize(w, 12)[sure], expected[sure], rtol=1.3e-7)


def test_fake_quantize_per_output_unit():
    readings = READINGS[:5]
    weights = [np.float32(normal(*shape)) for shape, _, _ in readings]

    @jax.jit
    def run(weights):
        functions = [jw.fake_quantize(w, 4, axes=axes) for w, (_, axes, _) in zip(weights, readings, strict=True)]
        transforms = [jw.FakeQuantize(4, per_unit=True, axes=axes) for _, axes, _ in readings]
        return functions, [t.apply(w, {}) for w, t in zip(weights, transforms, strict=True)]

    for w, out, of_transform, (shape, _, over) in zip(weights, *run(weights), readings, strict=True):
        expected, to_tie = min_max(w.astype(np.float64), 4, over)
        sure = to_tie > 1e-4
        np.testing.assert_allclose(np.asarray(out)[sure], expected[sure], atol=1e-6, err_msg=f"{shape}")
        np.testing.assert_array_equal(of_transform, out)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(-1e3, 1e3, width=16), min_size=12, max_size=12), st.sampled_from([1, 2, 5, 8]))
def test_fake_quantize_is_near_and_has_few_values(values, bits):
    w = np.float32(values)
    out = np.float64(fake_quantize(w, bits))
    span = float(w.max()) - float(w.min())
    rounding = 1e-6 * np.abs(w).max()
    assert (np.abs(out - w) <= span / (2**bits - 1) / 2 + rounding).all()
    assert len(np.unique(out)) <= 2**bits
    assert out.min() == w.min() and out.max() == w.max()


@pytest.mark.parametrize("dtype", FLOATS)
def test_fake_quantize_of_a_constant(dtype):
    for value in (0.0, -0.3, 6e4):
        w = jnp.full((3, 4), value, dtype)
        for axes in (None, DENSE):
            np.testing.assert_array_equal(fake_quantize(w, 3, axes=axes), w)


@pytest.mark.parametrize(("dtype", "size"), [(jnp.float32, 3.4e38), (jnp.bfloat16, 3.3e38), (jnp.float16, 65504)])
def test_fake_quantize_of_huge_weights(dtype, size):
    w = jnp.asarray(np.array([-1, -0.35, 0.1, 0.7, 1]) * size, dtype)
    for bits, out in zip((1, 2, 8), jax.jit(lambda w: [jw.fake_quantize(w, b) for b in (1, 2, 8)])(w), strict=True):
        expected, tolerance = min_max(np.float64(w), bits)[0], 2 * float(jnp.finfo(dtype).eps)
        np.testing.assert_allclose(np.float64(out) / size, expected / size, atol=tolerance, err_msg=f"{bits} bits")


def test_fake_quantize_gradient_is_straight_through():
    w, cotangent = jnp.float32(normal(4, 5)), jnp.float32(normal(4, 5, seed=1))
    for t in (jw.FakeQuantize(2), jw.FakeQuantize(2, per_unit=True)):
        np.testing.assert_array_equal(jax.vjp(lambda w, t=t: t.apply(w, {}), w)[1](cotangent)[0], cotangent)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_fake_quantize_of_nan(bad):
    out = fake_quantize(jnp.array([[bad, 1.0], [1.0, 2.0], [3.0, 4.0]]), 1, axes=DENSE)
    assert jnp.isnan(out[:, 0]).all()
    np.testing.assert_array_equal(out[:, 1], [1, 1, 4])


@pytest.mark.parametrize("shape", [(), (1,), (0, 3), (3, 0)])
def test_fake_quantize_of_little(shape):
    w = jnp.full(shape, 2.0)
    np.testing.assert_array_equal(jw.fake_quantize(w, 4), w)


# quantize, dequantize


def of_weight(q, matrix):
    """What is stored for the entries of a matrix, or for its columns, in the places of the weight, float64."""
    full = np.broadcast_to(matrix, (*matrix.shape[:-2], q.rows, matrix.shape[-1]))
    return np.float64(q.axes.weight(jnp.asarray(full), q.shape))


@pytest.mark.parametrize(("bits", "dtype"), [(2, jnp.float32), (4, jnp.bfloat16), (8, jnp.float16)])
def test_quantize(bits, dtype):
    @jax.jit
    def run(weights):
        stored = [jw.quantize(w, bits, axes=axes) for w, (_, axes, _) in zip(weights, READINGS, strict=True)]
        return stored, [jw.dequantize(q) for q in stored]

    weights, largest = [jnp.asarray(normal(*shape), dtype) for shape, _, _ in READINGS], 2 ** (bits - 1) - 1
    for w, q, back, (shape, _, over) in zip(weights, *run(weights), READINGS, strict=True):
        exact = np.float64(w)
        scale = np.abs(exact).max(over, keepdims=True) / largest
        codes, stored = of_weight(q, q.codes) - 2 ** (bits - 1), of_weight(q, q.scale.values())
        np.testing.assert_allclose(stored, np.broadcast_to(scale, shape), rtol=1e-6, err_msg=f"{shape}")
        words = -(-q.rows * bits // 32) * (w.size // q.rows)
        assert q.words.dtype == jnp.int32 and q.shape == shape and q.nbytes == 4 * (words + scale.size)
        position = exact / scale
        sure = np.abs(position - np.floor(position) - 0.5) > 1e-4
        np.testing.assert_array_equal(codes[sure], np.round(position)[sure], err_msg=f"{shape}")
        # |w − codes·s| <= s/2 for the stored scale
        assert (np.abs(exact - codes * stored) <= stored / 2 * (1 + 1e-5)).all(), shape
        assert back.dtype == dtype
        eps = float(jnp.finfo(dtype).eps)
        np.testing.assert_allclose(np.float64(back), codes * stored, rtol=eps, err_msg=f"{shape}")


def test_quantize_float64_keeps_its_bound_with_a_float32_scale():
    with enable_x64(True):
        w = normal(500, 4)
        q, back = jax.jit(lambda w: (q := jw.quantize(w, 8), jw.dequantize(q)))(w)
        scale, codes = np.float64(q.scale.values()), np.float64(q.codes) - 128
        assert q.scale.codes.dtype == jnp.float32 and back.dtype == jnp.float64
        largest = np.abs(w) > 127 * scale  # beyond the range if the float32 scale was rounded down
        assert (np.abs(w - codes * scale) <= scale / 2 * (1 + 1e-12)).all() and largest.sum() <= 4
        product = codes * scale
        np.testing.assert_allclose(back, product, rtol=1e-6)


def test_quantize_zero_units_and_nothing():
    w = jnp.array([[0.0, 1.0], [0.0, -2.0]])
    q = jw.quantize(w, 8)
    assert q.scale.values()[0, 0] == 0 and (q.codes[:, 0] == 128).all() and not jw.dequantize(q)[:, 0].any()
    for shape in ((0, 3), (3, 0), (0,)):
        assert jw.dequantize(jw.quantize(jnp.zeros(shape), 4)).shape == shape


@pytest.mark.parametrize(("dtype", "size"), [(jnp.float32, 1e38), (jnp.bfloat16, 1e38), (jnp.float16, 65504)])
def test_quantize_of_huge_weights(dtype, size):
    w = jnp.asarray(np.array([[1.0], [-0.5], [0.25]]) * size, dtype)
    back = jw.dequantize(jw.quantize(w, 8))
    assert jnp.isfinite(back).all()
    np.testing.assert_allclose(np.float64(back) / size, np.float64(w) / size, atol=1 / 254 + 0.01)


def test_quantized_arrays_go_through_jit_and_vmap():
    w = jnp.float32(normal(3, 8, 4))
    q = jax.jit(jax.vmap(lambda w: jw.quantize(w, 8)))(w)
    back = jax.vmap(jw.dequantize)(q)
    for i in range(3):
        np.testing.assert_array_equal(back[i], jw.dequantize(jax.jit(lambda w: jw.quantize(w, 8))(w[i])))
    leaves, structure = jax.tree.flatten(q)
    np.testing.assert_array_equal(jw.dequantize(jax.tree.unflatten(structure, leaves)), jw.dequantize(q))


# matmul


@pytest.mark.parametrize(("lead", "bits"), [((), 8), ((2, 3), 4)])
def test_matmul(lead, bits):
    layers = [
        ((40, 30), None, (40,), "...i,io->...o"),
        ((20, 4, 3), ATTENTION_IN, (20,), "...i,iop->...op"),
        ((4, 5, 6), ATTENTION_OUT, (4, 5), "...ij,ijo->...o"),
        ((6, 4, 5), jw.Axes(input=(1, 2), output=0), (4, 5), "...ij,oij->...o"),
        ((3, 2, 8, 5), CONV, (3, 2, 8), "...hwi,hwio->...o"),
        ((50,), None, (50,), "...i,i->..."),
    ]

    @jax.jit
    def run(inputs, weights):
        stored = [jw.quantize(w, bits, axes=axes) for w, (_, axes, _, _) in zip(weights, layers, strict=True)]
        return stored, [jw.matmul(x, q) for x, q in zip(inputs, stored, strict=True)]

    weights = [np.float32(normal(*shape)) for shape, *_ in layers]
    inputs = [np.float32(normal(*lead, *features, seed=1)) for _, _, features, _ in layers]
    for x, q, y, (shape, *_, spec) in zip(inputs, *run(inputs, weights), layers, strict=True):
        scaled = (np.float64(q.codes) - 2 ** (bits - 1)) * np.float64(q.scale.values())
        expected = np.einsum(spec, x.astype(np.float64), np.asarray(q.axes.weight(scaled, shape)))
        np.testing.assert_allclose(y, expected, atol=1e-4, err_msg=f"{shape}")


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_matmul_accumulates_in_float32(dtype):
    x, q = jnp.full((3000,), 1.0, dtype), jw.quantize(jnp.ones((3000, 2)), 8)
    out = jw.matmul(x, q)
    assert out.dtype == dtype
    np.testing.assert_array_equal(out, jnp.full(2, 3000.0, dtype))


def test_matmul_gradient_of_the_input():
    q = jw.quantize(jnp.float32(normal(6, 4)), 8)
    gradient = jax.grad(lambda x: jw.matmul(x, q).sum())(jnp.ones(6))
    expected = ((np.float64(q.codes) - 128) * np.float64(q.scale.values())).sum(1)
    np.testing.assert_allclose(gradient, expected, atol=1e-5)


def test_numpy_arrays_multiply_stored_weights():
    """From the left, in any float dtype and rank, as JAX's arrays do."""
    w = jnp.asarray(np.where(np.arange(64)[:, None] % 4 < 2, normal(64, 32), 0), jnp.float32)
    for stored in (jw.quantize(w, 8), jw.sparse.pack(w), jw.sparse.pack_blocks(w, block=(4, 4))):
        for shape in ((64,), (2, 64), (3, 1, 64)):
            x = normal(*shape, seed=1)
            for dtype in (np.float64, np.float32, np.float16):
                y = x.astype(dtype) @ stored
                assert isinstance(y, jax.Array) and y.dtype == jax.dtypes.canonicalize_dtype(dtype)
                tolerance = 2e-2 if dtype is np.float16 else 1e-4
                np.testing.assert_allclose(y, x @ np.float64(stored.todense()), rtol=tolerance, atol=tolerance)
        for bad in (np.ones((2, 64), int), [1.0] * 64):
            with pytest.raises(TypeError, match="x must be"):
                bad @ stored
        with pytest.raises(ValueError, match="input axes"):
            np.ones((2, 63)) @ stored


def test_the_remedy_for_a_tree_works():
    params = {"kernel": jnp.float32(normal(8, 4)), "bias": jnp.ones(4)}
    with pytest.raises(TypeError, match=r"jax\.tree\.map"):
        jw.quantize(params, 8)
    stored = jax.tree.map(lambda w: jw.quantize(w, 8), params)
    with pytest.raises(TypeError, match=r"jaxweights\.densify\(tree\)"):
        jw.dequantize(stored)
    back = jw.densify(stored)
    np.testing.assert_allclose(back["kernel"], params["kernel"], atol=np.abs(params["kernel"]).max() / 250)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: jw.fake_quantize(jnp.ones(3), 0), ValueError, "bits"),
        (lambda: jw.fake_quantize(jnp.ones(3), 17), ValueError, "bits"),
        (lambda: jw.fake_quantize(jnp.ones(3), 2.0), TypeError, "bits"),
        (lambda: jw.quantize(jnp.ones(3), 1), ValueError, "bits"),
        (lambda: jw.quantize(jnp.ones(3), 9), ValueError, "bits"),
        (lambda: jw.dequantize(jnp.ones(3)), TypeError, "QuantizedArray"),
        (lambda: jw.matmul(jnp.ones(3), jnp.ones((3, 2))), TypeError, "stored weight"),
        (lambda: jw.matmul(jnp.ones(4), jw.quantize(jnp.ones((3, 2)), 8)), ValueError, "input axes"),
        (
            lambda: jw.matmul(jnp.ones(3), jw.quantize(jnp.ones((5, 3, 2)), 8, axes=DENSE.stacked())),
            ValueError,
            "batch",
        ),
    ],
)
def test_errors(make, error, message):
    with pytest.raises(error, match=message):
        make()
