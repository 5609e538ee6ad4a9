"""Products with quantized weights, against float64 NumPy on codes that are unpacked bit by bit."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax import export
from x64 import enable_x64

import jaxweights as jw
from jaxweights.techniques.quantization.formats import NF4, NF4_DOUBLE, Format, format_of, integers
from jaxweights.techniques.quantization.grids import Integers, Levels
from jaxweights.techniques.quantization.products.int8 import int8_matmul
from jaxweights.techniques.quantization.products.product import times
from jaxweights.techniques.quantization.scales import ScaleFormat

NF4_VALUES = NF4.grid.values
FLOATS = {(2, 1): ml_dtypes.float4_e2m1fn, (4, 3): ml_dtypes.float8_e4m3fn, (5, 2): ml_dtypes.float8_e5m2}


def codes_of(words, bits, rows):
    """The codes, one bit at a time, from the description of the layout."""
    words = np.asarray(words).view(np.uint32)
    codes = np.zeros((rows, words.shape[1]), np.int64)
    sizes = [size for size in (8, 4, 2, 1) if bits & size]
    for row in range(rows):
        for bit in range(bits):
            low = 0
            period, word = (32, (row // 32) * bits) if len(sizes) > 1 else (32 // bits, row // (32 // bits))
            for size in sizes:
                if bit < low + size:
                    within = row % period
                    word += within // (32 // size)
                    at = size * (within % (32 // size)) + bit - low
                    codes[row] |= ((words[word] >> np.uint32(at)) & 1).astype(np.int64) << bit
                    break
                low += size
                word += size
    return codes


def values_of(codes, grid):
    """The values of codes in float64."""
    if isinstance(grid, Integers):
        return codes.astype(np.float64) - (2 ** (grid.bits - 1) if grid.low < 0 else 0)
    if isinstance(grid, Levels):
        return np.asarray(grid.values)[codes]
    return codes.astype(np.uint8).view(FLOATS[grid.exponent, grid.mantissa]).astype(np.float64)


def scales_of(scales, blocks, columns):
    codes = np.asarray(scales.codes)
    if scales.format.dtype == "float8_e8m0fnu":
        values = 2.0 ** (codes.astype(np.float64) - 127)
    else:
        values = codes.astype(np.float64)
    if scales.outer is not None:
        outer = np.asarray(scales.outer, np.float64)
        values = values * (outer.repeat(scales.format.outer, 0)[: len(values)] if scales.format.outer else outer)
    return np.broadcast_to(values, (blocks, columns))


def matrix_of(q, rows):
    """The weight in float64."""
    columns = q.words.shape[1]
    block = min(q.format.block or rows, rows)
    blocks = -(-rows // block)

    def over_rows(a):
        return a.repeat(block, 0)[:rows]

    w = values_of(codes_of(q.words, q.format.grid.bits, rows), q.format.grid)
    if q.zero is not None:
        w = w - over_rows(np.broadcast_to(np.asarray(q.zero, np.float64), (blocks, columns)))
    w = w * over_rows(scales_of(q.scale, blocks, columns))
    if q.minimum is not None:
        w = w - over_rows(scales_of(q.minimum, blocks, columns))
    if q.order is not None:
        original = np.empty_like(w)
        original[np.asarray(q.order)] = w
        w = original
    return w if q.input_scale is None else w * np.asarray(q.input_scale, np.float64)[:, None]


def error(y, x, w):
    """The largest error of x @ w in units of |x| @ |w|: a float32 sum of K products errs by K·2^-24 at most."""
    x, w = np.asarray(x, np.float64), np.asarray(w, np.float64)
    return np.max(np.abs(np.asarray(y, np.float64) - x @ w) / np.maximum(np.abs(x) @ np.abs(w), 1e-30), initial=0)


def asymmetric(bits, block):
    return integers(bits, block=block, symmetric=False)


FORMATS = {
    **{f"int{bits}": integers(bits) for bits in range(2, 9)},
    **{f"int{bits} in blocks": integers(bits, block=32) for bits in range(2, 9)},
    **{name: format_of(name) for name in ("mxfp4", "mxfp8", "fp8_e5m2", "ternary", "binary")},
    "nf4": NF4,
    "nf4 in two steps": dataclasses.replace(NF4_DOUBLE, block=16, scale=ScaleFormat("uint8", outer=2)),
    "nvfp4": jw.formats.NVFP4,
    "fp8_e4m3": jw.formats.FP8_E4M3,
    "eight levels": Format(Levels((-4.0, -2.0, -1.0, 0.0, 0.5, 1.0, 2.0, 4.0)), 32),
    "per tensor": integers(4, per_tensor=True),
    "int4 with zeros": asymmetric(4, 32),
    "int8 with zeros": asymmetric(8, None),
    "int3 with zeros": asymmetric(3, 64),
    "unsigned": Format(Integers(3, 0, 7), 32),
    "odd block": integers(4, block=24),
    "odder block": asymmetric(8, 7),
}


@pytest.mark.parametrize(
    ("rows", "columns"),
    [
        (72, 5),
        (13, 1),
        (513, 1000),
        pytest.param(100, 3, marks=pytest.mark.slow),
        pytest.param(1, 2, marks=pytest.mark.slow),
    ],
)
def test_products_are_those_with_the_unpacked_weight(rows, columns):
    rng = np.random.default_rng(rows)
    names = FORMATS if columns < 1000 else ("int8", "int3 in blocks", "int4 with zeros", "nf4", "mxfp4", "odd block")
    w = jnp.asarray(rng.standard_normal((rows, columns)), jnp.float32)
    weights = {name: jw.quantize(w, FORMATS[name]) for name in names}
    xs = [jnp.asarray(rng.standard_normal((m, rows)), jnp.float32) for m in (1, 9)]
    products = jax.jit(lambda xs, weights: {name: [x @ q for x in xs] for name, q in weights.items()})(xs, weights)
    for name, q in weights.items():
        dense = matrix_of(q, rows)
        for x, y in zip(xs, products[name], strict=True):
            assert error(y, x, dense) < 2e-6, (name, len(x))


@pytest.mark.parametrize("name", ["int8", "int4 in blocks", "mxfp8"])
def test_every_code_is_decoded_in_a_product(name):
    format = FORMATS[name]
    q = jw.quantize(jnp.ones((64, 256)), format)
    codes = np.arange(256)[None] % 2**format.grid.bits * np.ones((64, 1), int)
    q = dataclasses.replace(q, words=jw.formats.pack(jnp.asarray(codes), format.grid.bits))
    expected = matrix_of(q, 64)
    few, many = jax.jit(lambda q: [jnp.eye(64)[i : i + n] @ q for i, n in ((7, 1), (0, 64))])(q)
    np.testing.assert_array_equal(few, expected[7:8].astype(np.float32))  # NaN for the codes of NaN
    np.testing.assert_array_equal(many, expected.astype(np.float32))


def stored_with_everything(rows=64, columns=6):
    """A weight with zero points, minima, an order of its rows and scales of its inputs."""
    rng = np.random.default_rng(3)
    q = jw.quantize(jnp.asarray(rng.standard_normal((rows, columns)), jnp.float32), asymmetric(4, 32))
    return dataclasses.replace(
        q,
        minimum=q.scale,
        order=jnp.asarray(rng.permutation(rows), jnp.int32),
        input_scale=jnp.asarray(rng.uniform(0.5, 2, rows), jnp.float32),
    )


def test_unsigned_codes_with_zero_points_lose_no_accuracy():
    rng = np.random.default_rng(0)
    q = jw.quantize(jnp.asarray(rng.standard_normal((4096, 16)), jnp.float32), asymmetric(4, 128))
    q = dataclasses.replace(q, zero=q.zero + 8, format=dataclasses.replace(q.format, grid=Integers(4, 0, 15)))
    llama = dataclasses.replace(q, zero=None, minimum=dataclasses.replace(q.scale, codes=8 * q.scale.codes))
    x = jnp.asarray(1 + 0.1 * rng.standard_normal((4, 4096)), jnp.float32)
    for stored in (q, llama):
        dense = matrix_of(stored, 4096)
        for rows in (x[:1], x):
            exact = np.asarray(rows, np.float64) @ dense
            y = np.asarray(jax.jit(jw.matmul)(rows, stored), np.float64)
            assert np.linalg.norm(y - exact) < 3e-6 * np.linalg.norm(exact)


def test_a_loop_with_the_same_weight_does_not_dequantize_it_ahead(optimizing):
    q = jax.eval_shape(lambda w: jw.quantize(w, 4), jax.ShapeDtypeStruct((2048, 2048), jnp.float32))
    step = lambda q: lambda h, _: (jnp.tanh(h @ q), None)
    f = jax.jit(lambda h, q: jax.lax.scan(step(q), h, None, length=20)[0])
    for rows in (1, 4):
        memory = f.lower(jax.ShapeDtypeStruct((rows, 2048), jnp.float32), q).compile(optimizing).memory_analysis()
        assert memory.temp_size_in_bytes < 8 * 2**20  # half of the weight in float32


def test_order_minima_and_input_scales_are_applied():
    q = stored_with_everything()
    dense = matrix_of(q, 64)
    np.testing.assert_allclose(q.todense(), dense, rtol=1e-5, atol=1e-5)
    for m in (1, 3, 8):
        x = jax.random.normal(jax.random.key(m), (m, 64))
        assert error(jax.jit(jw.matmul)(x, q), x, dense) < 1e-6


def test_gradients_are_those_of_the_unpacked_weight():
    rng = np.random.default_rng(0)
    q = stored_with_everything(80)
    dense = matrix_of(q, 80)
    x, dy = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((5, 80), (5, 6)))
    dx = rng.standard_normal((5, 80)).astype(np.float32)

    @jax.jit
    def derivatives(q):
        y, back = jax.vjp(lambda x: x @ q, x)
        each = jax.vmap(lambda x, dy: jax.vjp(lambda x: x @ q, x)[1](dy)[0])(x, dy)
        through_vmap = jax.vjp(lambda x: jax.vmap(lambda x: x @ q)(x), x)[1](dy)[0]
        return y, *back(dy), each, through_vmap, jax.jvp(lambda x: x @ q, (x,), (dx,))[1]

    y, *gradients, forward = derivatives(q)
    assert error(y, x, dense) < 1e-6
    for gradient in gradients:
        assert error(gradient, dy, dense.T) < 1e-6
    assert error(forward, dx, dense) < 1e-6
    curvature = jax.jit(jax.hessian(lambda x: jnp.sum((x @ q) ** 2)))(x[0])
    np.testing.assert_allclose(curvature, 2 * dense @ dense.T, rtol=1e-4, atol=1e-4)


def test_scales_have_gradients():
    q = jw.quantize(jax.random.normal(jax.random.key(0), (64, 3)), 4, block=32)
    x = jax.random.normal(jax.random.key(1), (2, 64))

    def loss(scale):
        return jnp.sum(x @ dataclasses.replace(q, scale=dataclasses.replace(q.scale, codes=scale)))

    values = values_of(codes_of(q.words, 4, 64), q.format.grid)
    expected = (np.asarray(x, np.float64).sum(0)[:, None] * values).reshape(2, 32, 3).sum(1)
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(q.scale.codes), expected, rtol=1e-5, atol=1e-5)


def test_stacks_are_multiplied_in_vmap_and_scan():
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.standard_normal((4, 64, 64)) / 8, jnp.float32)
    stack = jw.quantize(w, 4, axes=jw.Axes(batch=0), block=32)
    dense = np.stack([matrix_of(jax.tree.map(lambda a, i=i: a[i], stack), 64) for i in range(4)])
    x = jnp.asarray(rng.standard_normal((4, 3, 64)), jnp.float32)

    @jax.jit
    def run(stack, x):
        both = jax.vmap(jw.matmul)(x, stack)
        weights = jax.vmap(jw.matmul, in_axes=(None, 0))(x[0], stack)
        grid = jax.vmap(jax.vmap(jw.matmul, in_axes=(0, None)), in_axes=(None, 0))(x, stack)
        chain, _ = jax.lax.scan(lambda h, q: (h @ q, None), x[0], stack)
        gradient = jax.grad(lambda x: jnp.sum(jax.lax.scan(lambda h, q: (h @ q, None), x, stack)[0]))(x[0])
        return both, weights, grid, chain, gradient

    both, weights, grid, chain, gradient = run(stack, x)
    x = np.asarray(x, np.float64)
    product = dense[0] @ dense[1] @ dense[2] @ dense[3]
    for got, expected in (
        (both, x @ dense),
        (weights, x[0] @ dense),
        (grid, x[None] @ dense[:, None]),
        (chain, x[0] @ product),
        (gradient, np.ones((3, 64)) @ product.T),
    ):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


def test_vmap_over_the_rows_of_x_makes_one_product():
    q, x = jw.quantize(jnp.ones((64, 8)), 4), jnp.ones((50, 64))
    program = str(jax.make_jaxpr(jax.vmap(lambda row: row @ q))(x))
    assert "50,64" in program and "while" not in program.split("scan")[0]
    np.testing.assert_allclose(jax.vmap(lambda row: row @ q)(x), np.full((50, 8), 64.0), rtol=1e-6)


def test_dtypes_of_x():
    q = jw.quantize(jax.random.normal(jax.random.key(0), (200, 8)), "nf4")
    dense, x = matrix_of(q, 200), jax.random.normal(jax.random.key(1), (2, 200))
    for dtype in (jnp.bfloat16, jnp.float16):
        x16 = x.astype(dtype)
        y = jax.jit(jw.matmul)(x16, q)
        assert y.dtype == dtype
        exact = np.asarray(x16, np.float64) @ dense
        np.testing.assert_allclose(np.asarray(y, np.float64), exact, rtol=float(jnp.finfo(dtype).eps), atol=1e-4)
    with enable_x64():
        x64 = jnp.asarray(np.asarray(x, np.float64))
        y = jax.jit(jw.matmul)(x64, q)
        assert y.dtype == jnp.float64
        assert error(y, x64, dense) < 1e-7


def test_int8_products_are_those_of_the_rounded_rows():
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.standard_normal((330, 6)), jnp.float32)
    names = ("int8", "int4 in blocks", "int3 with zeros", "int8 with zeros", "int2", "odder block", "per tensor")
    weights = {name: jw.quantize(w, FORMATS[name]) for name in names}
    weights["unsigned"] = jw.quantize(jnp.abs(w), Format(Integers(8, 0, 255), 64))
    xs = [jnp.asarray(rng.standard_normal((m, 330)), jnp.float32).at[:, 3].mul(5) for m in (2, 6)]
    products = jax.jit(lambda weights: {name: [int8_matmul(x, q) for x in xs] for name, q in weights.items()})(weights)
    for name, q in weights.items():
        dense = matrix_of(q, 330)
        for x, y in zip(xs, products[name], strict=True):
            x = np.asarray(x)
            unit = np.abs(x).max(1, keepdims=True) / np.float32(127)
            assert error(y, np.round(x / unit).astype(np.float64) * unit, dense) < 1e-6, name
            assert np.all(np.abs(y - x @ dense) <= np.abs(x).max(1, keepdims=True) * np.abs(dense).sum(0) / 253)
    q, dy = stored_with_everything(), jnp.ones((6, 6))
    dx = jax.jit(lambda x: jax.vjp(lambda x: int8_matmul(x, q), x)[1](dy)[0])(xs[1][:, :64])
    assert error(dx, dy, matrix_of(q, 64).T) < 1e-6
    zeros = int8_matmul(jnp.zeros((5, 330)), weights["int8"])
    np.testing.assert_array_equal(zeros, np.zeros((5, 6)))


def test_products_without_jit():
    q, x = jw.quantize(jax.random.normal(jax.random.key(0), (64, 8)), 4), jnp.ones((1, 64))
    with jax.disable_jit():
        assert error(x @ q, x, matrix_of(q, 64)) < 1e-6


@pytest.mark.parametrize("shape", [(0, 3), (5, 0)])
def test_empty_matrices(shape):
    q = jw.quantize(jnp.zeros(shape), 8)
    for m in (0, 1, 9):
        y = jnp.ones((m, shape[0])) @ q
        assert y.shape == (m, shape[1]) and not np.any(y)


def test_sharded_weights():
    devices = jax.devices()[:4]
    mesh = jax.sharding.Mesh(np.array(devices), ("d",))
    q = jw.quantize(jax.random.normal(jax.random.key(0), (256, 64)), 4, block=32)
    dense = matrix_of(q, 256)
    xs = [jax.random.normal(jax.random.key(m), (m, 256)) for m in (1, 8)]
    for spec in (jax.P(None, "d"), jax.P("d", None)):
        sharded = jax.device_put(q, jax.sharding.NamedSharding(mesh, spec))
        for x in xs:
            assert error(jax.jit(jw.matmul)(x, sharded), x, dense) < 1e-6
    local = jax.shard_map(jw.matmul, mesh=mesh, in_specs=(jax.P("d"), jax.P()), out_specs=jax.P("d"))
    assert error(jax.jit(local)(xs[1], q), xs[1], dense) < 1e-6


def test_one_export_serves_all_platforms():
    q = jw.quantize(jnp.ones((128, 64)), 4, block=32)
    kernels = [export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")]
    exporter = export.export(jax.jit(jw.matmul), platforms=["cpu", "tpu", "cuda"], disabled_checks=kernels)
    exported = exporter(jnp.ones((1, 128)), q)
    assert exported.platforms == ("cpu", "tpu", "cuda")
    np.testing.assert_allclose(exported.call(jnp.ones((1, 128)), q), np.full((1, 64), 128.0), rtol=1e-6)


@pytest.mark.parametrize("name", ["int8", "int4", "nf4", "mxfp4", "nvfp4", "int3"])
@pytest.mark.parametrize(
    "m", [1, 4, pytest.param(16, marks=pytest.mark.slow), pytest.param(128, marks=pytest.mark.slow)]
)
def test_no_dense_weight_is_made(name, m, optimizing):
    side = 4096
    q = jax.eval_shape(lambda w: jw.quantize(w, name), jax.ShapeDtypeStruct((side, side), jnp.float32))
    x = jax.ShapeDtypeStruct((m, side), jnp.float32)
    memory = jax.jit(times).lower(x, q).compile(optimizing).memory_analysis()
    limit = 8 * 2**20 + 2**12 + 4 * q.scale.codes.size  # 1/8 of the weight in float32, and the scales in it
    assert memory.temp_size_in_bytes <= limit
    gradient = jax.jit(jax.grad(lambda x, q: jnp.sum(times(x, q) ** 2))).lower(x, q).compile(optimizing)
    assert gradient.memory_analysis().temp_size_in_bytes <= 2 * limit
