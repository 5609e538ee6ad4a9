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
    Floats,
    Format,
    Integers,
    Levels,
    ScaleFormat,
    integers,
)
from jaxweights.techniques.quantization.formats import format_of
from jaxweights.techniques.quantization.packing import unpack_rows

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


# Grids


@pytest.mark.parametrize(
    ("grid", "dtype", "peak"), [(Floats(2, 1), E2M1, 6), (Floats(4, 3, 1), E4M3, 448), (Floats(5, 2, 4), E5M2, 57344)]
)
def test_small_floats_are_those_of_ml_dtypes(grid, dtype, peak):
    """All codes; the values, halfway between them, and just beside that; beyond the largest."""
    codes = np.arange(2**grid.bits)
    values = codes.astype(np.uint8).view(dtype).astype(np.float64)
    found = np.asarray(grid.decode(jnp.asarray(codes)), np.float64)
    finite = np.abs(values) <= peak
    assert finite.sum() == 2**grid.bits - 2 * grid.n_special and grid.peak == peak
    np.testing.assert_array_equal(found[finite], values[finite])
    assert np.isnan(found[~finite]).all() and (np.signbit(found) == np.signbit(values))[finite].all()
    ascending = np.unique(values[finite]).astype(np.float32)
    middle = (ascending[1:] + ascending[:-1]) / 2
    inf = np.float32(np.inf)
    x = np.concatenate([ascending, middle, np.nextafter(middle, inf), np.nextafter(middle, -inf), [1e30, -inf, -0.0]])
    expected = np.clip(x, -peak, peak).astype(dtype).view(np.uint8)
    np.testing.assert_array_equal(grid.encode(jnp.asarray(x)), expected)


def test_integers_round_halves_to_even_and_stay_within_their_ends():
    x = np.concatenate([np.arange(-20, 20) / 2, [1e30, -1e30]])
    for grid, low, high in ((Integers(4), -7, 7), (Integers(4, -8), -8, 7), (Integers(3, 0, 6), 0, 6)):
        codes = grid.encode(jnp.asarray(x, jnp.float32))
        np.testing.assert_array_equal(grid.decode(codes), np.clip(np.round(x), low, high))
        assert codes.min() >= 0 and codes.max() < 2**grid.bits
        assert grid.decode(jnp.asarray(grid.offset)) == 0


def test_tables_take_the_nearest_value():
    """NF4 has the thresholds of bitsandbytes (csrc/kernels.cu), the midpoints. Any order and equal values do."""
    thresholds = [0.03979014977812767, 0.1202552504837513, 0.2035212516784668, 0.2920137718319893, 0.3893125355243683]
    thresholds += [0.5016634166240692, 0.6427869200706482, 0.8614784181118011]
    below = [-0.8480964004993439, -0.6106329262256622, -0.4599952697753906, -0.33967943489551544]
    below += [-0.23460740596055984, -0.13791173323988914, -0.045525018125772476]
    x = np.float32(below + thresholds)
    middle = np.float64(NF4_VALUES[1:]) / 2 + np.float64(NF4_VALUES[:-1]) / 2
    np.testing.assert_allclose(x, middle, rtol=3e-7)
    for beside, codes in ((np.inf, np.arange(1, 16)), (-np.inf, np.arange(15))):
        moved = x + np.copysign(1e-6, beside).astype(np.float32)
        np.testing.assert_array_equal(NF4.grid.encode(jnp.asarray(moved)), codes)
    np.testing.assert_array_equal(NF4.grid.decode(jnp.arange(16)), NF4_VALUES)
    values = (0.0, 3.0, -1.0, -0.0, 5.0, 3.0)
    x = normal(200) * 4
    found = np.asarray(Levels(values).decode(Levels(values).encode(jnp.asarray(x))))
    best = np.abs(np.float64(x)[:, None] - values).min(1)
    np.testing.assert_allclose(np.abs(found - np.float64(x)), best, rtol=1e-6)


# Packing


def words_of(codes, bits):
    """By the description of `pack`, bit by bit in Python."""
    rows, columns = codes.shape
    period = 32 // bits if 32 % bits == 0 else 32
    planes = [p for p in (8, 4, 2, 1) if bits & p]
    words = []
    for start in range(0, rows, period):
        low = 0
        for p in planes:
            for word in range(period * p // 32):
                value = np.zeros(columns, np.uint64)
                for j in range(32 // p):
                    row = start + (32 // p) * word + j
                    code = codes[row].astype(np.uint64) if row < rows else np.zeros(columns, np.uint64)
                    value |= ((code >> np.uint64(low)) & np.uint64(2**p - 1)) << np.uint64(p * j)
                words.append(value.astype(np.uint32).view(np.int32))
            low += p
    return np.stack(words)


def test_codes_are_packed_as_described():
    rng = np.random.default_rng(0)
    codes = {(bits, rows): rng.integers(0, 2**bits, (rows, 3)) for bits in range(1, 9) for rows in (70, 32, 1)}
    some = rng.integers(0, 1000, 4)

    @jax.jit
    def run(codes):
        words = {key: jw.formats.pack(c, key[0]) for key, c in codes.items()}
        again = {key: jw.formats.unpack(w, *key) for key, w in words.items()}
        return words, again, {key: unpack_rows(w, key[0], jnp.asarray(some % key[1])) for key, w in words.items()}

    words, again, rows = run(codes)
    for key, c in codes.items():
        np.testing.assert_array_equal(words[key], words_of(c, key[0]), err_msg=str(key))
        np.testing.assert_array_equal(again[key], c, err_msg=str(key))
        np.testing.assert_array_equal(rows[key], c[some % key[1]], err_msg=str(key))
    np.testing.assert_array_equal(jw.formats.pack(jnp.stack([codes[3, 70]] * 2), 3)[1], words[3, 70])


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


# Ranges


def errors(found, w, block):
    """The squared error of each block."""
    square = (np.float64(found) - np.float64(w)) ** 2
    return np.add.reduceat(square, np.arange(0, len(w), block), 0)


def brute_force(w, low, high, zero, steps=80, least=0.2):
    """The least squared error of a block over all ranges, in float64."""
    best = np.inf
    for i in range(steps + 1):
        fraction = 1 - (1 - least) * i / steps
        if zero:
            bottom, top = min(w.min(), 0) * fraction, max(w.max(), 0) * fraction
            s = (top - bottom) / (high - low)
            z = np.clip(np.round(low - bottom / s), low, high)
        else:
            s, z = np.abs(w).max() * fraction / high, 0
        best = min(best, (((np.clip(np.round(w / s + z), low, high) - z) * s - w) ** 2).sum())
    return best


def half_quadratic(w, low, high, steps=20, p=0.7, beta=10.0, kappa=1.01):
    """The zero point of a block, as the article of Badri and Shaji has it, in float64."""
    s = (w.max() - w.min()) / (high - low)
    z = low - w.min() / s
    decoded = lambda z: (np.clip(np.round(w / s + z), low, high) - z) * s
    distance = lambda z: (np.abs(decoded(z) - w) ** p).sum()
    best = z
    for _ in range(steps):
        error = w - decoded(z)
        shrunk = np.sign(error) * np.maximum(np.abs(error) - np.maximum(np.abs(error), 1e-30) ** (p - 1) / beta, 0)
        z = np.mean(np.clip(np.round(w / s + z), low, high) - (w - shrunk) / s)
        best = z if distance(z) < distance(best) else best
        beta *= kappa
    return best, s


def test_ranges():
    """Blocks of 32 of 70 rows: the last is short."""
    w, block = np.random.default_rng(0).standard_t(3, (70, 4)).astype(np.float32), 32
    forms = {"symmetric": integers(4, block=block), "zero": integers(4, block=block, symmetric=False)}

    @jax.jit
    def run(w):
        ranges = (jw.ranges.AbsMax(), jw.ranges.MSE(), jw.ranges.Percentile(90.0), jw.ranges.AbsMean())
        found = {f"{r} {name}": jw.quantize(w, f, range=r) for r in ranges for name, f in forms.items()}
        found["hqq"] = jw.quantize(w, forms["zero"], range=jw.ranges.HQQ())
        found["nf4"] = jw.quantize(w, "nf4", range=jw.ranges.MSE())
        return {key: (q.todense(), q.scale.values(), q.zero) for key, q in found.items()}

    found = run(w)
    pieces = [np.float64(w[i : i + block]) for i in range(0, 70, block)]
    for name, low in (("symmetric", -7), ("zero", -8)):
        widest, best = (errors(found[f"{r} {name}"][0], w, block) for r in (jw.ranges.AbsMax(), jw.ranges.MSE()))
        expected = [[brute_force(p[:, c], low, 7, name == "zero") for c in range(4)] for p in pieces]
        np.testing.assert_allclose(best, expected, rtol=1e-4)
        assert (best <= widest).all() and best.sum() < widest.sum()
    assert errors(found["nf4"][0], w, 64).sum() < errors(jw.quantize(w, "nf4").todense(), w, 64).sum()
    reach = np.stack([np.percentile(np.abs(p), 90, axis=0) for p in pieces])
    np.testing.assert_allclose(found[f"{jw.ranges.Percentile(90.0)} symmetric"][1], reach / 7, rtol=1e-5)
    ends = [np.stack([np.percentile(p, q, axis=0) for p in pieces]) for q in (5, 95)]
    span = np.maximum(ends[1], 0) - np.minimum(ends[0], 0)
    np.testing.assert_allclose(found[f"{jw.ranges.Percentile(90.0)} zero"][1], span / 15, rtol=1e-5)
    mean = np.stack([np.abs(p).mean(0) for p in pieces])
    np.testing.assert_allclose(found[f"{jw.ranges.AbsMean()} symmetric"][1], mean, rtol=1e-5)
    dense, scale, zero = map(np.float64, found["hqq"])
    for i, p in enumerate(pieces):
        for c in range(4):
            z, s = half_quadratic(p[:, c], -8, 7)
            assert scale[i, c] == pytest.approx(s, rel=1e-5) and zero[i, c] == pytest.approx(z, abs=1e-3)
    p_norm = lambda found: (np.abs(found - np.float64(w)) ** 0.7).sum()
    assert p_norm(dense) < p_norm(found[f"{jw.ranges.AbsMax()} zero"][0])


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


def test_of_powers_of_two_the_squared_error_may_choose_one_that_clips_nothing():
    """Against all powers of two, each weight the nearest value of E2M1, in float64."""
    w = np.random.default_rng(5).standard_t(3, (64, 24)).astype(np.float32)
    values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    blocks = np.abs(w.astype(np.float64)).reshape(2, 32, 24)
    least = np.full((2, 24), np.inf)
    for scale in 2.0 ** np.arange(-8, 8):
        distance = np.abs(blocks[..., None] - scale * values).min(-1)
        least = np.minimum(least, np.square(distance).sum(1))
    w = jnp.asarray(w)
    widest, best = (
        np.square(np.asarray(jw.quantize(w, "mxfp4", range=r).todense(), np.float64) - w).reshape(2, 32, 24).sum(1)
        for r in (jw.ranges.AbsMax(), jw.ranges.MSE())
    )
    np.testing.assert_allclose(best, least, rtol=1e-5)
    assert (widest > 1.1 * least).any()
