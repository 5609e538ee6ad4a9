"""Products with quantized weights as GPUs and TPUs compute them, on a CPU, against float64 NumPy."""

import contextlib
import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import triton
from techniques.test_quantized_products import FORMATS, error, matrix_of

import jaxweights as jw
from jaxweights.formats import Format, Integers, ScaleFormat, integers
from jaxweights.techniques.quantization.products import gpu, tpu

gpu_times = partial(gpu.times, interpret=True)
# JAX 0.12 announces that kernels in Triton will go.
triton_is_deprecated = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")


def gpu_at_hand():
    """Where JAX is told of a GPU to lower for. Before 0.12, it needs none."""
    if not hasattr(triton, "is_gpu_device"):
        return contextlib.nullcontext()
    device = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", None, "gpu")
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("d",), abstract_device=device))


COMMON = ("int8", "int4 with zeros", "nf4 in two steps", "mxfp8", "nvfp4", "int3 with zeros")
REST = ("int2", "int5 in blocks", "int6", "fp8_e5m2", "binary", "eight levels", "per tensor", "odder block")


def weight(rows, columns, format):
    w = np.random.default_rng(rows).standard_normal((rows, columns))
    return jw.quantize(jnp.asarray(w, jnp.float32), format)


def inputs(n, rows, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(n).standard_normal((n, rows)), dtype)


def check(times, weights, ns, dtype=jnp.float32, bound=2e-6):
    """All products with all weights, in one program, against those with the unpacked weights."""
    rows = {name: q.rows for name, q in weights.items()}
    xs = {name: [inputs(n, rows[name], dtype) for n in ns] for name in weights}
    products = jax.jit(lambda xs, ws: {name: [times(x, ws[name]) for x in xs[name]] for name in ws})(xs, weights)
    for name, q in weights.items():
        dense = matrix_of(q, rows[name])
        for x, y in zip(xs[name], products[name], strict=True):
            assert y.dtype == jnp.float32
            assert error(y, x, dense) < bound, (name, x.shape)


def with_minimum(rows, columns):
    """As llama.cpp stores Q4_K: scales and minima in 8 bits, with factors for 2 blocks."""
    format = Format(Integers(4, 0, 15), 32, ScaleFormat("uint8", outer=2))
    q = weight(rows, columns, format)
    codes = np.random.default_rng(0).integers(0, 256, q.scale.codes.shape)
    minimum = dataclasses.replace(q.scale, codes=jnp.asarray(codes, jnp.uint8), outer=q.scale.outer * 0.5)
    return dataclasses.replace(q, minimum=minimum)


@pytest.mark.parametrize("names", [COMMON, pytest.param(REST, marks=pytest.mark.slow)], ids=["common", "rest"])
def test_the_kernel_of_gpus_multiplies_by_the_unpacked_weight(names):
    weights = {
        name: weight(512 if FORMATS[name].grid.bits in (1, 3, 5, 6, 7) else 256, 48, FORMATS[name]) for name in names
    }
    check(gpu_times, weights, (1, 3))


def test_the_kernel_of_gpus_takes_minima_many_rows_and_blocks_that_cut_words():
    check(gpu_times, {"minimum": with_minimum(256, 16), "cut": weight(128, 16, integers(4, block=20))}, (1, 17))


def test_the_kernel_of_gpus_multiplies_in_bfloat16_and_sums_in_float32():
    check(gpu_times, {"int4": weight(256, 32, integers(4, block=64))}, (1, 16), jnp.bfloat16, 2**-8)


def test_what_tiles_of_the_kernel_do_not_divide_is_multiplied_without_it():
    check(gpu_times, {"int4": weight(100, 7, integers(4, block=20)), "int3": weight(256, 16, integers(3))}, (2,))
    check(gpu_times, {"many": weight(128, 16, integers(4))}, (129,))


@triton_is_deprecated
@pytest.mark.parametrize("name", [*COMMON, *(pytest.param(name, marks=pytest.mark.slow) for name in REST)])
def test_the_kernel_is_lowered_for_gpus_without_one(name):
    q = jax.eval_shape(lambda w: jw.quantize(w, FORMATS[name]), jax.ShapeDtypeStruct((1024, 256), jnp.float32))
    for n in (1, 4):
        x = jax.ShapeDtypeStruct((n, 1024), jnp.float32)
        with gpu_at_hand():
            assert "triton" in lowered(x, q, "cuda")
        assert "triton" not in lowered(x, q, "cpu")


def lowered(x, q, *platforms):
    return jax.jit(lambda x, q: jw.matmul(x, q)).trace(x, q).lower(lowering_platforms=platforms).as_text()


@triton_is_deprecated
def test_products_are_lowered_for_gpus_whatever_jax_knows_of_them():
    q = weight(256, 64, "int4")
    exported = jax.export.export(jax.jit(jw.matmul), platforms=["cpu", "cuda", "tpu"])(inputs(2, 256), q)
    assert error(jax.jit(exported.call)(inputs(2, 256), q), inputs(2, 256), matrix_of(q, 256)) < 2e-6


@pytest.mark.parametrize("names", [COMMON, pytest.param(REST, marks=pytest.mark.slow)], ids=["common", "rest"])
def test_products_of_tpus_multiply_by_the_unpacked_weight(names, monkeypatch):
    check(tpu.times, {name: weight(256, 24, FORMATS[name]) for name in names}, (3,))
    monkeypatch.setattr(tpu, "_WORDS_OF_TILE", 24 * 8)  # at least 32 rows in a tile
    monkeypatch.setattr(tpu, "_VALUES_OF_TILE", 24 * 64)
    monkeypatch.setattr(tpu, "_LEAST", 32)
    check(tpu.times, {name: weight(416, 24, FORMATS[name]) for name in names}, (2,))
    check(tpu.times, {name: weight(251, 24, FORMATS[name]) for name in names}, (1,))


def test_products_of_tpus_take_minima_and_bfloat16():
    check(tpu.times, {"minimum": with_minimum(256, 16)}, (1, 3))
    check(tpu.times, {"int8": weight(256, 24, "int8"), "nf4": weight(256, 24, "nf4")}, (3,), jnp.bfloat16, 2**-8)


@pytest.mark.parametrize("times", [gpu_times, tpu.times], ids=["gpu", "tpu"])
@pytest.mark.parametrize("name", ["int8", "int4 in blocks", "int5 in blocks", "mxfp8"])
def test_every_code_in_every_field_of_a_word_is_decoded(times, name):
    bits = FORMATS[name].grid.bits
    rows, codes = 512, np.arange(512)[:, None] // 32 * 16 + np.arange(16)
    q = jw.quantize(jnp.ones((rows, 16)), FORMATS[name])
    codes = codes % (127 if name == "mxfp8" else 2**bits)  # 127 is NaN
    q = dataclasses.replace(q, words=jw.formats.pack(jnp.asarray(codes), bits))
    some = np.arange(0, rows, 5)
    y = jax.jit(times)(jnp.eye(rows)[some], q)
    np.testing.assert_array_equal(y, matrix_of(q, rows)[some].astype(np.float32))


@pytest.mark.parametrize("times", [gpu_times, tpu.times], ids=["gpu", "tpu"])
def test_products_of_gpus_and_tpus_run_in_a_shard_map(times):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("d",))
    q, x, spec = weight(256, 64, integers(4, block=64)), inputs(2, 256), jax.sharding.PartitionSpec
    of_columns = spec(None, "d")
    y = jax.jit(jax.shard_map(times, mesh=mesh, in_specs=(spec(), of_columns), out_specs=of_columns))(x, q)
    assert error(y, x, matrix_of(q, 256)) < 2e-6


def test_on_a_tpu_the_operands_of_a_bfloat16_product_are_bfloat16():
    q = jw.quantize(jnp.ones((256, 128)), "int4", block=128)
    for dtype, operands in (
        (jnp.bfloat16, "(tensor<4x256xbf16>, tensor<256x128xbf16>) -> tensor<4x128xf32>"),
        (jnp.float32, "(tensor<4x256xf32>, tensor<256x128xf32>) -> tensor<4x128xf32>"),
    ):
        lowered = jax.jit(lambda x, q: x @ q).trace(jnp.ones((4, 256), dtype), q).lower(lowering_platforms=("tpu",))
        products = [line for line in lowered.as_text().splitlines() if "dot_general" in line]
        assert len(products) == 1 and operands in products[0], products
