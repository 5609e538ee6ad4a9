"""Two-limb integers against Python's: all pairs of small limbs, and random large ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxweights.numerics.counts import Count, count, fraction_of, round_half_up, scaled, smaller, total


def value(c, base=2**32):
    """Converts a count to Python integers."""
    return np.asarray(c.hi).astype(object) * base + np.asarray(c.lo).astype(object)


def test_arithmetic_carries_and_borrows():
    """8-bit limbs: all pairs of every 151st integer and of integers at limb boundaries."""
    n = np.unique(np.concatenate([np.arange(0, 65536, 151), *(np.arange(256) * 256 + d for d in (-1, 0, 1))]) % 65536)
    a, b = (jnp.asarray(m) for m in np.meshgrid(n, n))
    split = lambda m: Count((m // 256).astype(jnp.uint8), (m % 256).astype(jnp.uint8))
    joined = lambda c: 256 * c.hi.astype(jnp.int32) + c.lo

    @jax.jit
    def check(a, b):
        x, y = split(a), split(b)
        return [
            (joined(x + y) == (a + b) % 65536).all(),
            ((joined(x - y) == a - b) | (a < b)).all(),
            ((x <= y) == (a <= b)).all(),
            (joined(smaller(x, y)) == jnp.minimum(a, b)).all(),
            (x.positive == (a > 0)).all(),
        ]

    assert all(check(a, b))


@pytest.mark.parametrize("n", [1, 2, 15, 16])
def test_total_of_bytes(n):
    """Sums of the halves fit for at most sixteen numbers."""
    parts = np.random.default_rng(n).choice([0, 1, 15, 16, 240, 254, 255], (1000, n)).astype(np.uint8)
    parts[0] = 255
    np.testing.assert_array_equal(value(total(jnp.asarray(parts), (1,)), 256), parts.astype(int).sum(1))


def test_total_past_32_bits():
    parts = np.full((2, 2**8, 2**8), 2**32 - 1, np.uint32)
    parts[1] = np.random.default_rng(0).integers(0, 2**32, parts[1].shape)
    np.testing.assert_array_equal(value(total(jnp.asarray(parts), (1, 2))), parts.astype(object).sum((1, 2)))
    with pytest.raises(ValueError, match="partial counts"):
        total(jnp.ones(2**16 + 1, jnp.uint32), (0,))


def test_count():
    for n in (0, 1, 2**31, 2**32 - 1, 2**32, 3 * 2**32 + 7):
        assert value(count(n)) == n
    assert value(count(-3)) == 0
    np.testing.assert_array_equal(value(count(jnp.array([-1, 0, 2**31 - 1]))), [0, 0, 2**31 - 1])


SIZES = [0, 1, 5, 1000, 2**24 + 1, 2**31 - 1, 2**31, 3_000_000_000, 2**32, 2**33 + 7, 2**47 + 12345]


@pytest.mark.parametrize("n", SIZES)
def test_share_of_a_traced_fraction(n):
    fractions = np.concatenate([np.random.default_rng(0).random(200), np.arange(65) / 64, [-1, 2]]).astype(np.float32)
    multiple = np.round(np.clip(fractions, 0, 1) * np.float32(2**24)).astype(object)
    expected = [(int(a) * n + 2**23) >> 24 for a in multiple]
    got = jax.jit(lambda f: fraction_of(f, n))(fractions)
    np.testing.assert_array_equal(value(got), expected)


@pytest.mark.parametrize(("fraction", "expected"), [(0.0, 0), (0.5, 1_500_000_001), (1.0, 3_000_000_001), (0, 0)])
def test_share_of_a_python_fraction(fraction, expected):
    assert value(fraction_of(fraction, 3_000_000_001)) == expected


def test_round_half_up():
    assert [round_half_up(f, 10) for f in (0, 0.04, 0.05, 0.15, 0.25, 0.5, 1)] == [0, 0, 1, 2, 3, 5, 10]
    assert round_half_up(0.5, 2**40 + 1) == 2**39 + 1
    traced = jax.jit(lambda f: round_half_up(f, 2**31 - 1))
    assert [int(traced(f)) for f in (-0.5, 0.5, 1.5)] == [0, 2**30, 2**31 - 1]
    with pytest.raises(ValueError, match="32-bit counts"):
        round_half_up(jnp.float32(0.5), 2**31)


def test_scaled():
    n = jax.tree.map(lambda *limbs: jnp.stack(limbs), *(count(n) for n in SIZES))
    ratios = [0, 1, 2**31, 2**32 - 1, *np.random.default_rng(0).integers(0, 2**32, 8).tolist()]
    got = value(jax.jit(jax.vmap(scaled, (None, 0)))(n, jnp.asarray(np.array(ratios, np.uint32))))
    np.testing.assert_array_equal(got, [[(size * ratio + 2**31) >> 32 for size in SIZES] for ratio in ratios])
