"""Any NNX module with its weights transformed."""

from __future__ import annotations

import copyreg
import functools
import inspect
import types
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
from flax import nnx
from flax.traverse_util import unflatten_dict

from jaxweights.core.axes import Axes
from jaxweights.core.transform import State, Transform
from jaxweights.levels.paths import STATE, Where, entries
from jaxweights.levels.tree import BoundTransform, TreeState, TreeTransform, on_tree

M = TypeVar("M", bound=nnx.Module)


class TransformVariable(nnx.Variable):
    """State that a transform keeps between steps and that is not optimized: singular vectors, masks, counts."""


def transformed(
    module: M,
    transform: Transform | Mapping[str, Transform],
    where: Where | None = None,
    *,
    layout: Mapping[str, Axes] | None = None,
    rngs: nnx.Rngs | None = None,
) -> M:
    """An NNX module that computes with transformed weights and stores the plain ones.

    The result is an instance of a subclass of the module's class and shares the module's variables. Attributes,
    parameter names and `isinstance` stay as they are, and no stored parameter is overwritten. Its methods run on a
    shadow of the module whose selected weights are transformed. Its attribute `weight_transform` holds the state of the
    transform, nested as the weights are: learned entries as `nnx.Param`, all others as `TransformVariable`. A call
    updates them in training mode; `model.train()` and `model.eval()` switch, as for dropout.

    The state belongs to the weights before the last optimizer step. `update_state` brings it up to date, before
    evaluation and whenever weights were loaded or averaged.

    Averaging: average the parameters (`nnx.state(model, nnx.Param)`), keep the state of the last step, then call
    `update_state`. Floating entries of the state may be averaged too; averaged masks, indices and steps are refused.

    The result pickles if its module does, as do its graph definition and its state.

    Args:
      module: any NNX module.
      transform: a transform, or rules {glob: transform} on the paths within the module.
      where: the weights to transform, as for `on_tree`.
      layout: how a program reads the weights, as for `on_tree`: `jaxweights.nnx.layout(module, x)`.
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
    lifted = on_tree(transform, where, layout=layout)
    key = rngs.params() if rngs is not None else jax.random.key(0)
    state = lifted.init(_params(module), key)
    new = _copy(module, lambda _, variable: variable, _transformed_class(type(module)))
    setattr(new, STATE, _Control(lifted, state, {_name(path): path for path, _ in _flat_params(module)}))
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
    plain = _shadow(module, type(module).__mro__[1], control.lifted.bind(_params(module)), control._read())
    delattr(plain, STATE)
    return nnx.clone(plain)


def update_state(module: nnx.Module) -> None:
    """Updates the state of every transform in a module for the current weights, in place, in training and evaluation.

    A training step updates the state, then the optimizer moves the weights: until the next step, the state belongs to
    the old weights, and spectral normalization, say, leaves σ slightly above 1. Call this before evaluation, and after
    loading or averaging weights. Learned entries stay. The update counts as a step of schedules: to go on training,
    evaluate a copy, `nnx.clone(module)`.

    Args:
      module: what `transformed` returned, or a module that contains such modules.

    Raises:
      TypeError: `module` is not an NNX module.
      ValueError: it contains no transformed module.

    >>> from flax import nnx
    >>> import jax.numpy as jnp
    >>> import jaxweights as jw
    >>> model = transformed(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), jw.SpectralNorm(n_steps=20))
    >>> model.kernel[...] = jnp.float32([[3.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
    >>> update_state(model)
    >>> print(jw.spectral_norm(fold(model).kernel[...]).round(4))
    1.0
    """
    if not isinstance(module, nnx.Module):
        raise TypeError(f"module must be an nnx.Module, got {module!r}: Linen has linen.update_state")
    controls = [(node, getattr(node, STATE)) for node in _nodes(module) if hasattr(node, STATE)]
    if not controls:
        raise ValueError(f"module is a {type(module).__name__} without a transformed module in it: nothing to update")
    for node, control in controls:
        control._write(control.lifted.bind(_params(node)).update(control._read()))


class _Control(nnx.Module):
    """The state of the transform and whether calls move it."""

    # Methods are private, because `nnx.tabulate` prints the arguments of all public ones.

    def __init__(self, lifted: TreeTransform, state: TreeState, nested: Mapping[str, tuple]):
        self.lifted = lifted
        self.deterministic = False
        self.learned = _variables(nnx.Param, state.learned, nested)
        self.fixed = _variables(TransformVariable, state.fixed, nested)

    def _read(self) -> TreeState:
        return TreeState(_values(self.learned), _values(self.fixed))

    def _write(self, state: TreeState) -> None:
        for path, entry in entries(self.fixed).items():
            for name, variable in entry.items():
                variable[...] = state.fixed[path][name]

    def set_view(self, deterministic: bool | None = None, **kwargs) -> dict:
        """Class method used by `nnx.view`.

        Args:
          deterministic: if True, calls leave the state of the weight transform as it is.
          **kwargs: returned for others.
        """
        if deterministic is not None:
            self.deterministic = deterministic
        return kwargs


def _variables(kind: type[nnx.Variable], part: dict[str, State], nested: Mapping[str, tuple]) -> Any:
    return nnx.data(unflatten_dict({(*nested[p], n): kind(a) for p, entry in part.items() for n, a in entry.items()}))


def _values(part: Any) -> dict[str, State]:
    return {path: {n: v[...] for n, v in entry.items()} for path, entry in entries(part).items()}


def _copy(module: Any, variable: Callable[[tuple, nnx.Variable], nnx.Variable], cls: type[nnx.Module]) -> Any:
    """A copy of the module as a `cls`, with variable(path, old), itself not copied, in place of each variable."""
    graphdef, state = nnx.split(module)
    new = nnx.merge(graphdef, nnx.from_flat_state((p, variable(p, v)) for p, v in nnx.to_flat_state(state)))
    object.__setattr__(new, "__class__", cls)
    return new


def _flat_params(module: nnx.Module) -> list[tuple[tuple, Any]]:
    """The parameters and their paths, without those of the transform itself."""
    return [(path, v) for path, v in nnx.to_flat_state(nnx.state(module, nnx.Param)) if STATE not in path]


def _params(module: nnx.Module) -> dict[str, jax.Array]:
    return {_name(path): v[...] for path, v in _flat_params(module)}


def _name(path: tuple) -> str:
    return "/".join(map(str, path))


def _shadow(module: Any, base: type[nnx.Module], bound: BoundTransform, state: TreeState) -> Any:
    """The module as its original class, with transformed weights; all other variables are the module's own."""
    new = bound.apply(state)

    def swap(path, variable):
        name = _name(path)
        return variable if new.get(name) is bound.weights.get(name) else variable.replace(new[name])

    return _copy(module, swap, base)


def _call(self: Any, base: type[nnx.Module], method: str, args: tuple, kwargs: dict) -> Any:
    """Runs a method of the original class on a shadow with transformed weights."""
    control = getattr(self, STATE)
    bound, state = control.lifted.bind(_params(self)), control._read()
    if state.fixed and not control.deterministic:
        state = bound.update(state)
        control._write(state)
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
    options = {"metaclass": _metaclass(type(base)), "pytree": getattr(base, "_pytree__is_pytree", True)}
    body = {**methods, "__module__": base.__module__}
    return types.new_class(f"Transformed{base.__name__}", (base,), options, lambda namespace: namespace.update(body))


@functools.cache
def _metaclass(base: type) -> type:
    """The type of transformed classes, which pickle as a call that makes them: they have no name to be found under."""
    metaclass = type(f"Transformed{base.__name__}", (base,), {})
    copyreg.pickle(metaclass, lambda cls: (_transformed_class, (cls.__mro__[1],)))  # type: ignore[arg-type]
    return metaclass
