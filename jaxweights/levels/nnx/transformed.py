"""Any NNX module with its weights transformed."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
from flax import nnx

from jaxweights.core.transform import State, Transform
from jaxweights.levels.paths import STATE, Where
from jaxweights.levels.tree import BoundTransform, TreeState, TreeTransform, on_tree

M = TypeVar("M", bound=nnx.Module)


class TransformVariable(nnx.Variable):
    """State that a transform keeps between steps and that is not optimized: singular vectors, masks, counts."""


def transformed(
    module: M,
    transform: Transform | Mapping[str, Transform],
    where: Where | None = None,
    *,
    rngs: nnx.Rngs | None = None,
) -> M:
    """An NNX module that computes with transformed weights and stores the plain ones.

    The result is an instance of a subclass of the module's class and shares the module's variables. Attributes,
    parameter names and `isinstance` stay as they are, and no stored parameter is overwritten. Its methods run on a
    shadow of the module whose selected weights are transformed. Its attribute `weight_transform` holds the state of the
    transform: learned entries as `nnx.Param`, all others as `TransformVariable`. A call updates them in training mode;
    `model.train()` and `model.eval()` switch, as for dropout.

    Args:
      module: any NNX module.
      transform: a transform, or rules {glob: transform} on the paths within the module.
      where: the weights to transform, as for `on_tree`.
      rngs: the source of the key for the initial state (stream "params"); by default it is key 0.

    Returns:
      The transformed module.

    Raises:
      TypeError: `module` is not an NNX module.
      ValueError: `where` selects nothing, or `module` is already transformed.

    >>> from flax import nnx
    >>> import jax.numpy as jnp
    >>> import jaxweights as jw
    >>> model = transformed(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), jw.ClipWeights(0.0))
    >>> print(model(jnp.ones((1, 3))))
    [[0. 0.]]
    >>> bool((model.kernel[...] != 0).all())      # as stored
    True
    """
    if not isinstance(module, nnx.Module):
        remedy = "Linen has linen.Transformed"
        if isinstance(module, type):
            remedy = f"make an instance, {module.__name__}(...)"
        raise TypeError(f"module must be an nnx.Module, got {module!r}: {remedy}")
    if rngs is not None and not isinstance(rngs, nnx.Rngs):
        raise TypeError(f"rngs must be an nnx.Rngs, got {type(rngs).__name__}: write nnx.Rngs(0)")
    if hasattr(module, STATE):
        raise ValueError(
            "transformed got a module that is already transformed: compose the transforms instead, "
            "transformed(module, Chain(inner, outer))"
        )
    lifted = on_tree(transform, where)
    key = rngs.params() if rngs is not None else jax.random.key(0)
    state = lifted.init(_params(module), key)
    new = _copy(module, lambda _, variable: variable, _transformed_class(type(module)))
    setattr(new, STATE, _Control(lifted, state))
    return new


def fold(module: M) -> M:
    """The plain module that computes what the transformed one does, for export and evaluation.

    Args:
      module: what `transformed` returned.

    Returns:
      A copy of the module, of its original class, whose selected parameters are the transformed ones. Nothing is
      shared with the transformed module, whose state stays as it is.

    Raises:
      ValueError: `module` is not transformed.

    >>> from flax import nnx
    >>> import jaxweights as jw
    >>> model = transformed(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), jw.ClipWeights(0.0))
    >>> print(type(fold(model)).__name__, fold(model).kernel[...].sum())
    Linear 0.0
    """
    if not hasattr(module, STATE):
        raise ValueError(f"module is a {type(module).__name__} that is not transformed: there is nothing to fold")
    control = getattr(module, STATE)
    plain = _shadow(module, type(module).__mro__[1], control.lifted.bind(_params(module)), control.read())
    delattr(plain, STATE)
    return nnx.clone(plain)


class _Control(nnx.Module):
    """The state of the transform and whether calls move it."""

    def __init__(self, lifted: TreeTransform, state: TreeState):
        self.lifted = lifted
        self.deterministic = False
        self.learned = _variables(nnx.Param, state.learned)
        self.fixed = _variables(TransformVariable, state.fixed)

    def read(self) -> TreeState:
        return TreeState(_values(self.learned), _values(self.fixed))

    def write(self, state: TreeState) -> None:
        for path, entry in state.fixed.items():
            for name, value in entry.items():
                self.fixed[path][name][...] = value

    def set_view(self, deterministic: bool | None = None, **kwargs) -> dict:
        """Class method used by `nnx.view`.

        Args:
          deterministic: if True, calls leave the state of the weight transform as it is.
          **kwargs: returned for others.
        """
        if deterministic is not None:
            self.deterministic = deterministic
        return kwargs


def _variables(kind: type[nnx.Variable], part: dict[str, State]) -> Any:
    return nnx.data({path: {n: kind(a) for n, a in entry.items()} for path, entry in part.items()})


def _values(part: Any) -> dict[str, State]:
    return {path: {n: v[...] for n, v in entry.items()} for path, entry in part.items()}


def _copy(module: Any, variable: Callable[[tuple, nnx.Variable], nnx.Variable], cls: type[nnx.Module]) -> Any:
    """A copy of the module as a `cls`, with variable(path, old), itself not copied, in place of each variable."""
    graphdef, state = nnx.split(module)
    new = nnx.merge(graphdef, nnx.from_flat_state((p, variable(p, v)) for p, v in nnx.to_flat_state(state)))
    object.__setattr__(new, "__class__", cls)
    return new


def _params(module: nnx.Module) -> dict[str, jax.Array]:
    """{path: array} of the parameters, without those of the transform itself."""
    flat = nnx.to_flat_state(nnx.state(module, nnx.Param))
    return {"/".join(map(str, path)): v[...] for path, v in flat if STATE not in path}


def _shadow(module: Any, base: type[nnx.Module], bound: BoundTransform, state: TreeState) -> Any:
    """The module as its original class, with transformed weights; all other variables are the module's own."""
    new = bound.apply(state)

    def swap(path, variable):
        name = "/".join(map(str, path))
        return variable if new.get(name) is bound.weights.get(name) else variable.replace(new[name])

    return _copy(module, swap, base)


def _call(self: Any, base: type[nnx.Module], method: str, args: tuple, kwargs: dict) -> Any:
    """Runs a method of the original class on a shadow with transformed weights."""
    control = getattr(self, STATE)
    bound, state = control.lifted.bind(_params(self)), control.read()
    if state.fixed and not control.deterministic:
        state = bound.update(state)
        control.write(state)
    shadow = _shadow(self, base, bound, state)
    pairs = [(mine, its, dict(vars(its))) for mine, its in zip(_nodes(self), _nodes(shadow), strict=True)]
    y = getattr(base, method)(shadow, *args, **kwargs)
    # Attributes that the method set (sow, caches, counters) belong to the module.
    for mine, its, before in pairs:
        for name, value in vars(its).items():
            if name not in before or before[name] is not value:
                setattr(mine, name, value)
    return y


def _nodes(module: nnx.Module) -> list[nnx.Module]:
    return [node for _, node in nnx.iter_graph(module) if isinstance(node, nnx.Module)]


@functools.cache
def _transformed_class(base: type[nnx.Module]) -> type[nnx.Module]:
    """The subclass whose public methods run on the shadow. One per class, so that equal modules trace once."""

    def wrapped(name: str, function: Callable) -> Callable:
        @functools.wraps(function)
        def method(self, *args, **kwargs):
            return _call(self, base, name, args, kwargs)

        return method

    own = {n: f for cls in reversed(base.__mro__) if cls not in nnx.Module.__mro__ for n, f in vars(cls).items()}
    methods = {
        n: wrapped(n, f)
        for n, f in own.items()
        if inspect.isfunction(f) and (n == "__call__" or not n.startswith("_")) and n != "set_view"
    }
    # A subclass is a pytree unless it says otherwise, whatever its base is.
    options = {"pytree": getattr(base, "_pytree__is_pytree", True)}
    body = {**methods, "__module__": base.__module__}
    return types.new_class(f"Transformed{base.__name__}", (base,), options, lambda namespace: namespace.update(body))
