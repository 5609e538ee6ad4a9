"""How a model reads a weight, judged by gradients alone, without a look at its program.

Of a layer with kernel w, the gradient of any loss is Σₚ xₚ δₚᵀ over the positions p where the layer is used. The
inputs x do not depend on the loss, and the errors δ do. So the gradients of two losses, as matrices (in, out) side by
side, have at most as many independent columns as there are positions, and one above the other they have more
independent rows. Under a wrong reading of the axes they have not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

N_LOSSES = 2


def matrices(w: Any, words: str) -> np.ndarray:
    """A weight in float64 as (batch, in, out), by the role of each axis in words: "batch in out", "in out, 2 groups".

    The axes of a "stack" number matrices that meet the same data. Those of a window, "win", are summed over.
    """
    w, (roles, _, groups) = np.asarray(w, np.float64), words.partition(", ")
    of = roles.split()
    if groups:
        place = of.index("out")
        w = w.reshape(*w.shape[:place], int(groups.split()[0]), -1, *w.shape[place + 1 :])
        of.insert(place, "batch")
    sides = [[a for a, role in enumerate(of) if role in side] for side in (("batch", "stack"), ("win", "in"), ("out",))]
    sizes = [int(np.prod([w.shape[a] for a in side])) for side in sides]
    return w.transpose([a for side in sides for a in side]).reshape(sizes)


def gradients(f: Callable[..., Any], params: Any, *args: Any) -> Any:
    """The gradients of two losses, random sums of the outputs, on a first axis of each leaf. Runs within `jit`."""

    def outputs(params: Any) -> list[jax.Array]:
        return [y for y in jax.tree.leaves(f(params, *args)) if jnp.issubdtype(y.dtype, jnp.floating)]

    ys, vjp = jax.vjp(outputs, params)
    keys = jax.random.split(jax.random.key(1), len(ys))
    losses = [jax.random.normal(key, (N_LOSSES, *y.shape), y.dtype) for key, y in zip(keys, ys, strict=True)]
    return jax.lax.map(lambda loss: vjp(loss)[0], losses)


class Ranks(NamedTuple):
    """Ranks of the gradients of two losses.

    Attributes:
      inputs: of the gradients side by side: at most the number of positions.
      errors: of the gradients one above the other: more than that, where there is room for more.
      all_inputs: of those of all matrices of a batch side by side: more than `inputs`, unless all meet the same data.
      room: the highest `errors` may be.
    """

    inputs: int
    errors: int
    all_inputs: int
    room: int


def ranks(gradients: Any, words: str) -> Ranks:
    """The ranks of gradients (loss, *shape of the weight) under a reading of its axes."""
    g = np.stack([matrices(one, words) for one in np.asarray(gradients)])  # (loss, batch, in, out)
    side, above = np.concatenate(g, -1), np.concatenate(g, -2)
    together = np.concatenate(side, -1)
    return Ranks(max(map(_rank, side)), max(map(_rank, above)), _rank(together), min(above.shape[1:]))


def _rank(m: np.ndarray) -> int:
    s = np.linalg.svd(m, compute_uv=False)
    return int((s > 1e-4 * s[0]).sum())


def confirmed(gradients: Any, words: str, positions: int) -> bool:
    """Whether the gradients of a weight that is used at so many positions are those of a weight read so."""
    r = ranks(gradients, words)
    batched = "batch" not in words.split(",")[0] or r.all_inputs > min(r.inputs, positions)
    return r.inputs <= positions and (r.errors > r.inputs or r.room <= positions) and batched


def singular_values(w: Any, words: str) -> np.ndarray:
    """The largest singular value of each matrix of a weight, in float64: (batch,)."""
    return np.linalg.svd(matrices(w, words), compute_uv=False)[:, 0]
