"""Grids and packed codes, against ml_dtypes and NumPy."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jaxweights as jw
from jaxweights.core.packing import unpack_rows
from jaxweights.formats import (
    NF4,
    Floats,
    Integers,
    Levels,
)

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
