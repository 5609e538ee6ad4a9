"""The tree level: a transform on every selected weight of a parameter tree."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jaxweights.core.axes import Axes, infer_axes
from jaxweights.core.checks import naming
from jaxweights.core.transform import State, Transform, check_transform
from jaxweights.levels.paths import Where, check_structure, flatten, is_weight, key_of, select


class TreeState(NamedTuple):
    """The state of a lifted transform: {path: {name: array}}, apart by who moves it.

    `learned` receives gradients and belongs to the optimizer; `fixed` is moved by `update`.
    """

    learned: dict[str, State]
    fixed: dict[str, State]


@dataclasses.dataclass(frozen=True)
class TreeTransform:
    """A transform, or rules of them, lifted to trees by `on_tree`."""

    rules: tuple[tuple[Where | None, Transform], ...]
    where: Where | None = None

    def init(self, params: Any, key: jax.Array) -> TreeState:
        """The state for every selected weight. Each draws from `key` folded with a hash of its path."""
        paths, leaves, _ = flatten(params)
        chosen = self._chosen(paths, leaves)
        keys = {i: key_of(key, paths[i]) for i in chosen}
        work = {i: (t, (leaves[i], keys[i])) for i, t in chosen.items()}
        new = self._joint(work, paths, leaves, lambda t, *arguments: t.init_all(*arguments))
        new |= _by_shape(work, paths, lambda t, w, k: t.init(w, k))
        learned, fixed = {}, {}
        for i, state in new.items():
            names = chosen[i].learned
            for part, entry in (
                (learned, {n: a for n, a in state.items() if n in names}),
                (fixed, {n: a for n, a in state.items() if n not in names}),
            ):
                if entry:
                    part[paths[i]] = entry
        return TreeState(learned, fixed)

    def update(self, params: Any, state: TreeState, grads: Any = None) -> TreeState:
        """The state for the next step; weights of one shape and role are updated in one batched computation."""
        paths, leaves, _ = flatten(params)
        chosen = self._chosen(paths, leaves)
        self._check(state, paths, chosen)
        by_path: dict[str, Any] = {}
        if grads is not None:
            check_structure("update", "grads", grads, params)
            grad_paths, grad_leaves, _ = flatten(grads)
            by_path = dict(zip(grad_paths, grad_leaves, strict=True))
        given = lambda i, t: (leaves[i], self._state(paths[i], state, t), by_path.get(paths[i]))
        work = {i: (t, jax.lax.stop_gradient(given(i, t))) for i, t in chosen.items()}
        new = self._joint(work, paths, leaves, lambda t, *arguments: t.update_all(*arguments))
        for i in [i for i in work if paths[i] not in state.fixed]:  # nothing to move; the transform checks that
            t, arguments = work.pop(i)
            with naming(type(t).__name__, paths[i]):
                t.update(*arguments)
        new |= _by_shape(work, paths, lambda t, w, s, g: t.update(w, s, g))
        fixed = dict(state.fixed)
        for i, entry in new.items():
            fixed[paths[i]] = {n: a for n, a in entry.items() if n not in chosen[i].learned}
        return TreeState(state.learned, fixed)

    def apply(self, params: Any, state: TreeState) -> Any:
        """`params` with every selected weight transformed; differentiable in `params` and `state.learned`."""
        paths, leaves, treedef = flatten(params)
        maps = self.maps(params, state)
        new = [maps[path](w) if path in maps else w for path, w in zip(paths, leaves, strict=True)]
        return jax.tree_util.tree_unflatten(treedef, new)

    def maps(self, params: Any, state: TreeState) -> dict[str, Callable[[jax.Array], jax.Array]]:
        """w -> w' of each selected weight, by path, under this state."""
        paths, leaves, _ = flatten(params)
        chosen = self._chosen(paths, leaves)
        self._check(state, paths, chosen)

        def mapped(w: jax.Array, *, t: Transform, path: str) -> jax.Array:
            with naming(type(t).__name__, path):
                return t.apply(w, self._state(path, state, t))

        return {paths[i]: functools.partial(mapped, t=t, path=paths[i]) for i, t in chosen.items()}

    def anchors(self, params: Any, state: TreeState) -> dict[str, float | jax.Array]:
        """The anchor of each selected weight, by path: the side on which `project` rounds."""
        paths, leaves, _ = flatten(params)
        chosen = self._chosen(paths, leaves)
        return {paths[i]: t.anchor(leaves[i], self._state(paths[i], state, t)) for i, t in chosen.items()}

    def selected(self, params: Any) -> dict[str, Transform]:
        """The transform of each selected weight, by path: what `where` and the rules come to on this tree."""
        paths, leaves, _ = flatten(params)
        return {paths[i]: t for i, t in self._chosen(paths, leaves).items()}

    def _chosen(self, paths: list[str], leaves: list[Any]) -> dict[int, Transform]:
        chosen, inferred = select(paths, leaves, self.rules, self.where), _inferred(paths, leaves)
        return {i: t.with_axes(inferred[paths[i]]) if paths[i] in inferred else t for i, t in sorted(chosen.items())}

    def _joint(self, work: dict[int, Any], paths: list[str], leaves: list[Any], f) -> dict[int, State]:
        """What f(transform, *{path: argument}, axes) makes of each rule that is joint, taken out of the work."""
        joint = [n for n, (_, t) in enumerate(self.rules) if t.joint]
        if not joint:
            return {}
        rules = [(pattern, n) for n, (pattern, _) in enumerate(self.rules)]
        rule, inferred = select(paths, leaves, rules, self.where), _inferred(paths, leaves)
        new: dict[int, State] = {}
        for n in joint:
            members = {paths[i]: i for i in sorted(rule) if rule[i] == n}
            if members:
                columns = zip(*(work.pop(i)[1] for i in members.values()), strict=True)
                arguments = (dict(zip(members, column, strict=True)) for column in columns)
                states = f(self.rules[n][1], *arguments, inferred)
                new |= {i: states[path] for path, i in members.items()}
        return new

    def _check(self, state: TreeState, paths: list[str], chosen: dict[int, Transform]) -> None:
        """A state must come from `init` on a tree with these paths."""
        if not isinstance(state, TreeState):
            raise TypeError(f"state must be the TreeState that init returned, got {type(state).__name__}")
        known = {paths[i] for i in chosen}
        for path in [*state.learned, *state.fixed]:
            if path not in known:
                raise ValueError(
                    f"state has an entry for {path!r}, which is not a selected weight of this tree: call init on it. "
                    f"Selected are: {', '.join(sorted(known))}"
                )

    def _state(self, path: str, state: TreeState, t: Transform) -> State:
        """The state of one weight; the one place where gradients are stopped."""
        fixed = {n: jax.lax.stop_gradient(a) for n, a in state.fixed.get(path, {}).items()}
        return fixed | state.learned.get(path, {})


def on_tree(transform: Transform | Mapping[str, Transform], where: Where | None = None) -> TreeTransform:
    """Lifts a transform from one weight to a tree of them.

    Args:
      transform: a transform, or rules {glob: transform} of which the first that matches a path is taken.
      where: the weights to transform: a glob on paths ("**/kernel"), a list of globs, or a predicate
        `(path, array) -> bool`. By default those with two or more axes that are no biases or scales; with rules,
        those the rules name.

    Returns:
      An object with `init(params, key)`, `update(params, state)` and `apply(params, state)`. All other leaves,
      None leaves and anything that is no floating-point array pass through.

    Raises:
      TypeError: `transform` is no transform.
      ValueError: (when used) a glob or `where` selects nothing; it lists the paths there are.

    >>> import jax, jax.numpy as jnp
    >>> import jaxweights as jw
    >>> params = {"dense": {"kernel": 3 * jnp.ones((2, 2)), "bias": 3 * jnp.ones(2)}}
    >>> clip = on_tree(jw.ClipWeights(1.0))
    >>> state = clip.init(params, jax.random.key(0))
    >>> print(clip.apply(params, state))
    {'dense': {'bias': Array([3., 3.], dtype=float32), 'kernel': Array([[1., 1.],
           [1., 1.]], dtype=float32)}}
    """
    if isinstance(transform, Mapping):
        if not transform:
            raise ValueError("the rules are empty: give {glob: transform}, or one transform")
        rules: list[tuple[Where | None, Transform]] = []
        for glob, t in transform.items():
            if not isinstance(glob, str):
                raise TypeError(f"the rules must be {{glob: transform}}, got the key {glob!r}")
            check_transform(f"the rule {glob!r}", t)
            rules.append((glob, t))
    else:
        check_transform("on_tree", transform)
        rules = [(None, transform)]
    if isinstance(where, Iterable) and not isinstance(where, str):
        where = tuple(where)
    return TreeTransform(tuple(rules), where)


def _inferred(paths: list[str], leaves: list[Any]) -> dict[str, Axes]:
    """What the weights of the tree tell of each other's axes, by path."""
    return infer_axes({p: tuple(a.shape) for p, a in zip(paths, leaves, strict=True) if is_weight(a)})


def _by_shape(work: dict[int, tuple[Transform, tuple]], paths: list[str], f) -> dict[int, State]:
    """f(transform, *arguments) for every weight; those alike are stacked and go through one vmap.

    Alike are weights of one transform, shape, dtype and sharding whose paths differ in numbers only. The last is for
    the shardings that a jitted function cannot see: the layers of a model are sharded alike, but its query and its
    output projection are not, and to stack those would move weights between devices.
    """
    groups: dict[Any, list[int]] = {}
    for i, (t, arguments) in work.items():
        leaves, treedef = jax.tree.flatten(arguments)
        role = re.sub(r"\d+", "#", paths[i])
        key = (id(t) if _unhashable(t) else t, role, treedef, tuple(map(_signature, leaves)))
        groups.setdefault(key, []).append(i)
    out: dict[int, State] = {}
    for members in groups.values():
        t = work[members[0]][0]
        with naming(type(t).__name__, paths[members[0]]):
            if len(members) == 1:
                out[members[0]] = f(t, *work[members[0]][1])
                continue
            stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *(work[i][1] for i in members))
            result = jax.vmap(lambda *arguments, t=t: f(t, *arguments))(*stacked)
            for position, i in enumerate(members):
                out[i] = {n: a[position] for n, a in result.items()}
    return out


def _signature(x: jax.Array) -> tuple:
    sharding = jax.typeof(x).sharding if isinstance(x, Tracer) else getattr(x, "sharding", None)
    return (x.shape, x.dtype, sharding)


def _unhashable(t: Transform) -> bool:
    try:
        hash(t)
    except TypeError:  # a field is an array, as under optax.inject_hyperparams
        return True
    return False
