"""The spectral norm of a convolution as a linear map of images, which is not that of its kernel read as a matrix."""

from __future__ import annotations

import math
import string
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxweights.checks import check_weight
from jaxweights.convolution import Convolution, Padding
from jaxweights.numerics import wide


def conv_spectral_norm(kernel, input_shape, *, strides=1, padding="SAME", dilation=1, groups=1) -> jax.Array:
    kernel = check_weight(kernel, "kernel")
    conv = Convolution.of(
        kernel.shape, input_shape, strides=strides, padding=padding, dilation=dilation, groups=groups
    )
    kernel = kernel.astype(wide(kernel.dtype))
    if 0 in (*kernel.shape, *conv.input_shape):
        return jnp.zeros((), kernel.dtype)
    return _by_frequency(kernel, conv)


def _by_frequency(kernel: jax.Array, conv: Convolution) -> jax.Array:
    """σ of a circular convolution whose strides divide the image, by an SVD at each frequency."""
    waves = _waves(conv, kernel.dtype)
    # A real kernel has the same singular values at a frequency and its negative.
    half = [*waves[:-1], waves[-1][: len(waves[-1]) // 2 + 1]] if waves else []
    values = jnp.linalg.svd(_blocks(jax.lax.stop_gradient(kernel), half, conv), compute_uv=False)[..., 0]
    *frequency, group = jnp.unravel_index(jnp.argmax(values), values.shape)
    wave = [jnp.asarray(w)[f][None] for w, f in zip(half, frequency, strict=True)]
    block = _blocks(kernel, wave, conv)[(0,) * len(wave)][group]
    u, _, vt = jnp.linalg.svd(jax.lax.stop_gradient(block), full_matrices=False)
    return jnp.einsum("i,ij,j->", u[:, 0].conj(), block, vt[0].conj(), precision="highest").real


def _waves(conv: Convolution, dtype) -> list[np.ndarray]:
    """For each axis of the window the array (frequency, residue, k) that transforms it.

    An output at m reads the window's k-th weight at s·m + d·k. With d·k = s·a + r, it is a convolution with a stride
    of one of the images of residue r, of n/s positions each, and the weight stands at a: its wave at frequency f is
    exp(2πi·f·a/(n/s)).
    """
    waves = []
    for n, k, s, d in zip(conv.input_shape[:-1], conv.window, conv.strides, conv.dilation, strict=True):
        step, residue = np.divmod(d * np.arange(k), s)
        wave = np.exp(2j * np.pi * ((np.arange(n // s)[:, None] * step) % (n // s)) / (n // s))
        waves.append((wave[:, None] * (residue == np.arange(s)[:, None])).astype(np.result_type(dtype, np.complex64)))
    return waves


def _blocks(kernel: jax.Array, waves: Sequence, conv: Convolution) -> jax.Array:
    """The matrices that a circular convolution consists of: (*frequencies, groups, residues·in, out) within a group."""
    letters = iter(string.ascii_letters)
    window = [next(letters) for _ in conv.window]
    frequencies = [next(letters) for _ in waves]
    residues = [next(letters) for _ in waves]
    g, i, o = next(letters), next(letters), next(letters)
    split = kernel.reshape(*kernel.shape[:-1], conv.groups, -1)
    spec = ["".join((*window, i, g, o)), *map("".join, zip(frequencies, residues, window, strict=True))]
    out = "".join((*frequencies, g, *residues, i, o))
    blocks = jnp.einsum(",".join(spec) + "->" + out, split, *waves, precision="highest")
    n = len(waves) + 1
    return blocks.reshape(*blocks.shape[:n], math.prod(blocks.shape[n:-1]), blocks.shape[-1])
