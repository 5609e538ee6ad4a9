"""Plots of sparsity: the density of every weight, and the mask of one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxweights.core.axes import axes_or_default
from jaxweights.core.checks import check_weight
from jaxweights.core.stored import Stored
from jaxweights.levels.paths import Where
from jaxweights.models.summary import Summary, read

if TYPE_CHECKING:
    from matplotlib.axes import Axes as Panel

    from jaxweights.core.axes import Axes

_COLOR, _LIGHT = "#1f5fa8", "#e8edf3"


def plot_density(params: Any, where: Where | None = None, *, panel: Panel | None = None) -> Panel:
    """Plots the density of every weight, its fraction of non-zero entries, as bars in the order of the tree.

    Args:
      params: a `Summary`, or any pytree of weights as for `summarize`.
      where: the weights to show, as for `on_tree`; by default those of two or more axes.
      panel: matplotlib axes to draw in; by default those of a new figure.

    Returns:
      The matplotlib axes.

    Raises:
      ImportError: matplotlib is not installed.
      ValueError: `where` selects nothing.

    >>> import jax.numpy as jnp
    >>> panel = plot_density({"dense": {"kernel": jnp.eye(4)}})
    >>> print(panel.get_yticklabels()[0].get_text(), panel.texts[0].get_text())
    dense/kernel 25.0%  1:4
    """
    rows = params.rows if isinstance(params, Summary) else read(params, where, None)[0].rows
    if where is None and not isinstance(params, Summary):
        rows = [r for r in rows if len(r.shape) >= 2]
        if not rows:
            raise ValueError("params has no weight of two or more axes: say with where which to plot")
    panel = panel or _new_panel(7, 0.32 * len(rows) + 1)
    positions, densities = range(len(rows)), [100 * r.density for r in rows]
    panel.barh(positions, [100] * len(densities), color=_LIGHT, height=0.7)
    panel.barh(positions, densities, color=_COLOR, height=0.7)
    for y, row in zip(positions, rows, strict=True):
        pattern = f"  {row.pattern}" if row.pattern else ""
        panel.text(101, y, f"{row.density:.1%}{pattern}", va="center", fontsize=8)
    panel.set_yticks(list(positions), [r.path for r in rows], fontsize=8)
    panel.set_xlim(0, 120)
    panel.set_xticks(range(0, 101, 20))
    panel.set_xlabel("non-zero entries, %")
    panel.invert_yaxis()
    panel.spines[["top", "right", "left"]].set_visible(False)
    panel.tick_params(axis="y", length=0)
    return panel


def plot_mask(w: jax.Array | Stored, *, axes: Axes | None = None, panel: Panel | None = None) -> Panel:
    """Plots where a weight or a mask is not zero: inputs from top to bottom, outputs from left to right.

    Args:
      w: float or boolean array of any shape, or a stored weight.
      axes: how `w` is read as a matrix; (..., in, out) by default. Of a stack, the first matrix is shown.
      panel: matplotlib axes to draw in; by default those of a new figure.

    Returns:
      The matplotlib axes.

    Raises:
      ImportError: matplotlib is not installed.
      TypeError: `w` is not a float or boolean array.
      ValueError: `axes` does not fit `w`.

    >>> import jax.numpy as jnp
    >>> print(plot_mask(jnp.eye(4)).images[0].get_array().sum())
    4.0
    """
    if isinstance(w, Stored):
        axes, w = axes or getattr(w, "axes", None), w.todense()
    if getattr(w, "dtype", None) == jnp.bool_:
        w = jnp.asarray(w, jnp.float32)
    w = check_weight(w)
    matrix = np.asarray(axes_or_default(axes, w.ndim).matrix(w))
    kept = (matrix.reshape(-1, *matrix.shape[-2:])[0] != 0).astype(np.float32)
    panel = panel or _new_panel(6, 5)
    from matplotlib.colors import LinearSegmentedColormap

    shades = LinearSegmentedColormap.from_list("density", [_LIGHT, _COLOR])
    panel.imshow(kept, cmap=shades, vmin=0, vmax=1, aspect="auto", interpolation="antialiased")
    panel.set_xlabel("output")
    panel.set_ylabel("input")
    return panel


def _new_panel(width: float, height: float) -> Panel:
    try:
        from matplotlib import pyplot as plt
    except ImportError as e:
        raise ImportError("plots need matplotlib, which is not installed: pip install matplotlib") from e
    return plt.subplots(figsize=(width, height), layout="constrained")[1]
