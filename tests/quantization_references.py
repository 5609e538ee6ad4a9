"""Formats of quantized weights and GPTQ in float64 NumPy, for the tests of one-shot methods."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np

import jaxweights as jw
from jaxweights.formats import integers

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6.0])
E4M3 = np.arange(127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
NF4 = np.array(jw.formats.NF4.grid.values)

# References of the formats: (w of a block, factor) -> (values of the grid, scale, zero point), written from the
# documents. Scales are rounded to their dtypes, all else is in float64.


def mirrored(values):
    return np.unique(np.concatenate([values, -values]))


def f32(x):
    return np.float64(np.float32(x))


def absmax(grid, dtype=np.float32):
    return lambda w, factor: (grid, np.float64((np.abs(w).max(0) / grid.max()).astype(dtype)), 0)


def ternary(w, factor):
    return np.array([-1, 0, 1.0]), f32(np.abs(w).mean(0)), 0


def binary(w, factor):
    return np.array([-1, 1.0]), f32(np.abs(w).mean(0)), 0


def asymmetric(bits):
    def fit(w, factor):
        low, high = np.minimum(w.min(0), 0), np.maximum(w.max(0), 0)
        least, most = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        scale = f32(high / (most - least) - low / (most - least))
        return np.arange(least, most + 1.0), scale, np.clip(np.round(least - low / scale), least, most)

    return fit


def power_of_two(grid):
    return lambda w, f: (grid, 2.0 ** (np.floor(np.log2(np.abs(w).max(0))) - np.floor(np.log2(grid.max()))), 0)


def nvfp4(w, factor):
    factor = f32(f32(factor / 6) / 448)
    scale = np.minimum(f32(np.abs(w).max(0) / 6) / factor, 448).astype(np.float32).astype(ml_dtypes.float8_e4m3fn)
    return mirrored(E2M1), f32(np.float64(scale) * factor), 0


def double_quantized(w, factor):
    factor = f32(f32(factor) / 255)
    return NF4, f32(np.clip(np.round(f32(np.abs(w).max(0)) / factor), 1, 255) * factor), 0


def squared_error(bits, steps=80, least=0.2):
    """The range of least squared error of those that shrink absmax, by trying all of them."""
    grid = np.arange(1.0 - 2 ** (bits - 1), 2 ** (bits - 1))

    def fit(w, factor):
        top = np.abs(w).max(0)
        scales = np.stack([f32(top * (1 - (1 - least) * i / steps) / grid.max()) for i in range(steps + 1)])
        errors = np.stack([np.sum((nearest(w, grid, s, 0) - w) ** 2, 0) for s in scales])
        return grid, scales[np.argmin(errors, 0), np.arange(w.shape[1])], 0

    return fit


def nearest(w, grid, scale, zero):
    """The nearest values of a scaled grid, by comparing all of them."""
    value = np.divide(w, scale, out=np.zeros_like(w), where=scale > 0) + zero
    return (grid[np.argmin(np.abs(value[..., None] - grid), -1)] - zero) * scale


def integer_grid(bits):
    return np.arange(1.0 - 2 ** (bits - 1), 2 ** (bits - 1))


FORMATS = {
    "int8": (8, absmax(integer_grid(8))),
    "int4": ("int4", absmax(integer_grid(4))),
    "int4 in 16": (integers(4, block=16), absmax(integer_grid(4))),
    "int3 of bf16 in 20": (integers(3, block=20, scale="bfloat16"), absmax(integer_grid(3), jnp.bfloat16)),
    "int2 in 32, asymmetric": (integers(2, block=32, symmetric=False), asymmetric(2)),
    "int4 in 16, asymmetric": (integers(4, block=16, symmetric=False), asymmetric(4)),
    "nf4": ("nf4", absmax(NF4)),
    "nf4 double": (jw.formats.NF4_DOUBLE, double_quantized),
    "fp4": ("fp4", absmax(mirrored(E2M1))),
    "fp8": ("fp8_e4m3", absmax(mirrored(E4M3))),
    "mxfp4": ("mxfp4", power_of_two(mirrored(E2M1))),
    "nvfp4": ("nvfp4", nvfp4),
    "ternary": ("ternary", ternary),
    "binary": ("binary", binary),
}


def gptq(w, h, fit, block=None, *, act_order=False, static_groups=False, damping=0.01):
    """GPTQ as published, one column of the paper's matrix (a row of ours) at a time, in float64."""
    kept, start = w != 0, w
    rows = len(w)
    block = min(block or rows, rows)
    order = np.argsort(-np.diag(h), kind="stable") if act_order else np.arange(rows)
    w, h, kept = w[order], h[np.ix_(order, order)], kept[order]
    dead = np.diag(h) == 0
    mean = np.mean(np.diag(h)[~dead])
    h = h + np.diag(dead * mean + damping * mean)
    u = np.linalg.cholesky(np.linalg.inv(h)).T
    at_once = static_groups or block == rows
    of_factor = start if at_once else w
    blocks = [of_factor[i : i + block] for i in range(0, rows, block)]
    factor = max(np.abs(b).max() for b in blocks)
    fitted = [fit(b, factor_of(fit, blocks, factor)) for b in blocks]
    w, new = w.copy(), np.zeros_like(w)
    for i in range(rows):
        if not at_once and i % block == 0:
            fitted[i // block] = fit(np.where(kept, w, 0)[i : i + block], factor_of(fit, blocks, factor))
        grid, scale, zero = fitted[(order[i] if at_once else i) // block]
        new[i] = nearest(np.where(kept[i], w[i], 0), grid, scale, zero)
        w[i + 1 :] -= np.outer(u[i, i + 1 :], (w[i] - new[i]) / u[i, i])
    return new[np.argsort(order)]


def factor_of(fit, blocks, largest):
    """What all scales share: for NVFP4 the largest magnitude of the matrix, else that of the unit."""
    return largest if fit is nvfp4 else np.max([np.abs(b).max(0) for b in blocks], 0)
