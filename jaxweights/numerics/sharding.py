"""Computations on meshes with explicit axes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax


def auto_sharded(f: Callable[..., Any], w: jax.Array, *arguments, like: Any = None) -> Any:
    """Computes f(w, *arguments) and lets the compiler choose the shardings inside, on any kind of mesh.

    On a mesh with explicit axes (the default of `jax.make_mesh`), a contraction or scatter over a sharded axis must
    state the sharding of its result. Here only the result of f has one: that of `like`, an array, a `PartitionSpec` or
    a tree of them that matches the result. By default it is replicated, which suits small results.
    """
    mesh = jax.typeof(w).sharding.mesh
    if mesh.empty or not mesh.explicit_axes:
        return f(w, *arguments)
    out = jax.sharding.PartitionSpec() if like is None else jax.tree.map(_partition, like)
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.sharding.auto_axes(f, out_sharding=out)(w, *arguments)


def _partition(a: Any) -> jax.sharding.PartitionSpec:
    return a if isinstance(a, jax.sharding.PartitionSpec) else jax.typeof(a).sharding.spec
