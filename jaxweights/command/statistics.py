"""Statistics of tensors of any size. Beyond the tensor itself they take a bounded number of bytes, or one copy."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxweights.core.axes import Axes, Reading

FAR = 6
"""Standard deviations from the mean beyond which an entry is an outlier."""
EXACT = 512
"""The smaller side of the matrices of which the largest singular value is computed, not estimated."""
_PART = 2**15  # as float64 it fits in the cache
_STEPS, _FEWEST, _PRODUCTS, _CONVERGED = 32, 8, 1e10, 1e-5


class Statistics(NamedTuple):
    """What there is to tell of the values of a tensor of real numbers. None is what has no meaning for it.

    Attributes:
      density: fraction of entries that are not 0.
      not_finite: number of entries that are NaN or infinite. With any, what follows is None.
      mean, std: of all entries.
      largest: largest absolute value.
      outliers: fraction of entries more than `FAR` standard deviations from the mean.
      sigma: largest singular value, of several matrices the largest of all; None of a vector.
      is_bound: whether `sigma` is a lower bound, by Lanczos' method, which as a rule is less than 1% below.
    """

    density: float
    not_finite: int = 0
    mean: float | None = None
    std: float | None = None
    largest: float | None = None
    outliers: float | None = None
    sigma: float | None = None
    is_bound: bool = False


def statistics(w: np.ndarray, axes: Axes | None) -> Statistics:
    """The statistics of an array of real numbers, which is read as a matrix by `axes`; None is no matrix."""
    kept = not_finite = 0
    largest = total = 0.0
    for (part,) in parts(w):
        kept += int(np.count_nonzero(part))
        finite = np.isfinite(part)
        not_finite += part.size - int(np.count_nonzero(finite))
        largest = max(largest, float(np.abs(part).max(initial=0, where=finite)))
        total += float(part.sum(where=finite) / max(w.size, 1))
    density = kept / w.size if w.size else 1.0
    if not_finite or not w.size:
        return Statistics(density, not_finite)
    scale = largest or 1.0  # without it, squares of large entries overflow and of small ones vanish
    std = scale * math.sqrt(sum(float(np.square((part - total) / scale).sum()) for (part,) in parts(w)) / w.size)
    far = sum(int(np.count_nonzero(np.abs(part - total) > FAR * std)) for (part,) in parts(w)) if std else 0
    sigma, is_bound = (None, False) if axes is None else largest_singular_value(w, axes, scale)
    return Statistics(density, 0, total, std, largest, far / w.size, sigma, is_bound)


def is_number(w: np.ndarray) -> bool:
    """Whether the entries are real numbers: floats of any width, integers or booleans."""
    return w.dtype.kind in "biuf" or jnp.issubdtype(w.dtype, jnp.floating)


def parts(*arrays: np.ndarray) -> Iterator[tuple[np.ndarray, ...]]:
    """Arrays of one shape in parts, as float64."""
    flat = [a.reshape(-1) for a in arrays]
    for i in range(0, flat[0].size, _PART):
        yield tuple(a[i : i + _PART].astype(np.float64) for a in flat)


def matrices(w: np.ndarray, axes: Axes) -> np.ndarray:
    """`w` as an array (n, rows, columns) of all matrices that it is read as: a view if it can be one."""
    split, r = Reading.of(axes, w.shape).ungroup(w.shape)
    rows = math.prod(split[a] for a in r.contracted)
    columns = math.prod(split[a] for a in r.output)
    n = math.prod(split[a] for a in r.batch)
    return w.reshape(split).transpose(*r.batch, *r.contracted, *r.output).reshape(n, rows, columns)


def largest_singular_value(w: np.ndarray, axes: Axes, scale: float) -> tuple[float, bool]:
    """(the largest singular value of all matrices, whether it is a lower bound). No entry is larger than `scale`."""
    largest, is_bound = 0.0, False
    for matrix in matrices(w, axes):
        tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
        if tall.shape[1] <= EXACT:
            sigma, bound = _by_gram_matrix(tall, scale), False
        else:
            sigma, bound = _by_lanczos((tall / np.float32(scale)).astype(np.float32, copy=False))
        largest, is_bound = max(largest, sigma), is_bound or bound
    return scale * largest, is_bound


def _by_gram_matrix(tall: np.ndarray, scale: float) -> float:
    """The largest singular value of a matrix of few columns over `scale`."""
    n = tall.shape[1]
    gram, step = np.zeros((n, n)), max(1, 32 * _PART // max(n, 1))
    for i in range(0, len(tall), step):
        part = tall[i : i + step].astype(np.float64) / scale
        gram += part.T @ part
    return math.sqrt(max(float(np.linalg.eigvalsh(gram)[-1]), 0.0)) if n else 0.0


def _by_lanczos(tall: np.ndarray) -> tuple[float, bool]:
    """(the largest singular value on a Krylov space, whether it is only a bound): it never is above that of the matrix.

    The number of products with the matrix is bounded, so that no matrix takes more than about a minute.
    """
    n = tall.shape[1]
    steps = int(min(_STEPS, n, max(_FEWEST, _PRODUCTS // tall.size)))
    basis, images = np.zeros((n, 0)), np.zeros((len(tall), 0), np.float32)
    v, sigma = np.random.default_rng(0).normal(size=n), 0.0
    for _ in range(steps):
        whole = float(np.linalg.norm(v))
        for _ in range(2):  # once is not enough in floating point
            v = v - basis @ (basis.T @ v)
        norm = float(np.linalg.norm(v))
        if norm <= 1e-6 * whole:  # nothing new but rounding errors: the space holds the singular vector
            return sigma, False
        v = v / norm
        image = tall @ v.astype(np.float32)
        basis, images = np.column_stack([basis, v]), np.column_stack([images, image])
        before, sigma = sigma, float(np.linalg.norm(np.linalg.qr(images.astype(np.float64), "r"), 2))
        if sigma - before <= _CONVERGED * sigma:
            return sigma, False
        v = (image @ tall).astype(np.float64)
    return sigma, True
