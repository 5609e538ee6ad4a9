"""Any Linen module with its weights transformed."""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax

from jaxweights.core.transform import Transform
from jaxweights.levels.paths import STATE, Where
from jaxweights.levels.tree import BoundTransform, TreeState, on_tree


class Transformed(nn.Module):
    """A Linen module that computes with transformed weights and stores the plain ones.

    The parameters keep their names and are never overwritten. The state of the transform is stored beside them: learned
    entries in the collection "params" under the name "weight_transform", all others in the collection
    "weight_transform". `apply` updates that collection if it is mutable: `model.apply(variables, x)` evaluates,
    `model.apply(variables, x, mutable=["weight_transform"])` is a training step.

    The wrapper has all public methods of the module (`method="encode"`).

    Attributes:
      module: any Linen module. It may use `nn.scan`, `nn.remat`, dropout, batch norm and `sow`.
      transform: a transform, or rules {glob: transform} on the paths within the module.
      where: the weights to transform, as in `on_tree`.

    Raises:
      ValueError: (in `init` or `apply`) `where` selects nothing, the module is itself a `Transformed`, the state is
        missing, or a selected weight is out of reach.

    >>> import flax.linen as nn, jax, jax.numpy as jnp
    >>> import jaxweights as jw
    >>> model = jw.linen.Transformed(nn.Dense(2), jw.ClipWeights(0.0))
    >>> variables = model.init(jax.random.key(0), jnp.ones((1, 3)))
    >>> sorted(variables["params"])
    ['bias', 'kernel']
    >>> print(model.apply(variables, jnp.ones((1, 3))))
    [[0. 0.]]
    """

    module: nn.Module
    transform: Transform | Mapping[str, Transform]
    where: Where | None = None

    def setup(self):
        """Puts the module into the wrapper's scope, so that names do not change."""
        if not isinstance(self.module, nn.Module):
            remedy = "NNX has nnx.transformed"
            if isinstance(self.module, type):
                remedy = f"make an instance, {self.module.__name__}(...)"
            raise TypeError(f"module must be a linen.Module, got {self.module!r}: {remedy}")
        if isinstance(self.module, Transformed):
            raise ValueError(
                "Transformed got a module that is itself a Transformed: compose the transforms instead, "
                "Transformed(module, Chain(inner, outer))"
            )
        nn.share_scope(self, self.module)

    def __call__(self, *args, **kwargs):
        """The module's own call, with transformed weights."""
        return self._run("__call__", args, kwargs)

    def __getattr__(self, name: str) -> Any:
        """The module's other methods, with transformed weights."""
        module = self.__dict__.get("module")
        if module is None or name.startswith("_") or not callable(getattr(type(module), name, None)):
            return super().__getattr__(name)  # type: ignore[misc]
        return types.MethodType(lambda bound, *args, **kwargs: bound._run(name, args, kwargs), self)

    @nn.compact
    def _run(self, method: str, args: tuple, kwargs: dict) -> Any:
        def call(module):
            return getattr(module, method)(*args, **kwargs)

        if self.is_initializing():
            call(self.module)  # makes the parameters
        bound = on_tree(self.transform, self.where).bind(_plain(self.variables))
        state = self._make(bound) if self.is_initializing() else _stored(bound, self.variables)
        if state.fixed and self.is_mutable_collection(STATE) and not self.is_initializing():
            state = bound.update(state)
            for path, entry in state.fixed.items():
                self.put_variable(STATE, path, entry)

        # Leaves are matched by identity: `swap` runs once per scope, and a submodule that is shared with another module
        # has its own scope.
        new = {id(bound.weights[path]): w for path, w in bound.apply(state).items() if w is not bound.weights[path]}
        swapped: set[int] = set()

        def swap(leaf):
            swapped.add(id(leaf))
            return new.get(id(leaf), leaf)

        y = nn.map_variables(call, "params", trans_in_fn=lambda scope: jax.tree.map(swap, scope))(self.module)
        if missed := new.keys() - swapped:
            paths = [path for path, w in bound.weights.items() if id(w) in missed]
            raise ValueError(f"Transformed did not reach the weights {paths}: wrap the module that owns them")
        return y

    def _make(self, bound: BoundTransform) -> TreeState:
        """The state at initialization, from the key of the parameters."""
        if self.has_variable("params", STATE) or self.variables.get(STATE):
            return _stored(bound, self.variables)
        state = bound.init(self.make_rng("params"))
        if state.learned:
            self.param(STATE, lambda _: state.learned)
        for path, entry in state.fixed.items():
            self.variable(STATE, path, lambda entry=entry: entry)
        return state


def fold(model: Transformed, variables: Mapping[str, Any]) -> dict[str, Any]:
    """The variables of the plain module that computes what the transformed one does, for export and evaluation.

    `model.module.apply(fold(model, variables), ...)` equals `model.apply(variables, ...)`.

    Args:
      model: a `Transformed` module.
      variables: all its collections. For one inside a larger model, its part of them.

    Returns:
      The collections without the state of the transform, the selected parameters transformed.

    Raises:
      TypeError: `model` is not a `Transformed`.
      ValueError: the state is missing.

    >>> import flax.linen as nn, jax, jax.numpy as jnp
    >>> import jaxweights as jw
    >>> model = jw.linen.Transformed(nn.Dense(2), jw.ClipWeights(0.0))
    >>> variables = model.init(jax.random.key(0), jnp.ones((1, 3)))
    >>> print(fold(model, variables)["params"]["kernel"].sum())
    0.0
    """
    if not isinstance(model, Transformed):
        raise TypeError(f"model must be a linen.Transformed, got {type(model).__name__}: there is nothing to fold")
    bound = on_tree(model.transform, model.where).bind(_plain(variables))
    params = bound.tree.replaced(bound.apply(_stored(bound, variables)))
    return {name: value for name, value in variables.items() if name != STATE} | {"params": params}


def _plain(variables: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of the module itself."""
    return {name: value for name, value in variables.get("params", {}).items() if name != STATE}


def _stored(bound: BoundTransform, variables: Mapping[str, Any]) -> TreeState:
    """The stored state of a wrapper, without that of wrappers further in."""

    def own(entries):
        return {path: dict(entry) for path, entry in entries.items() if path in bound.weights}

    return TreeState(own(variables.get("params", {}).get(STATE, {})), own(variables.get(STATE, {})))
