"""Invalid formats, ranges and codes of quantized weights."""

import jax
import jax.numpy as jnp
from bad_input.vocabulary import INTEGER, KEY, NUMBER, T, V

import jaxweights as jw

F, R = jw.formats, jw.ranges
CODES = jnp.zeros((8, 2), jnp.int32)
ASYMMETRIC = F.integers(4, symmetric=False)

CASES = [
    # Grids.
    ("Integers 9", lambda: F.Integers(9), V, "bits must be from 1 to 8, got 9"),
    ("Integers 1", lambda: F.Integers(1), V, "bits, of which high is made, must be from 2 to 8, got 1"),
    ("Integers float", lambda: F.Integers(4.0), T, INTEGER),
    ("Integers low", lambda: F.Integers(4, -9), V, "low must be from -8 to 6, got -9"),
    ("Integers high", lambda: F.Integers(4, -8, 8), V, "high must be from 1 to 7, got 8"),
    ("Integers empty", lambda: F.Integers(4, 3, 3), V, "low must be from -8 to 2, got 3"),
    ("Integers high 0", lambda: F.Integers(4, -3, 0), V, "high must be from 1 to 15, got 0"),
    ("Levels list", lambda: F.Levels([0.0, 1.0]), V, "values must be a tuple of 2 to 256 numbers"),
    ("Levels one", lambda: F.Levels((1.0,)), V, "values must be a tuple of 2 to 256 numbers"),
    ("Levels string", lambda: F.Levels((1.0, "2")), T, NUMBER),
    ("Levels nan", lambda: F.Levels((1.0, float("nan"))), V, "each of values must be"),
    ("Levels zeros", lambda: F.Levels((0.0, -0.0)), V, "values must not all be 0"),
    ("Floats exponent", lambda: F.Floats(1, 2), V, "exponent must be from 2 to 5, got 1"),
    ("Floats mantissa", lambda: F.Floats(5, 3), V, "mantissa must be from 1 to 2, got 3"),
    ("Floats n_special", lambda: F.Floats(2, 1, 3), V, "n_special must be from 0 to 2, got 3"),
    # Scales.
    ("ScaleFormat float64", lambda: F.ScaleFormat("float64"), V, "dtype must be one of 'float32', 'float16'"),
    ("ScaleFormat dtype", lambda: F.ScaleFormat(jnp.float32), V, "dtype must be one of 'float32', 'float16'"),
    ("ScaleFormat outer", lambda: F.ScaleFormat("float16", -1), V, "outer must be at least 0, got -1"),
    ("ScaleFormat codes", lambda: F.ScaleFormat("uint8"), V, "are codes of a factor: give outer=256 too"),
    ("ScaleFormat powers", lambda: F.ScaleFormat("float8_e8m0fnu", 0), V, "needs no factor: leave outer=None"),
    # Formats.
    ("Format grid", lambda: F.Format(4), T, "write Integers(4)"),
    ("Format scale", lambda: F.Format(F.Integers(4), 32, "float16"), T, "write ScaleFormat('bfloat16')"),
    ("Format block", lambda: F.Format(F.Integers(4), 0), V, "block must be at least 1, got 0"),
    ("Format block -1", lambda: F.Format(F.Integers(4), -1), V, "at least 1, got -1: None is all inputs"),
    ("bits per weight of no rows", lambda: F.NF4.bits_per_weight(0, 4), V, "rows must be at least 1, got 0"),
    ("bits per weight of no columns", lambda: F.NF4.bits_per_weight(4, 0), V, "columns must be at least 1, got 0"),
    ("Format zero_point", lambda: F.Format(F.NF4.grid, zero_point=True), V, "zero_point needs a grid of Integers"),
    ("Format per_tensor", lambda: F.Format(F.Integers(4), 8, per_tensor=True), V, "leave out block and outer"),
    ("integers 1", lambda: F.integers(1), V, "bits must be from 2 to 8, got 1"),
    ("integers True", lambda: F.integers(True), T, INTEGER),
    ("integers scale", lambda: F.integers(4, scale="int4"), V, "dtype must be one of"),
    ("integers per tensor", lambda: F.integers(4, block=8, per_tensor=True), V, "leave out block and outer"),
    # Ranges.
    ("Percentile 101", lambda: R.Percentile(101.0), V, "percent must be"),
    ("Percentile string", lambda: R.Percentile("99"), T, NUMBER),
    ("MSE steps", lambda: R.MSE(0), V, "steps must be at least 1, got 0"),
    ("MSE least", lambda: R.MSE(least=2.0), V, "least must be"),
    ("HQQ steps", lambda: R.HQQ(steps=-1), V, "steps must be at least 1, got -1"),
    ("HQQ p", lambda: R.HQQ(p=1.5), V, "p must be"),
    ("HQQ kappa", lambda: R.HQQ(kappa=0.5), V, "kappa must be"),
    ("HQQ symmetric", lambda w: jw.quantize(w, 4, range=R.HQQ()), V, "as formats.integers(4, symmetric=False)"),
    *(
        (f"HQQ in {name}", lambda f=f: f("int4", range=R.HQQ()), V, "as formats.integers(4, symmetric=False)")
        for name, f in {
            "RoundToNearest": jw.methods.RoundToNearest,
            "GPTQ": jw.methods.GPTQ,
            "AWQ": jw.methods.AWQ,
            "FakeQuantize": jw.FakeQuantize,
        }.items()
    ),
    (
        "Range itself",
        lambda w: jw.quantize(w, 4, range=R.Range()),
        T,
        "a range is at least fit(x, over, format, there)",
    ),
    ("AbsMax as a class", lambda w: jw.quantize(w, 4, range=R.AbsMax), T, "range must be one of jaxweights.ranges"),
    ("AbsMean as a string", lambda w: jw.quantize(w, 4, range="AbsMean"), T, "range must be one of jaxweights.ranges"),
    # quantize.
    ("int8_matmul array", lambda w: jw.int8_matmul(w.T, w), T, "make one with quantize(w, 8)"),
    ("int8_matmul nf4", lambda w: jw.int8_matmul(w.T, jw.quantize(w, "nf4")), V, "multiply by it with matmul(x, q)"),
    ("int8_matmul integers", lambda w: jw.int8_matmul(jnp.ones(6, int), jw.quantize(w, 8)), T, ".astype(jnp.float32)"),
    ("int8_matmul shape", lambda w: jw.int8_matmul(w[:, :-1], jw.quantize(w, 8)), V, "must end in the input axes"),
    ("quantize name", lambda w: jw.quantize(w, "q4_0"), V, "one of 'int2', 'int3'"),
    ("quantize grid", lambda w: jw.quantize(w, F.Integers(4)), T, "a jaxweights.formats.Format, got Integers"),
    ("quantize None", lambda w: jw.quantize(w, None), T, "format must be a number of bits"),
    ("quantize block 0", lambda w: jw.quantize(w, "nf4", block=0), V, "block must be at least 1, got 0"),
    ("quantize block float", lambda w: jw.quantize(w, 4, block=32.0), T, INTEGER),
    (
        "quantize block per tensor",
        lambda w: jw.quantize(w, F.integers(8, per_tensor=True), block=2),
        V,
        "leave out block and outer",
    ),
    ("quantize key", lambda w: jw.quantize(w, 4, key=0), T, "key must be a key, got int 0: write jax.random.key(0)"),
    ("quantize keys", lambda w: jw.quantize(w, 4, key=jax.random.split(KEY)), T, "key must be one key, got shape (2,)"),
    # Packing.
    ("pack 0 bits", lambda: F.pack(CODES, 0), V, "bits must be from 1 to 8, got 0"),
    ("pack floats", lambda w: F.pack(w, 4), T, "codes must be an array of integers, got float32"),
    ("pack codes of a vector", lambda: F.pack(CODES[:, 0], 4), V, "add an axis with [:, None]"),
    ("unpack floats", lambda w: F.unpack(w, 4, 8), T, "words must be an array of integers, got float32"),
    ("unpack rows", lambda: F.unpack(CODES, 4, 8), V, "words must have 1 rows for 8 codes of 4 bits, got (8, 2)"),
    ("unpack rows -1", lambda: F.unpack(CODES, 4, -1), V, "rows must be at least 0, got -1"),
]
