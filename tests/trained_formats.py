"""Shared by the tests of training on a grid: formats, readings of a weight, and comparison bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np

import jaxweights as jw
from jaxweights.core.axes import ATTENTION_IN, ATTENTION_OUT, CONV, DENSE

KEY = jax.random.key(0)
NAMES = [*(f"int{bits}" for bits in range(2, 9)), "nf4", "fp4", "fp8_e4m3", "fp8_e5m2", "mxfp4", "mxfp8", "nvfp4"]
NAMES += ["ternary", "binary"]
FORMATS = {name: name for name in NAMES} | {
    "zero points": jw.formats.integers(4, symmetric=False),
    "zero points of blocks": jw.formats.integers(3, block=7, symmetric=False, scale="float16"),
    "whole": jw.formats.integers(5, per_tensor=True),
    "whole with a zero point": jw.formats.integers(4, symmetric=False, per_tensor=True),
    "double": jw.formats.NF4_DOUBLE,
    "paper": jw.formats.Format(jw.formats.Integers(3, -4, 3)),
}
READINGS = {
    "dense": ((40, 30), DENSE),
    "conv": ((3, 2, 8, 5), CONV),
    "heads": ((20, 4, 3), ATTENTION_IN),
    "out": ((4, 5, 6), ATTENTION_OUT),
    "stack": ((3, 20, 4), DENSE.stacked()),
    "batch last": ((5, 6, 2, 3), jw.Axes(input=1, output=0, batch=(3, 2))),
    "depthwise": ((3, 3, 1, 8), jw.axes.depthwise(8)),
    "vector": ((50,), None),
}
DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]


def normal(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def same_bits(found, expected, message=""):
    assert found.dtype == expected.dtype and found.shape == expected.shape, message
    np.testing.assert_array_equal(np.asarray(found, np.float32), np.asarray(expected, np.float32), err_msg=message)
