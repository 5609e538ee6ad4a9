"""Transforms of several weights: one by one, in a batch where they are alike, or jointly."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp

from jaxweights.core.axes import Axes
from jaxweights.core.checks import naming
from jaxweights.core.tracing import traced_once
from jaxweights.core.transform import State, Transform
from jaxweights.numerics.batching import grouped, likeness, unstacked

Weights = Mapping[str, jax.Array]
"""Weights by path."""


@dataclasses.dataclass(frozen=True)
class JointTransform(Transform):
    """A transform whose state for one weight depends on the other weights that a rule of `on_tree` selects.

    A subclass defines `init_all` and `update_all`, which see all of them by path. `init` and `update` follow: they are
    the case of a single weight. `apply` is of one weight, as in every transform.
    """

    @property
    def joint(self) -> bool:
        """Whether this spec needs all weights at once. If not, a tree calls `init` and `update` of each."""
        return True

    def init_all(self, ws: Weights, keys: Mapping[str, jax.Array], axes: Mapping[str, Axes]) -> dict[str, State]:
        """Makes the states of several weights by path; `axes` has those that the tree knows."""
        raise TypeError(f"{type(self).__name__} defines no init_all: it needs init_all, update_all and apply")

    def update_all(
        self, ws: Weights, states: Mapping[str, State], grads: Mapping[str, jax.Array | None], axes: Mapping[str, Axes]
    ) -> dict[str, State]:
        """Returns the states of several weights for the next step, by path."""
        raise TypeError(f"{type(self).__name__} defines no update_all: it needs init_all, update_all and apply")

    def init(self, w, key):
        """Makes the state for the weight `w` alone."""
        (state,) = self.init_all({"": w}, {"": key}, {}).values()
        return state

    def update(self, w, state, grad=None):
        """Returns the state of `w` alone for the next step."""
        (state,) = self.update_all({"": w}, {"": state}, {"": grad}, {}).values()
        return state


def is_joint(t: Transform) -> TypeGuard[JointTransform]:
    """Whether a transform needs all weights of a rule at once."""
    return isinstance(t, JointTransform) and t.joint


def for_each(t: Any, paths: Iterable[str], axes: Mapping[str, Axes], f: Callable[[Any, str], Any]) -> dict[str, Any]:
    """{path: f(t with the axes of the path, path)}. Errors name the transform and the path."""
    results = {}
    for path in paths:
        with naming(type(t).__name__, path):
            results[path] = f(t.with_axes(axes[path]) if path in axes else t, path)
    return results


def init_each(t: Transform, ws: Weights, keys: Mapping[str, jax.Array], axes: Mapping[str, Axes]) -> dict[str, State]:
    """Makes the states of several weights under one transform, jointly if it needs that."""
    if is_joint(t):
        return t.init_all(ws, keys, axes)
    return in_batches(t, {path: (w, keys[path]) for path, w in ws.items()}, axes, lambda t, w, key: t.init(w, key))


def update_each(
    t: Transform,
    ws: Weights,
    states: Mapping[str, State],
    grads: Mapping[str, jax.Array | None],
    axes: Mapping[str, Axes],
) -> dict[str, State]:
    """Returns the states of several weights for the next step, updated jointly if the transform needs that."""
    if is_joint(t):
        return t.update_all(ws, states, grads, axes)
    moving = [path for path in ws if states[path].keys() - t.learned]
    # Where nothing moves `update` checks the state and returns it: no reason to stack the weights.
    new = for_each(t, [p for p in ws if p not in moving], axes, lambda t, p: t.update(ws[p], states[p], grads[p]))
    arguments = {path: (ws[path], states[path], grads[path]) for path in moving}
    new |= in_batches(t, arguments, axes, lambda t, w, state, grad: t.update(w, state, grad))
    return {path: new[path] for path in ws}


def apply_each(
    t: Transform, ws: Weights, states: Mapping[str, State], axes: Mapping[str, Axes]
) -> dict[str, jax.Array]:
    """Applies one transform to several weights."""
    return for_each(t, ws, axes, lambda t, path: apply(t, ws[path], states[path]))


@traced_once
def apply(t: Transform, w: jax.Array, state: State) -> jax.Array:
    """t.apply(w, state)."""
    return t.apply(w, state)


def in_batches(
    t: Any, arguments: Mapping[str, tuple], axes: Mapping[str, Axes], f: Callable[..., State]
) -> dict[str, State]:
    """{path: f(t with the axes of the path, *arguments)}; weights of one reading that are alike share one `vmap`."""
    paths, flat = list(arguments), [jax.tree.flatten(given) for given in arguments.values()]
    keys = [(axes.get(p), treedef, likeness(p, *leaves)) for p, (leaves, treedef) in zip(paths, flat, strict=True)]
    states: dict[str, State] = {}
    for group in grouped(keys):
        members = [paths[i] for i in group]
        reading, *_ = keys[group[0]]
        spec = t if reading is None else t.with_axes(reading)
        with naming(type(t).__name__, members[0]):
            if len(members) == 1:
                states[members[0]] = f(spec, *arguments[members[0]])
                continue
            stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *(arguments[path] for path in members))
            result = jax.vmap(lambda *stacked, spec=spec: f(spec, *stacked))(*stacked)
            entries = {n: unstacked(a) for n, a in result.items()}
            states |= {path: {n: parts[i] for n, parts in entries.items()} for i, path in enumerate(members)}
    return {path: states[path] for path in arguments}
