"""The spectral norm of a convolution as a linear map of images, as opposed to that of its kernel read as a matrix."""

from __future__ import annotations

import dataclasses
import functools
import math
import string
from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxweights.core.checks import check_integer, check_scalar, check_shape, check_weight
from jaxweights.core.convolution import Convolution, Padding
from jaxweights.core.transform import Scalar, Transform
from jaxweights.numerics.batching import map_matrices
from jaxweights.numerics.dtypes import accumulation_dtype
from jaxweights.numerics.norms import safe_divide
from jaxweights.numerics.sharding import auto_sharded
from jaxweights.techniques.spectral import iteration
from jaxweights.techniques.spectral.exact import leading_vectors
from jaxweights.techniques.spectral.iteration import Operator, search_in
from jaxweights.techniques.spectral.streaming import normalized

_MAX_STEPS = 100
_TOLERANCE = 1e-4


def conv_spectral_norm(
    kernel: jax.Array,
    input_shape: Sequence[int],
    *,
    strides: int | Sequence[int] = 1,
    padding: Padding = "SAME",
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> jax.Array:
    """The spectral norm of a convolution as a linear map of images.

    σ = max ‖kernel ∗ x‖₂ over images x of the given shape with ‖x‖₂ = 1: the smallest Lipschitz constant of the layer.
    It depends on the size of the image, the padding and the strides. It is at most √(positions in the window) times
    `spectral_norm(kernel)`, the σ of the kernel read as a matrix.

    With circular padding and strides that divide the image, σ is exact. A Fourier transform splits the map into one
    small matrix per frequency, and σ is their largest singular value (by SVD; memory for (in/groups)·(out/groups)
    complex numbers per position and group). Otherwise block LOBPCG on the convolution and its transpose takes at most
    100 steps, until the estimate provably lies within 1e-4·σ of a singular value. It comes from below, and its error is
    of second order in that bound, so σ is then accurate to about 1e-6. Long rows of positions have many singular values
    close to the largest: after 100 steps σ may still be too small by about 1e-4·σ.

    For an upper bound with zero padding, take the σ of the same kernel, strides and dilation with circular padding, on
    n + dilation·(window − 1) or more positions instead of n, a multiple of the strides. That σ is exact, and the
    zero-padded map is a part of the circular one.

    Args:
      kernel: float array, shape (*window, in / groups, out), the layout of Flax (HWIO).
      input_shape: (*space, in), the layout of Flax (HWC) without the batch.
      strides: one for all axes, or one per axis of the window.
      padding: "SAME", "VALID", "CIRCULAR", or (before, after) per axis of the window.
      dilation: dilation of the kernel, one for all axes, or one per axis of the window.
      groups: `feature_group_count`; the number of input channels for a depthwise kernel.

    Returns:
      σ in float32 or wider, shape (). Its gradient is that of the leading singular pair. A zero or empty kernel has
      σ = 0. A transposed convolution has the same σ as the convolution that it transposes.

    Raises:
      TypeError: `kernel` is not a float array, or a shape, stride or dilation is not made of integers.
      ValueError: the shapes do not fit, a stride or dilation is less than 1, or `padding` is unknown.

    >>> import jax.numpy as jnp
    >>> import jaxweights as jw
    >>> blur = jnp.full((3, 3, 1, 1), 1 / 9)
    >>> print(f"{jw.conv_spectral_norm(blur, (32, 32, 1), padding='CIRCULAR'):.4f} {jw.spectral_norm(blur):.4f}")
    1.0000 0.3333

    References: Sedghi, Gupta and Long, The Singular Values of Convolutional Layers, arXiv:1805.10408, 2018; Knyazev,
    Toward the Optimal Preconditioned Eigensolver, SIAM J. Sci. Comput. 23, 2001.
    """
    kernel = check_weight(kernel, "kernel")
    conv = Convolution.of(kernel.shape, input_shape, strides=strides, padding=padding, dilation=dilation, groups=groups)
    kernel = kernel.astype(accumulation_dtype(kernel.dtype))
    if 0 in (*kernel.shape, *conv.input_shape):
        return jnp.zeros((), kernel.dtype)
    strides_divide = all(n % s == 0 for n, s in zip(conv.input_shape, conv.strides, strict=False))
    sigma = _sigma_by_fourier if conv.circular and strides_divide else _sigma_by_search
    return auto_sharded(lambda k: sigma(k, conv), kernel)


@dataclasses.dataclass(frozen=True)
class ConvSpectralNorm(Transform):
    """Spectral normalization of a convolution as a linear map of images: w' = w·c/σ̂, σ̂ = ‖w ∗ v‖/‖v‖.

    σ̂ is the streaming estimate of `SpectralNorm`, with the convolution and its transpose in place of matrix products.
    An update takes `n_steps` steps, and more while σ̂ grows. Each convolves 4 images and applies the transpose to one.
    With c = 1 the layer has Lipschitz constant 1, and so has a network of such layers. Normalization by the σ of the
    kernel read as a matrix only guarantees √(positions in the window) per layer.

    The target c may be a schedule. If `soft`, a kernel changes only if σ̂ > c; otherwise it is kept bit for bit. The
    other fields are the arguments of `conv_spectral_norm` for the layer. `layout = jaxweights.layout(f, params, x)`
    has them for every layer: `on_tree(ConvSpectralNorm(), where=list(layout.convolutions), layout=layout)`. Without
    it, give `input_shape`, and if layers differ, rules: `{"conv1/kernel": ConvSpectralNorm((28, 28, 1)), ...}`.

    State, float32 or wider: `v`, an image of the shape of the input or the output, whichever is smaller, and `basis`,
    4 such images. Means of the states of several steps are a state too, as for `SpectralNorm`.

    >>> import jax, jax.numpy as jnp
    >>> import jaxweights as jw
    >>> blur, t = jnp.ones((3, 3, 1, 1)), ConvSpectralNorm((32, 32, 1), padding="CIRCULAR")
    >>> print(t.apply(blur, t.init(blur, jax.random.key(0)))[0, 0, 0, 0].round(2))
    0.11

    References: Miyato et al., arXiv:1802.05957, 2018; Gouk, Frank, Pfahringer and Cree, Regularisation of Neural
    Networks by Enforcing Lipschitz Continuity, arXiv:1804.04368, 2018.
    """

    input_shape: tuple[int, ...] | None = None
    n_steps: int = 1
    strides: int | Sequence[int] = 1
    padding: Padding = "SAME"
    dilation: int | Sequence[int] = 1
    groups: int = 1
    target: Scalar = 1.0
    soft: bool = False
    scheduled: ClassVar[frozenset[str]] = frozenset({"target"})

    def __post_init__(self):
        if self.input_shape is not None:
            object.__setattr__(self, "input_shape", check_shape("input_shape", self.input_shape))
        check_integer("n_steps", self.n_steps, 1)
        check_scalar("target", self.target, 0, schedule=True)
        for name in ("strides", "padding", "dilation"):  # to be hashable
            object.__setattr__(self, name, _to_tuples(getattr(self, name)))

    def init(self, w, key):
        """Starts the search from random images and takes a few steps."""
        return super().init(w, key) | iteration.init_search(w, key, _operator, self._convolution(w))

    def update(self, w, state, grad=None):
        """Takes `n_steps` steps of the search, and more while the estimate grows."""
        conv = self._convolution(w)
        search = search_in(state, _operator(w, conv))
        return super().update(w, state, grad) | iteration.update_search(w, search, _operator, conv, self.n_steps)

    def apply(self, w, state):
        """w·c/σ̂."""
        conv = self._convolution(w)
        v = search_in(state, _operator(w, conv))["v"]
        return normalized(check_weight(w), v, self.value("target", state), _operator, conv, soft=self.soft)

    def with_convolution(self, convolution):
        """Returns this spec with the geometry of the layer, if it has no `input_shape`."""
        if self.input_shape is not None:
            return self
        geometry = {"strides": convolution.strides, "padding": convolution.pads, "dilation": convolution.dilation}
        return dataclasses.replace(self, input_shape=convolution.input_shape, groups=convolution.groups, **geometry)

    def _convolution(self, w) -> Convolution:
        if self.input_shape is None:
            raise ValueError(
                "ConvSpectralNorm needs the input_shape of the layer: give it, or pass the level "
                "layout=jaxweights.layout(f, params, x), which has it for convolutions by kernels (*window, in, out)"
            )
        options = {name: getattr(self, name) for name in ("strides", "padding", "dilation", "groups")}
        return Convolution.of(check_weight(w).shape, self.input_shape, **options)


def _to_tuples(value):
    """Replaces lists by tuples, recursively."""
    return tuple(map(_to_tuples, value)) if isinstance(value, list | tuple) else value


def _operator(kernel: jax.Array, conv: Convolution) -> Operator:
    """The convolution or its transpose, whichever has x on the smaller side."""
    kernel = kernel.astype(accumulation_dtype(kernel.dtype))
    convolve = jax.vmap(functools.partial(conv, kernel))
    transpose = jax.vmap(functools.partial(conv.transpose, kernel))
    if math.prod(conv.input_shape) <= math.prod(conv.output_shape):
        return Operator(convolve, conv.input_shape, dtype=kernel.dtype, transpose=transpose)
    return Operator(transpose, conv.output_shape, dtype=kernel.dtype, transpose=convolve)


def _sigma_by_search(kernel: jax.Array, conv: Convolution) -> jax.Array:
    """σ of any convolution, to within the tolerance."""
    operator = _operator(_scaled(kernel), conv)

    def is_inexact(state):
        n, search = state
        v = search["v"]
        return (n < _MAX_STEPS) & (iteration.error_bound(operator, v) > _TOLERANCE * iteration.sigma(operator, v))

    def move(state):
        n, search = state
        search, _ = iteration.step(operator, search)
        return n + 1, search

    _, search = jax.lax.while_loop(is_inexact, move, (0, iteration.start(operator, jax.random.key(0))))
    return iteration.sigma(_operator(kernel, conv), search["v"])


def _scaled(kernel: jax.Array) -> jax.Array:
    """The kernel scaled to a largest entry of 1, so that products do not overflow; constant for gradients."""
    kernel = jax.lax.stop_gradient(kernel)
    return safe_divide(kernel, jnp.max(jnp.abs(kernel)))


def _sigma_by_fourier(kernel: jax.Array, conv: Convolution) -> jax.Array:
    """σ of a circular convolution whose strides divide the image: the largest over all frequencies, by SVD."""
    waves = _waves(conv, kernel.dtype)
    if waves:  # a real kernel has the same singular values at a frequency and at its negative
        waves[-1] = waves[-1][: len(waves[-1]) // 2 + 1]
    scaled = _scaled(kernel)
    sigma = map_matrices(lambda block: jnp.linalg.svd(block, compute_uv=False)[0], _blocks(scaled, waves, conv))
    *frequency, group = jnp.unravel_index(jnp.argmax(sigma), sigma.shape)
    wave = [jnp.asarray(w)[f][None] for w, f in zip(waves, frequency, strict=True)]

    def leading_block(kernel):
        return _blocks(kernel, wave, conv)[(0,) * len(wave)][group]

    u, v = map_matrices(leading_vectors, leading_block(scaled))
    return jnp.einsum("i,ij,j->", u.conj(), leading_block(kernel), v.conj(), precision="highest").real


def _waves(conv: Convolution, dtype) -> list[np.ndarray]:
    """The Fourier transform of each axis of the window, as an array (frequency, residue, k).

    The output at m multiplies the k-th weight by the input at s·m + d·k. With d·k = s·a + r, this is a convolution of
    stride 1 on the image of residue r, which has n/s positions, with the weight at offset a. Its factor at frequency f
    is exp(2πi·f·a/(n/s)).
    """
    waves = []
    for n, k, s, d in zip(conv.input_shape[:-1], conv.window, conv.strides, conv.dilation, strict=True):
        step, residue = np.divmod(d * np.arange(k), s)
        wave = np.exp(2j * np.pi * ((np.arange(n // s)[:, None] * step) % (n // s)) / (n // s))
        waves.append((wave[:, None] * (residue == np.arange(s)[:, None])).astype(np.result_type(dtype, np.complex64)))
    return waves


def _blocks(kernel: jax.Array, waves: Sequence, conv: Convolution) -> jax.Array:
    """The blocks of a circular convolution in Fourier space: (*frequencies, groups, residues·in, out), per group."""
    letters = iter(string.ascii_letters)
    window = [next(letters) for _ in conv.window]
    frequencies = [next(letters) for _ in waves]
    residues = [next(letters) for _ in waves]
    g, i, o = next(letters), next(letters), next(letters)
    split = kernel.reshape(*kernel.shape[:-1], conv.groups, -1)
    split = jax.lax.complex(split, jnp.zeros_like(split))
    spec = ["".join((*window, i, g, o)), *map("".join, zip(frequencies, residues, window, strict=True))]
    out = "".join((*frequencies, g, *residues, i, o))
    blocks = jnp.einsum(",".join(spec) + "->" + out, split, *waves, precision="highest")
    n = len(waves) + 1
    return blocks.reshape(*blocks.shape[:n], math.prod(blocks.shape[n:-1]), blocks.shape[-1])
