"""The tree level: a transform on every selected weight of a parameter tree."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Container, Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax

from jaxweights.core.axes import Axes
from jaxweights.core.checks import naming
from jaxweights.core.convolution import Convolution
from jaxweights.core.guesses import warn_of_guesses
from jaxweights.core.inference import infer_axes
from jaxweights.core.joint import apply, init_each, update_each
from jaxweights.core.stale import state_moves, warn_if_differentiated
from jaxweights.core.transform import State, Transform, check_not_averaged, check_transform
from jaxweights.levels.paths import FlatTree, Where, check_layout, check_structure, flatten, is_weight, key_of, select

T = TypeVar("T")


class TreeState(NamedTuple):
    """The state of a lifted transform: {path: {name: array}}, split by who moves it.

    `learned` receives gradients and belongs to the optimizer; `fixed` is moved by `update`.
    """

    learned: dict[str, State]
    fixed: dict[str, State]


@dataclasses.dataclass(frozen=True)
class TreeTransform:
    """A transform, or rules of them, lifted to trees by `on_tree`."""

    rules: tuple[tuple[Where | None, Transform], ...]
    where: Where | None = None
    layout: Mapping[str, Axes] | None = None

    def init(self, params: Any, key: jax.Array) -> TreeState:
        """Makes the state of every selected weight. Each draws from `key` folded with a hash of its path."""
        return self.bind(params).init(key)

    def update(self, params: Any, state: TreeState, grads: Any = None) -> TreeState:
        """Returns the state for the next step; weights of one shape and role are updated in one batched computation."""
        bound = self.bind(params)
        if grads is None:
            return bound.update(state)
        grads = flatten(grads)
        check_structure("update", "grads", grads, bound.tree)
        return bound.update(state, grads.by_path)

    def apply(self, params: Any, state: TreeState) -> Any:
        """Transforms every selected weight of `params`; differentiable in `params` and `state.learned`."""
        bound = self.bind(params)
        return bound.tree.replaced(bound.apply(state))

    def store(self, params: Any, state: TreeState) -> Any:
        """Returns what `apply` does, as it is kept after training: stored weights under `FakeQuantize` and `LSQ`."""
        bound = self.bind(params)
        return bound.tree.replaced(bound.store(state))

    def selected(self, params: Any) -> dict[str, Transform]:
        """The transform of each selected weight, by path, with the axes of that weight."""
        return self.bind(params).transforms

    def bind(self, params: Any) -> BoundTransform:
        """Resolves paths, rules and axes on a tree, once for everything that is done with it."""
        tree = flatten(params)
        numbered = [(pattern, n) for n, (pattern, _) in enumerate(self.rules)]
        chosen = select(tree.paths, tree.leaves, numbered, self.where, self.layout)
        shapes = {p: tuple(a.shape) for p, a in zip(tree.paths, tree.leaves, strict=True) if is_weight(a)}
        known = self.layout or {}
        axes = {**infer_axes(shapes), **known}
        members: list[list[str]] = [[] for _ in self.rules]
        for position, n in sorted(chosen.items()):
            members[n].append(tree.paths[position])
        rules = [(t, paths) for (_, t), paths in zip(self.rules, members, strict=True) if paths]
        warn_of_guesses({path: t for t, paths in rules for path in paths if path not in known}, shapes)
        if convolutions := getattr(self.layout, "convolutions", None):
            rules = [each for t, paths in rules for each in _with_convolutions(t, paths, convolutions)]
        specs = {path: t.with_axes(axes[path]) if path in axes else t for t, paths in rules for path in paths}
        weights = {tree.paths[position]: tree.leaves[position] for position in sorted(chosen)}
        return BoundTransform(tree, rules, {path: specs[path] for path in weights}, axes, weights)


@dataclasses.dataclass(frozen=True)
class BoundTransform:
    """A lifted transform on one tree, with its rules resolved.

    Attributes:
      tree: the tree.
      rules: each transform with the paths that it applies to.
      transforms: the transform of each selected weight, by path, with the axes of that weight.
      axes: the axes that follow from the tree, by path.
      weights: the selected weights, by path.
    """

    tree: FlatTree
    rules: list[tuple[Transform, list[str]]]
    transforms: dict[str, Transform]
    axes: dict[str, Axes]
    weights: dict[str, jax.Array]

    def with_weights(self, weights: dict[str, jax.Array]) -> BoundTransform:
        """The same for other weights of these shapes."""
        return dataclasses.replace(self, weights=weights)

    def watched(self, remedy: str) -> BoundTransform:
        """The same, with a warning where weights are differentiated whose state an update would move."""

        def watch(t: Transform, path: str) -> jax.Array:
            w = self.weights[path]
            if not state_moves(t, w):
                return w
            return warn_if_differentiated(
                f"weights are differentiated under {type(t).__name__}, and its state stays as it is: {remedy}; or "
                f"unwrap the module and end the optimizer with jaxweights.project({type(t).__name__}(...)). Where "
                f"another call updates the state, ignore jaxweights.StaleStateWarning",
                w,
            )

        return self.with_weights(self.each(watch))

    def init(self, key: jax.Array) -> TreeState:
        """Makes the state of every weight."""
        learned, fixed = {}, {}
        for t, paths in self.rules:
            ws, keys = {path: self.weights[path] for path in paths}, {path: key_of(key, path) for path in paths}
            for path, state in init_each(t, ws, keys, self.axes).items():
                for part, names in ((learned, state.keys() & t.learned), (fixed, state.keys() - t.learned)):
                    if names:
                        part[path] = {n: state[n] for n in state if n in names}
        return TreeState(learned, fixed)

    def update(self, state: TreeState, grads: Mapping[str, jax.Array] | None = None) -> TreeState:
        """Returns the state for the next step."""
        self._check(state)
        fixed = dict(state.fixed)
        for t, paths in self.rules:
            ws = {path: self.weights[path] for path in paths}
            states = {path: {**state.fixed.get(path, {}), **state.learned.get(path, {})} for path in paths}
            own = {path: None if grads is None else grads.get(path) for path in paths}
            for path, new in update_each(t, *jax.lax.stop_gradient((ws, states, own)), self.axes).items():
                if path in fixed:
                    fixed[path] = {n: a for n, a in new.items() if n not in t.learned}
        return TreeState(state.learned, fixed)

    def apply(self, state: TreeState) -> dict[str, jax.Array]:
        """The transformed weights, by path."""
        states = self.states(state)
        return self.each(lambda t, path: apply(t, self.weights[path], states[path]))

    def store(self, state: TreeState) -> dict[str, Any]:
        """The transformed weights as they are kept after training, by path."""
        states = self.states(state)
        return self.each(lambda t, path: t.store(self.weights[path], states[path]))

    def each(self, f: Callable[[Transform, str], T], among: Container[str] | None = None) -> dict[str, T]:
        """{path: f(transform, path)} for every weight, or those `among` these. Errors name transform and path."""
        results = {}
        for path, t in self.transforms.items():
            if among is None or path in among:
                with naming(type(t).__name__, path):
                    results[path] = f(t, path)
        return results

    def states(self, state: TreeState) -> dict[str, State]:
        """The state of each weight, by path, to apply: of its entries only the learned ones have a gradient."""
        self._check(state)
        fixed = jax.lax.stop_gradient(state.fixed)
        return {path: {**fixed.get(path, {}), **state.learned.get(path, {})} for path in self.transforms}

    def _check(self, state: TreeState) -> None:
        """Raises unless the state comes from `init` on a tree with these paths, or is a mean of such."""
        if not isinstance(state, TreeState):
            raise TypeError(f"state must be the TreeState that init returned, got {type(state).__name__}")
        for path in [*state.learned, *state.fixed]:
            if path not in self.transforms:
                raise ValueError(
                    f"state has an entry for {path!r}, which is not a selected weight of this tree: call init on it. "
                    f"Selected are: {', '.join(sorted(self.transforms))}"
                )
        for _, paths in self.rules:
            checked = set()  # what a state is made of follows from the rule, so one weight of each kind is enough
            for path in paths:
                entries = state.fixed.get(path, {})
                kind = tuple((name, getattr(entry, "dtype", type(entry))) for name, entry in entries.items())
                if kind not in checked:
                    checked.add(kind)
                    t = self.transforms[path]
                    with naming(type(t).__name__, path):
                        check_not_averaged(t, self.weights[path], entries)


def _with_convolutions(
    t: Transform, paths: list[str], convolutions: Mapping[str, Convolution]
) -> list[tuple[Transform, list[str]]]:
    """A rule with the geometry of each layer filled in: one rule for all layers between which that does not differ."""
    specs: dict[Transform, list[str]] = {}
    for path in paths:
        spec = t.with_convolution(convolutions[path]) if path in convolutions else t
        specs.setdefault(spec, []).append(path)
    return list(specs.items())


def on_tree(
    transform: Transform | Mapping[str, Transform],
    where: Where | None = None,
    *,
    layout: Mapping[str, Axes] | None = None,
) -> TreeTransform:
    """Lifts a transform from one weight to a tree of them.

    Args:
      transform: a transform, or rules {glob: transform}. The first rule that matches a path applies.
      where: the weights to transform: a glob on paths ("**/kernel"), a list of globs, or a predicate
        `(path, array) -> bool`. By default, weights with two or more axes except biases, scales, tokens and positions;
        with rules, the weights that they match.
      layout: how a program reads the weights, from `jaxweights.layout`, or a dict {path: Axes}. These are then the
        axes, and the default `where` is the weights in the layout. Without it, axes follow from names and shapes, as
        `jaxweights.describe` says, and an `AxesWarning` names those that are a guess.

    Returns:
      An object with `init(params, key)`, `update(params, state)` and `apply(params, state)`, and `store(params, state)`
      for the tree to keep after training. All other leaves pass through, None, stored weights and leaves that are not
      floating-point arrays among them.

    Raises:
      TypeError: `transform` is not a transform, or `layout` not a mapping of `Axes`.
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
    check_layout(layout)
    return TreeTransform(tuple(rules), where, layout)
