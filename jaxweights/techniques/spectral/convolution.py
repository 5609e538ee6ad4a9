"""The spectral norm of a convolution as a linear map of images, which is not that of its kernel read as a matrix."""

from __future__ import annotations

import dataclasses
import math
import string
from collections.abc import Sequence

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
from jaxweights.techniques.spectral.exact import leading_vectors, spectral_normalize
from jaxweights.techniques.spectral.iteration import Operator, search_in

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

    σ = max ‖kernel ∗ x‖₂ over ‖x‖₂ = 1, x an image of the given shape: the least Lipschitz constant of the layer. It
    depends on the size of the image, on the padding and on the strides, and is up to √(positions in the window) times
    the σ of the kernel read as a matrix, `spectral_norm(kernel)`.

    Exact for circular padding whose image the strides divide: a Fourier transform parts the map into one small matrix
    a frequency, and σ is the largest of all their singular values (by SVD; memory for (in/groups)·(out/groups)
    complex numbers a position and group). Otherwise found by a search (block LOBPCG on the convolution and its
    transpose, at most 100 steps) that ends when σ is known to lie within 1e-4·σ of a singular value; since it comes
    from below and the error is of second order in that bound, σ is then right to about 1e-6. Long rows
    of positions have many singular values close to the largest: after 100 steps some 1e-4 of σ may be missing.

    With zero padding σ is at most that of the same kernel, strides and dilation with circular padding on
    n + dilation·(window − 1) or more positions for n, a multiple of the strides: the map is a part of that one, whose
    σ is exact.

    Args:
      kernel: float array, shape (*window, in / groups, out), as Flax has it (HWIO).
      input_shape: (*space, in), as Flax has it (HWC) without the batch.
      strides: one for all axes, or one per axis of the window.
      padding: "SAME", "VALID", "CIRCULAR", or (before, after) per axis of the window.
      dilation: of the kernel, one for all axes, or one per axis of the window.
      groups: `feature_group_count`; the number of input channels for a depthwise kernel.

    Returns:
      σ in float32 or wider, shape (). Its gradient is that of the leading singular pair. σ of a zero or empty kernel is
      0. A transposed convolution has the σ of the convolution that it transposes.

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
    whole = all(n % s == 0 for n, s in zip(conv.input_shape, conv.strides, strict=False))
    return auto_sharded(lambda k: (_by_frequency if conv.circular and whole else _by_search)(k, conv), kernel)


@dataclasses.dataclass(frozen=True)
class ConvSpectralNorm(Transform):
    """Spectral normalization of a convolution as a linear map of images: w' = w·c/σ̂, σ̂ = ‖w ∗ v‖.

    σ̂ is the streaming estimate of `SpectralNorm`, with the convolution and its transpose in place of the products with
    a matrix: `n_steps` steps an update, and more while σ̂ grows, each of which convolves 4 images and transposes one.
    With it the layer does not lengthen any difference of its inputs, so a network of such layers has Lipschitz constant
    1; the σ of the kernel read as a matrix promises only √(positions in the window) for each of its layers.

    The target c may be a schedule. If `soft`, a kernel is divided only where σ̂ > c, and kept bit for bit elsewhere. The
    other fields are the arguments of `conv_spectral_norm`: give those of the layer. Where layers differ, use rules:
    `on_tree({"conv1/kernel": ConvSpectralNorm((28, 28, 1)), ...})`.

    State: that of the search, float32 or wider: `v`, an image that has the shape of the input or of the output,
    whichever is smaller, and `basis`, 4 such images.

    >>> import jax, jax.numpy as jnp
    >>> import jaxweights as jw
    >>> blur, t = jnp.ones((3, 3, 1, 1)), ConvSpectralNorm((32, 32, 1), padding="CIRCULAR")
    >>> print(t.apply(blur, t.init(blur, jax.random.key(0)))[0, 0, 0, 0].round(2))
    0.11

    References: Miyato et al., arXiv:1802.05957, 2018; Gouk, Frank, Pfahringer and Cree, Regularisation of Neural
    Networks by Enforcing Lipschitz Continuity, arXiv:1804.04368, 2018.
    """

    input_shape: tuple[int, ...]
    n_steps: int = 1
    strides: int | Sequence[int] = 1
    padding: Padding = "SAME"
    dilation: int | Sequence[int] = 1
    groups: int = 1
    target: Scalar = 1.0
    soft: bool = False

    def __post_init__(self):
        object.__setattr__(self, "input_shape", check_shape("input_shape", self.input_shape))
        check_integer("n_steps", self.n_steps, 1)
        check_scalar("target", self.target, 0, schedule=True)
        for name in ("strides", "padding", "dilation"):  # hashable
            object.__setattr__(self, name, _frozen(getattr(self, name)))

    def init(self, w, key):
        """A search from random images, brought close by a few steps."""
        return super().init(w, key) | iteration.started(w, key, _operator, self._convolution(w))

    def update(self, w, state, grad=None):
        """`n_steps` steps of the search, and more while the estimate grows."""
        conv = self._convolution(w)
        search = search_in(state, _operator(w, conv))
        return super().update(w, state, grad) | iteration.moved(w, search, _operator, conv, self.n_steps)

    def apply(self, w, state):
        """w·c/‖w ∗ v‖."""
        conv = self._convolution(w)
        v = search_in(state, _operator(w, conv))["v"]
        sigma = auto_sharded(lambda w, v: iteration.sigma(_operator(w, conv), v), w, v)
        return spectral_normalize(w, sigma, target=self.value("target", state), soft=self.soft)

    def _convolution(self, w) -> Convolution:
        options = {name: getattr(self, name) for name in ("strides", "padding", "dilation", "groups")}
        return Convolution.of(check_weight(w).shape, self.input_shape, **options)


def _frozen(value):
    """`value` with tuples for its lists."""
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value


def _operator(kernel: jax.Array, conv: Convolution) -> Operator:
    """The convolution or its transpose, so that x is on the smaller side."""
    kernel = kernel.astype(accumulation_dtype(kernel.dtype))
    there, back = jax.vmap(lambda x: conv(kernel, x)), jax.vmap(lambda y: conv.transpose(kernel, y))
    if math.prod(conv.input_shape) <= math.prod(conv.output_shape):
        return Operator(there, conv.input_shape, 0, kernel.dtype, back)
    return Operator(back, conv.output_shape, 0, kernel.dtype, there)


def _by_search(kernel: jax.Array, conv: Convolution) -> jax.Array:
    """σ of any convolution, to within the tolerance."""
    operator = _operator(_scaled(kernel), conv)

    def going(state):
        n, search = state
        v = search["v"]
        return (n < _MAX_STEPS) & (iteration.error_bound(operator, v) > _TOLERANCE * iteration.sigma(operator, v))

    move = lambda state: (state[0] + 1, iteration.step(operator, state[1])[0])
    _, search = jax.lax.while_loop(going, move, (0, iteration.start(operator, jax.random.key(0))))
    return iteration.sigma(_operator(kernel, conv), search["v"])


def _scaled(kernel: jax.Array) -> jax.Array:
    """The kernel with largest entry 1, so that its products stay in the range: a constant."""
    kernel = jax.lax.stop_gradient(kernel)
    return safe_divide(kernel, jnp.max(jnp.abs(kernel)))


def _by_frequency(kernel: jax.Array, conv: Convolution) -> jax.Array:
    """σ of a circular convolution whose strides divide the image: the largest of all frequencies, by SVD."""
    waves = _waves(conv, kernel.dtype)
    if waves:  # a real kernel has the same singular values at a frequency and at its negative
        waves[-1] = waves[-1][: len(waves[-1]) // 2 + 1]
    scaled = _scaled(kernel)
    sigma = map_matrices(lambda block: jnp.linalg.svd(block, compute_uv=False)[0], _blocks(scaled, waves, conv))
    *frequency, group = jnp.unravel_index(jnp.argmax(sigma), sigma.shape)
    wave = [jnp.asarray(w)[f][None] for w, f in zip(waves, frequency, strict=True)]
    block = lambda kernel: _blocks(kernel, wave, conv)[(0,) * len(wave)][group]
    u, v = map_matrices(leading_vectors, block(scaled))
    return jnp.einsum("i,ij,j->", u.conj(), block(kernel), v.conj(), precision="highest").real


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
    split = jax.lax.complex(split, jnp.zeros_like(split))
    spec = ["".join((*window, i, g, o)), *map("".join, zip(frequencies, residues, window, strict=True))]
    out = "".join((*frequencies, g, *residues, i, o))
    blocks = jnp.einsum(",".join(spec) + "->" + out, split, *waves, precision="highest")
    n = len(waves) + 1
    return blocks.reshape(*blocks.shape[:n], math.prod(blocks.shape[n:-1]), blocks.shape[-1])
