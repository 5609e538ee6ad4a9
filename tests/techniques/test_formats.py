"""Formats of quantized weights, against NumPy in float64, ml_dtypes, and the tables of the papers."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from x64 import enable_x64

import jaxweights as jw
from jaxweights.formats import (
    BINARY,
    FP4,
    FP8_E4M3,
    FP8_E5M2,
    MXFP4,
    MXFP8,
    NF4,
    NF4_DOUBLE,
    NVFP4,
    TERNARY,
    Format,
    Integers,
    ScaleFormat,
    integers,
)
from jaxweights.techniques.quantization.formats import format_of

E4M3, E5M2, E2M1 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, ml_dtypes.float4_e2m1fn
NF4_VALUES = np.float32(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
        *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
        *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
        *(0.7229568362236023, 1.0),
    ]
)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# Formats

ROUNDED = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float8_e4m3fn": E4M3}


@dataclasses.dataclass(frozen=True)
class Reference:
    """A format in NumPy: the values of codes 0, 1, 2 ..., or the integers from `low`, or a dtype of ml_dtypes.

    Attributes:
      scale: a dtype of `ROUNDED`, "power", or the number of codes and the number of blocks of double quantization.
    """

    values: object
    block: int | None = None
    scale: object = "float32"
    zero: bool = False
    per_tensor: bool = False
    mean: bool = False

    def table(self):
        """Value of each code; NaN for codes that stand for no number."""
        if isinstance(self.values, type):
            bits = 4 if self.values is E2M1 else 8
            values = np.arange(2**bits).astype(np.uint8).view(self.values).astype(np.float64)
            return np.where(np.isfinite(values), values, np.nan)
        return np.float64(self.values)

    def peak(self):
        return np.nanmax(self.table())

    def store(self, w):
        """(codes, the weights of the codes, scales)"""
        table, (rows, columns) = self.table(), w.shape
        w, block = np.float64(w), self.block or rows
        n = -(-rows // block)
        axis = None if self.per_tensor else 0
        pieces = [w[i * block : (i + 1) * block] for i in range(n)]
        low = np.stack([np.broadcast_to(np.minimum(p.min(axis), 0), columns) for p in pieces])
        high = np.stack([np.broadcast_to(np.maximum(p.max(axis), 0), columns) for p in pieces])
        if self.zero:
            reach = (high - low) * self.peak() / (np.nanmax(table) - np.nanmin(table))
        elif self.mean:
            reach = np.stack([np.abs(p).mean(0) for p in pieces])
        else:
            reach = np.maximum(-low, high)
        scale = self.stored(reach / self.peak(), reach)
        zero = np.zeros_like(scale)
        if self.zero:
            zero = np.round(np.nanmin(table) - np.divide(low, scale, out=np.zeros_like(low), where=scale > 0))
        over = lambda a: np.repeat(a, block, 0)[:rows]
        x = np.divide(w, over(scale), out=np.zeros_like(w), where=over(scale) > 0) + over(zero)
        if isinstance(self.values, type):
            codes = np.clip(x, -self.peak(), self.peak()).astype(self.values).view(np.uint8).astype(int)
        elif isinstance(self.values, range):
            values = np.clip(np.round(x), self.values[0], self.values[-1])
            offset = 2 ** (len(self.values) - 1).bit_length() // 2 if self.values[0] < 0 else 0
            return values + offset, (values - over(zero)) * over(scale), scale
        else:
            codes = np.abs(x[..., None] - table).argmin(-1)
        return codes, table[codes] * over(scale), scale

    def stored(self, scale, reach):
        if self.scale == "power":
            return 2.0 ** (np.frexp(reach)[1] - np.frexp(self.peak())[1])
        if isinstance(self.scale, str):
            return scale.astype(ROUNDED[self.scale]).astype(np.float64)
        n_codes, n_blocks = self.scale
        outer = np.stack([scale[i - i % n_blocks :][:n_blocks].max(0) for i in range(len(scale))]) / n_codes
        return np.maximum(np.round(scale / outer), 1) * outer


class TwoLevels(Reference):
    """NVFP4: E4M3 scales times a factor for the matrix."""

    def stored(self, scale, reach):
        outer = np.float32(scale.max() / 448)
        return (scale / outer).astype(E4M3).astype(np.float64) * outer


def symmetric(bits):
    return range(1 - 2 ** (bits - 1), 2 ** (bits - 1))


def all_of(bits):
    return range(-(2 ** (bits - 1)), 2 ** (bits - 1))


FORMATS = {
    **{f"int{bits}": (f"int{bits}", Reference(symmetric(bits))) for bits in range(2, 9)},
    **{
        f"int{bits} with zero points": (
            integers(bits, block=32, symmetric=False),
            Reference(all_of(bits), 32, zero=True),
        )
        for bits in range(2, 9)
    },
    "int8 per tensor": (integers(8, per_tensor=True), Reference(symmetric(8), per_tensor=True)),
    "int5 per tensor, zero point": (
        integers(5, per_tensor=True, symmetric=False),
        Reference(all_of(5), per_tensor=True, zero=True),
    ),
    **{f"int4, {dtype}": (integers(4, block=16, scale=dtype), Reference(symmetric(4), 16, dtype)) for dtype in ROUNDED},
    "int4, f16, zero points": (
        integers(4, block=20, scale="float16", symmetric=False),
        Reference(all_of(4), 20, "float16", zero=True),
    ),
    "int6, powers": (integers(6, block=16, scale="float8_e8m0fnu"), Reference(symmetric(6), 16, "power")),
    "int6, powers, zero points": (
        integers(6, block=16, scale="float8_e8m0fnu", symmetric=False),
        Reference(all_of(6), 16, "power", zero=True),
    ),
    "int4, int8 times a factor": (
        integers(4, block=16, scale=ScaleFormat("int8", 2)),
        Reference(symmetric(4), 16, (127, 2)),
    ),
    "unsigned": (Format(Integers(8, 0, 255), 16, zero_point=True), Reference(range(256), 16, zero=True)),
    "nf4": ("nf4", Reference(NF4_VALUES, 64)),
    "nf4, doubly": (dataclasses.replace(NF4_DOUBLE, block=8), Reference(NF4_VALUES, 8, (255, 256))),
    "fp4": ("fp4", Reference(E2M1, 64)),
    "fp8_e4m3": ("fp8_e4m3", Reference(E4M3)),
    "fp8_e5m2": ("fp8_e5m2", Reference(E5M2)),
    "mxfp4": ("mxfp4", Reference(E2M1, 32, "power")),
    "mxfp8": ("mxfp8", Reference(E4M3, 32, "power")),
    "nvfp4": ("nvfp4", TwoLevels(E2M1, 16)),
    "ternary": ("ternary", Reference((-1, 0, 1), mean=True)),
    "binary": ("binary", Reference((-1, 1), mean=True)),
}


def test_every_format_stores_what_it_says():
    """Rows that divide neither by the blocks nor by the words; half of the weights are 0, and stay so."""
    w = normal(70, 6) * (normal(70, 6, seed=1) > 0) * np.float32([1, 1, 1, 1e-3, 30, 1])

    @jax.jit
    def run(w):
        stored = {name: jw.quantize(w, format) for name, (format, _) in FORMATS.items()}
        return {name: (q.codes, q.todense()) for name, q in stored.items()}

    for name, (codes, found) in run(w).items():
        format, reference = FORMATS[name]
        expected, dense, scale = reference.store(w)
        alike = np.asarray(codes) == expected
        if isinstance(reference.values, type):
            alike |= (dense == 0) & (found == 0)  # −0
        assert alike.all(), (name, np.argwhere(~alike)[:5])
        np.testing.assert_allclose(found, dense, rtol=2e-6, atol=1e-6 * scale.min(), err_msg=name)
        if format_of(format).has_zero:
            assert not np.any(np.asarray(found)[w == 0]), name


def test_names_are_those_of_the_formats():
    named = {"nf4": NF4, "fp4": FP4, "fp8_e4m3": FP8_E4M3, "fp8_e5m2": FP8_E5M2, "mxfp4": MXFP4, "mxfp8": MXFP8}
    named |= {"nvfp4": NVFP4, "ternary": TERNARY, "binary": BINARY, "int3": integers(3)}
    for name, format in named.items():
        assert format_of(name) == format and str(format) == name
        assert format_of(name, 48) == dataclasses.replace(format, block=48) != format
        assert hash(format_of(name)) == hash(format)
    assert format_of(np.int64(3)) == integers(3)
    assert [f.has_zero for f in (BINARY, TERNARY, NF4, NVFP4, Format(Integers(4, 1, 7)))] == [0, 1, 1, 1, 0]


@pytest.mark.parametrize("shape", [(4096, 4096), (768, 3072), (11008, 512)])
def test_bytes_are_within_two_percent_of_what_a_format_costs(shape):
    w = jax.ShapeDtypeStruct(shape, jnp.float32)
    doubly = {"nf4, doubly": (NF4_DOUBLE, None)}
    for name, (format, _) in (FORMATS | doubly).items():
        stored = jax.eval_shape(lambda w, format=format: jw.quantize(w, format), w)
        cost = stored.format.bits_per_weight(*shape) * math.prod(shape) / 8
        assert 0.9999 * cost <= stored.nbytes <= 1.02 * cost, name


def test_costs_are_those_of_the_field():
    costs = {NF4: 4.5, MXFP4: 4.25, MXFP8: 8.25, integers(4, block=128, scale="float16"): 4.125, TERNARY: 2 + 32 / 4096}
    costs |= {NF4_DOUBLE: 4 + 8 / 64 + 32 / (64 * 64), NVFP4: 4.5 + 32 / 4096**2, FP8_E4M3: 8 + 32 / 4096}
    costs |= {integers(8, per_tensor=True, symmetric=False): 8 + 40 / 4096**2}
    for format, bits in costs.items():
        assert format.bits_per_weight(4096, 4096) == pytest.approx(bits, rel=1e-12), format


def test_zero_points_of_hqq_take_two_or_four_bytes():
    for scale, expected in {"float16": 2, "bfloat16": 2, "float32": 4, "float8_e4m3fn": 4}.items():
        format = integers(4, block=16, symmetric=False, scale=scale)
        assert jw.quantize(normal(64, 4), format, range=jw.ranges.HQQ()).zero.nbytes == 16 * expected, scale


# Rounding


def test_stochastic_rounding_takes_a_neighbour_and_has_the_mean_of_the_weight():
    """What is on the grid, 0 and the ends included, does not move."""
    w = normal(24, 3)
    w[:4] = 0
    n, names = 2000, ["int3", "nf4", "fp4", "fp8_e5m2", "mxfp4", "binary", "int4 with zero points"]

    @jax.jit
    def run(w, keys):
        def draw(name):
            return jax.vmap(lambda key: jw.quantize(w, FORMATS[name][0], key=key).todense())(keys)

        return {name: draw(name) for name in names}

    for name, draws in run(w, jax.random.split(jax.random.key(0), n)).items():
        draws, (_, _, scale) = np.asarray(draws, np.float64), FORMATS[name][1].store(w)
        format = format_of(FORMATS[name][0])
        values = np.unique(np.asarray(format.grid.decode(jnp.arange(2**format.grid.bits))))
        for column in range(3):
            x, s = np.float64(w[:, column]), scale[0, column]
            grid = np.arange(-40, 41) * s if format.zero_point else values[np.isfinite(values)] * s
            x, got = np.clip(x, grid[0], grid[-1]), draws[:, :, column]
            above = np.clip(np.searchsorted(grid, x), 1, len(grid) - 1)
            low, high = grid[above - 1], grid[above]
            near = 3e-6 * (np.maximum(np.abs(low), np.abs(high)) + 8 * s * format.zero_point)
            on_grid = np.abs(grid[:, None] - x).min(0) <= near
            assert (np.abs(got - x) <= near)[:, on_grid].all(), name
            assert (np.minimum(np.abs(got - low), np.abs(got - high)) <= near)[:, ~on_grid].all(), name
            deviation, most = np.abs(got.mean(0) - x), 5 * (high - low) / 2 / math.sqrt(n)
            within = ~on_grid & (x >= got.min()) & (x <= got.max())
            assert within.sum() > 10 and (deviation <= most)[within].all(), name
    first, again = (jw.quantize(w, "int3", key=jax.random.key(1)).words for _ in range(2))
    np.testing.assert_array_equal(first, again)


# Any weights


EXTREMES = {
    "zeros": np.zeros((33, 2)),
    "ones": np.ones((33, 2)),
    "negative": np.full((33, 2), -3.0),
    "huge": 3e38 * np.sign(normal(33, 2)),
    "one huge": np.where(np.arange(66).reshape(33, 2) == 7, 3e38, normal(33, 2)),
    "small": 1e-30 * normal(33, 2),
    "tiny": 1e-38 * normal(33, 2),
    "subnormal": np.full((33, 2), 1e-42),
}


def test_any_finite_weights_stay_finite():
    """What is stored has the sign of the weight or is 0, and no more than a step beyond its magnitude."""
    w = np.stack([v.astype(np.float32) for v in EXTREMES.values()])

    @jax.jit
    def run(w):
        return {name: jw.quantize(w, f, axes=jw.Axes(batch=0)).todense() for name, (f, _) in FORMATS.items()}

    for name, found in run(w).items():
        found, saturates = np.asarray(found, np.float64), "float16" in name or "e4m3fn" in name or "f16" in name
        assert np.isfinite(found).all(), name
        assert (found * w >= 0).all() or name == "binary", name
        assert (np.abs(found).max((1, 2)) <= 1.34 * np.abs(np.float64(w)).max((1, 2)) + 1e-37).all(), name
        assert not found[0].any(), name
        if not saturates and format_of(FORMATS[name][0]).scale.outer is None:
            limit = 0.34 if "powers" in name or "int2" in name or name == "mxfp4" else 0.15
            np.testing.assert_allclose(found[1:4], w[1:4], rtol=limit, err_msg=name)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_makes_nan_of_all_that_shares_its_scale(value):
    """And of no other block."""
    w = normal(64, 4)
    w[3, 1] = value
    names = ["int8", "int4, float16", "int4, float8_e4m3fn", "int4 with zero points", "nf4", "mxfp4", "fp8_e5m2"]
    run = jax.jit(lambda w: {name: jw.quantize(w, FORMATS[name][0]).todense() for name in names})
    for name, found in run(w).items():
        block = format_of(FORMATS[name][0]).block or 64
        expected = np.zeros((64, 4), bool)
        expected[:block, 1] = True
        np.testing.assert_array_equal(np.isnan(found), expected, err_msg=name)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float16"])
def test_a_factor_for_all_scales_keeps_weights_of_any_magnitude(dtype):
    w = np.float64(normal(64, 32))
    blocks = w.reshape(4, 16, 32)
    scale = np.abs(blocks).max(1, keepdims=True) / 7
    exact = np.linalg.norm(np.round(blocks / scale) * scale - blocks)

    def error(sigma, outer):
        format = integers(4, block=16, scale=ScaleFormat(dtype, outer))
        return np.linalg.norm(np.float64(jw.quantize(jnp.float32(w * sigma), format).todense()) / sigma - w)

    for sigma in (1e-6, 1.0, 1e5):
        assert error(sigma, 0) < 1.1 * exact, sigma
    half_of_least, largest = {"float8_e4m3fn": (2.0**-10, 448), "float16": (2.0**-25, 65504)}[dtype]
    assert error(0.999 * half_of_least / scale.max(), None) == np.linalg.norm(w)
    assert error(100 * largest / scale.min(), None) > 0.9 * np.linalg.norm(w)


SIZES = [(0, 4), (4, 0), (1, 1), (), (5,)]


def test_any_size():
    """Of a quarter of the formats without compiling any, and of those with blocks, factors and zero points."""
    for shape in SIZES:
        for format, _ in list(FORMATS.values())[::4]:
            stored = jax.eval_shape(lambda f=format, s=shape: jw.quantize(jnp.zeros(s), f))
            assert jax.eval_shape(stored.todense).shape == shape == stored.shape
    some = [FORMATS[name][0] for name in ("int3", "int4 with zero points", "nvfp4", "nf4, doubly")]
    run = jax.jit(lambda ws: [[jw.quantize(w, f).todense() for f in some] for w in ws])
    ws = [jnp.full(shape, 2.0) for shape in SIZES]
    for w, found in zip(ws, run(ws), strict=True):
        for dense in found:
            np.testing.assert_allclose(dense, w, rtol=0.02)


def test_other_dtypes():
    """16 bits are computed in float32; 64 bits in float64, with scales of float32."""
    w, names = normal(40, 3), ["int8", "int4 with zero points", "nf4", "fp8_e4m3", "mxfp4"]

    def run(w, key):
        stored = {name: jw.quantize(w, FORMATS[name][0]) for name in names}
        drawn = {name: jw.quantize(w, FORMATS[name][0], key=key).codes for name in names}
        return {name: (q.codes, q.todense()) for name, q in stored.items()}, drawn

    for dtype in (jnp.bfloat16, jnp.float16):
        rounded = jnp.asarray(w).astype(dtype)
        found, _ = jax.jit(run)(rounded, jax.random.key(0))
        wide, _ = jax.jit(run)(rounded.astype(jnp.float32), jax.random.key(0))
        for name in names:
            np.testing.assert_array_equal(found[name][0], wide[name][0])
            assert found[name][1].dtype == dtype
            np.testing.assert_array_equal(found[name][1], wide[name][1].astype(dtype))
    with enable_x64(), jax.numpy_dtype_promotion("strict"):
        found, _ = jax.jit(run)(jnp.asarray(np.float64(w)), jax.random.key(0))
        for name in names:
            codes, dense, _ = FORMATS[name][1].store(np.float64(w))
            np.testing.assert_array_equal(found[name][0], codes)
            assert found[name][1].dtype == np.float64
            np.testing.assert_allclose(found[name][1], dense, rtol=1e-6)
