"""Ranges of quantization, against NumPy and brute force in float64."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jaxweights as jw
from jaxweights.formats import (
    integers,
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
