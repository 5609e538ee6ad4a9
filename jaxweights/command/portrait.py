"""What the pictures of `jaxweights inspect --plot` show of one weight."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from jaxweights.command.statistics import matrices, parts
from jaxweights.core.axes import Axes

EDGES = np.linspace(-12, 12, 193)
"""Ends of the bins of the histogram, in standard deviations. The outer bins hold all that lies beyond."""
BITS = (2, 3, 4, 5, 6, 7, 8)
MOST_OUTPUTS = 1024
"""Output units of which the spectrum and the errors are computed; of more, so many at even distances."""


class Portrait(NamedTuple):
    """A weight as a picture shows it.

    Attributes:
      name: its name.
      counts: of the entries that are not 0, how many lie in each bin of `EDGES`.
      singular_values: from the largest to the smallest.
      errors: ‖q − w‖ / ‖w‖ if it is rounded to integers of each number of `BITS`, with a scale per output unit.
    """

    name: str
    counts: np.ndarray
    singular_values: np.ndarray
    errors: np.ndarray


def portrait(name: str, w: np.ndarray, axes: Axes) -> Portrait | None:
    """The portrait of a weight; None if it is 0, empty or not finite. Of a stack, the first matrix is drawn."""
    n, total, squares, largest = 0, 0.0, 0.0, 0.0
    for (part,) in parts(w):
        n, total, squares = n + int(np.count_nonzero(part)), total + float(part.sum()), squares + float(part @ part)
        largest = max(largest, float(np.abs(part).max()))
    if not n or not math.isfinite(squares):
        return None
    std = math.sqrt(max(squares / n - (total / n) ** 2, 0.0)) or largest
    counts = np.zeros(len(EDGES) - 1, np.int64)
    for (part,) in parts(w):
        counts += np.histogram(np.clip(part[part != 0] / std, EDGES[0], EDGES[-1]), EDGES)[0]
    matrix = matrices(w, axes)[0]
    step = -(-matrix.shape[1] // MOST_OUTPUTS)
    matrix = matrix[:, ::step].astype(np.float32) / np.float32(largest)
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    eigenvalues = np.linalg.eigvalsh((tall.T @ tall).astype(np.float64))[::-1]
    return Portrait(name, counts, np.sqrt(np.maximum(eigenvalues, 0)), errors(matrix))


def errors(matrix: np.ndarray) -> np.ndarray:
    """The relative error of rounding a matrix (in, out) to each number of `BITS`: q = s round(w/s), s per column."""
    absmax, norm = np.abs(matrix).max(0), float(np.linalg.norm(matrix))
    found = []
    for bits in BITS:
        scale = np.where(absmax > 0, absmax / (2 ** (bits - 1) - 1), 1)
        found.append(float(np.linalg.norm(np.round(matrix / scale) * scale - matrix)) / norm if norm else 0.0)
    return np.array(found)
