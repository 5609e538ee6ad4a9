"""Any NNX module with its weights transformed."""

from __future__ import annotations

import copyreg
import functools
import inspect
import types
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
from flax import nnx

from jaxweights.core.axes import Axes
from jaxweights.core.transform import Transform
from jaxweights.levels.nnx.state import Control, flat_params, name_of, nodes, params_of
from jaxweights.levels.paths import STATE, Where
from jaxweights.levels.tree import BoundTransform, TreeState, on_tree

M = TypeVar("M", bound=nnx.Module)
_IN_A_CALL = "_jaxweights_in_a_call"
"""The attribute of those parts of a module that a method of the whole runs."""


class StoredWeightsWarning(UserWarning):
    """A part of a transformed module is called by itself, and computes with the weights as they are stored."""


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
    shadow of the module whose selected weights are transformed. A module within it that is called by itself, as in
    `model.encoder(x)`, computes with the weights as they are stored, and warns of it: give the model a method that
    calls its encoder, or transform the encoder.

    The attribute `weight_transform` holds the state of the transform, nested as the weights are: learned entries as
    `nnx.Param`, all others as `TransformVariable`. A call updates them in training mode; `model.train()` and
    `model.eval()` switch, as for dropout. Training in evaluation mode warns with a `StaleStateWarning` where the state
    of a transform should move.

    The state belongs to the weights before the last optimizer step. `update_state` brings it up to date, before
    evaluation and whenever weights were loaded or averaged.

    Averaging: average the parameters (`nnx.state(model, nnx.Param)`), keep the state of the last step, then call
    `update_state`. Floating entries of the state may be averaged too; averaged masks, indices and steps are refused.

    Weights of a plain checkpoint load with `nnx.update`; `init_state` then makes the state that belongs to them.

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

    A training step of a model with dropout, and a checkpoint of it:

    >>> import jax, optax, orbax.checkpoint as ocp, tempfile
    >>> rngs, x = nnx.Rngs(params=0, dropout=1), jnp.ones((4, 3))
    >>> mlp = nnx.Sequential(
    ...     nnx.Linear(3, 8, rngs=rngs), nnx.relu, nnx.Dropout(0.1, rngs=rngs), nnx.Linear(8, 1, rngs=rngs)
    ... )
    >>> model = transformed(mlp, jw.SpectralNorm(), rngs=rngs)
    >>> optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)
    >>> @nnx.jit
    ... def step(model, optimizer, x, y):
    ...     grads = nnx.grad(lambda model: jnp.mean((model(x) - y) ** 2))(model)
    ...     optimizer.update(model, grads)
    >>> for _ in range(3):
    ...     step(model, optimizer, x, x[:, :1])
    >>> jw.nnx.update_state(model)
    >>> model.eval()
    >>> with tempfile.TemporaryDirectory() as folder, ocp.StandardCheckpointer() as checkpointer:
    ...     state = nnx.state(model, (nnx.Param, jw.nnx.TransformVariable))
    ...     checkpointer.save(f"{folder}/model", state)
    ...     checkpointer.wait_until_finished()
    ...     nnx.update(model, checkpointer.restore(f"{folder}/model", state))
    >>> model(x).shape
    (4, 1)
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
    bound = lifted.bind(params_of(module))
    state = bound.init(key)
    new = _copy(module, lambda _, variable: variable, _transformed_class(type(module)))
    for path, node in nnx.iter_graph(new):
        within = any(weight.startswith(f"{name_of(path)}/") for weight in bound.transforms)
        if path and within and isinstance(node, nnx.Module) and not hasattr(node, STATE):
            _set_class(node, _part_class(type(node)))
    setattr(new, STATE, Control(lifted, state, {name_of(path): path for path, _ in flat_params(module)}))
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
    return _plain(module, "fold", BoundTransform.apply)


def store(module: M) -> M:
    """`fold`, with the weights as they are kept after training: stored in few bits under `FakeQuantize` and `LSQ`.

    Split the result into `graph, state`, and run `with_stored(lambda state, x: nnx.merge(graph, state)(x))`.

    Raises:
      ValueError: `module` is not transformed, or no format has the values that `FakeQuantize` trains.

    >>> from flax import nnx
    >>> import jaxweights as jw
    >>> model = transformed(nnx.Linear(64, 8, rngs=nnx.Rngs(0)), jw.FakeQuantize("int4"))
    >>> print(nnx.to_pure_dict(nnx.state(store(model)))["kernel"])
    QuantizedArray(64×8 float32 as int4; 288 bytes)
    """
    return _plain(module, "store", BoundTransform.store)


def _plain(module: M, verb: str, weights: Callable[[BoundTransform, TreeState], Mapping[str, Any]]) -> M:
    """A copy of a transformed module, of its original class, with these weights."""
    if not hasattr(module, STATE):
        raise ValueError(f"module is a {type(module).__name__} that is not transformed: there is nothing to {verb}")
    control = getattr(module, STATE)
    bound = control.lifted.bind(params_of(module))
    plain = _shadow(module, type(module).__mro__[1], bound, weights(bound, control._read()))
    delattr(plain, STATE)
    for part in _parts(plain):
        _set_class(part, type(part).__mro__[1])
    return nnx.clone(plain)


def _copy(module: Any, variable: Callable[[tuple, nnx.Variable], nnx.Variable], cls: type[nnx.Module]) -> Any:
    """A copy of the module as a `cls`, with variable(path, old), itself not copied, in place of each variable."""
    graphdef, state = nnx.split(module)
    new = nnx.merge(graphdef, nnx.from_flat_state((p, variable(p, v)) for p, v in nnx.to_flat_state(state)))
    _set_class(new, cls)
    return new


def _set_class(module: nnx.Module, cls: type[nnx.Module]) -> None:
    object.__setattr__(module, "__class__", cls)


def _shadow(module: Any, base: type[nnx.Module], bound: BoundTransform, new: Mapping[str, Any]) -> Any:
    """The module as its original class, with new weights; all other variables are the module's own."""

    def swap(path, variable):
        name = name_of(path)
        return variable if new.get(name) is bound.weights.get(name) else variable.replace(new[name])

    return _copy(module, swap, base)


def _parts(module: nnx.Module) -> list[nnx.Module]:
    """The modules within a transformed one that have transformed weights."""
    return [node for node in nodes(module) if isinstance(type(node), _Part)]


def _call(self: Any, base: type[nnx.Module], method: str, args: tuple, kwargs: dict) -> Any:
    """Runs a method of the original class on a shadow with transformed weights."""
    control = getattr(self, STATE)
    bound, state = control.lifted.bind(params_of(self)), control._read()
    if state.fixed and control.deterministic:
        bound = bound.watched("the module is in evaluation mode. Train it in training mode, after module.train()")
    elif state.fixed:
        state = bound.update(state)
        control._write(state)
    shadow = _shadow(self, base, bound, bound.apply(state))
    for part in _parts(shadow):
        object.__setattr__(part, _IN_A_CALL, True)  # no attribute that Flax keeps books of
    pairs = [(mine, its, dict(vars(its))) for mine, its in zip(nodes(self), nodes(shadow), strict=True)]
    y = getattr(base, method)(shadow, *args, **kwargs)
    # Attributes that the method set (sow, caches, counters) belong to the module.
    for mine, its, before in pairs:
        for name, value in vars(its).items():
            if name not in before or before[name] is not value:
                setattr(mine, name, value)
    return y


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
    return _subclass(base, f"Transformed{base.__name__}", _metaclass(type(base)), methods)


@functools.cache
def _part_class(base: type[nnx.Module]) -> type[nnx.Module]:
    """The subclass of a module within a transformed one: its weights are as stored, and a call says so."""

    def call(self, *args, **kwargs):
        if not hasattr(self, _IN_A_CALL):
            warnings.warn(
                f"a {base.__name__} within a transformed module is called by itself: it computes with the weights as "
                f"they are stored. Call a method of the transformed module, or transform this one",
                StoredWeightsWarning,
                stacklevel=2,
            )
        return base.__call__(self, *args, **kwargs)  # type: ignore[operator]

    own = inspect.isfunction(getattr(base, "__call__", None))  # noqa: B004, classes are callable
    methods = {"__call__": functools.wraps(base.__call__)(call)} if own else {}
    return _subclass(base, base.__name__, _part_metaclass(type(base)), methods)


def _subclass(base: type, name: str, metaclass: type, methods: dict[str, Callable]) -> type[nnx.Module]:
    # A subclass is a pytree unless it says otherwise, whatever its base is.
    options = {"metaclass": metaclass, "pytree": getattr(base, "_pytree__is_pytree", True)}
    body = {**methods, "__module__": base.__module__}
    return types.new_class(name, (base,), options, lambda namespace: namespace.update(body))


# The types of such classes, which pickle as a call that makes them: they have no name to be found under.


@functools.cache
def _metaclass(base: type) -> type:
    metaclass = type(f"Transformed{base.__name__}", (base,), {})
    copyreg.pickle(metaclass, lambda cls: (_transformed_class, (cls.__mro__[1],)))  # type: ignore[arg-type]
    return metaclass


class _Part(type):
    """What the types of parts have in common."""


@functools.cache
def _part_metaclass(base: type) -> type:
    metaclass = type(f"Part{base.__name__}", (_Part, base), {})
    copyreg.pickle(metaclass, lambda cls: (_part_class, (cls.__mro__[1],)))  # type: ignore[arg-type]
    return metaclass
