"""Computations on a mesh whose axes are explicit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax


def auto_sharded(f: Callable[..., Any], w: jax.Array, *arguments, like: Any = None) -> Any:
    """f(w, *arguments) with the shardings inside left to the compiler, whatever kind of mesh `w` lies on.

    On a mesh of explicit axes (`jax.make_mesh`'s default) a contraction or a scatter over a sharded axis must be told
    how its result is sharded. This says it once: as `like`, an array or a partition, or a tree of them, as the result
    is, or replicated, which suits small results.
    """
    mesh = jax.typeof(w).sharding.mesh
    if mesh.empty or not mesh.explicit_axes:
        return f(w, *arguments)
    spec = lambda a: a if isinstance(a, jax.sharding.PartitionSpec) else jax.typeof(a).sharding.spec
    out = jax.sharding.PartitionSpec() if like is None else jax.tree.map(spec, like)
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.sharding.auto_axes(f, out_sharding=out)(w, *arguments)
