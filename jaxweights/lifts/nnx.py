"""The NNX level: any module with its weights transformed, and the two norms as modules."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from jaxweights.checks import check_shape
from jaxweights.lifts.paths import STATE, Where
from jaxweights.lifts.tree import TreeState, TreeTransform, on_tree
from jaxweights.techniques.batch_norm import batch_norm, batch_stats, running_stats
from jaxweights.techniques.layer_norm import layer_norm
from jaxweights.transform import Transform

__all__ = ["BatchNorm", "LayerNorm", "TransformVariable", "fold", "transformed"]

M = TypeVar("M", bound=nnx.Module)


class TransformVariable(nnx.Variable):
    """What a transform keeps between steps and no optimizer touches: singular vectors, masks, counts."""


def transformed(
    module: M,
    transform: Transform | Mapping[str, Transform],
    where: Where | None = None,
    *,
    rngs: nnx.Rngs | None = None,
) -> M:
    """An NNX module that computes with transformed weights and stores the plain ones.

    The result is an instance of a subclass of the module's class that shares the module's variables: attributes,
    parameter names and `isinstance` stay as they are, and no stored parameter is overwritten. Its methods run
    on a shadow of the module whose selected weights are transformed. The state of the transform is in its
    attribute `weight_transform`: what is learned as `nnx.Param`, the rest as `TransformVariable`, which a call
    updates in training mode: `model.eval()` and `model.train()` decide, as for dropout.

    Args:
      module: any NNX module.
      transform: a transform, or rules {glob: transform} on the paths within the module.
      where: the weights to transform, as for `on_tree`.
      rngs: where the state draws its key (stream "params"); without it, from key 0.

    Returns:
      The transformed module.

    Raises:
      TypeError: `module` is no NNX module.
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
    plain = _shadow(module, type(module).__mro__[1])
    delattr(plain, STATE)
    return nnx.clone(plain)


class _Control(nnx.Module):
    """The state of the transform and whether calls move it."""

    def __init__(self, lifted: TreeTransform, state: TreeState):
        self.lifted = lifted
        self.deterministic = False
        tree = lambda kind, part: nnx.data(
            {path: {n: kind(a) for n, a in entry.items()} for path, entry in part.items()}
        )
        self.learned = tree(nnx.Param, state.learned)
        self.fixed = tree(TransformVariable, state.fixed)

    def read(self) -> TreeState:
        values = lambda part: {path: {n: v[...] for n, v in entry.items()} for path, entry in part.items()}
        return TreeState(values(self.learned), values(self.fixed))

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


def _copy(module: Any, variable: Callable[[tuple, nnx.Variable], nnx.Variable], cls: type[nnx.Module]) -> Any:
    """A copy of the module as a `cls`, with variable(path, old) in place of each variable: not copies of them."""
    graphdef, state = nnx.split(module)
    new = nnx.merge(graphdef, nnx.from_flat_state((p, variable(p, v)) for p, v in nnx.to_flat_state(state)))
    object.__setattr__(new, "__class__", cls)
    return new


def _params(module: nnx.Module) -> dict[str, jax.Array]:
    """{path: array} of the parameters, without those of the transform itself."""
    flat = nnx.to_flat_state(nnx.state(module, nnx.Param))
    return {"/".join(map(str, path)): v[...] for path, v in flat if STATE not in path}


def _shadow(module: Any, base: type[nnx.Module]) -> Any:
    """The module as its original class, with transformed weights; all other variables are the module's own."""
    control = getattr(module, STATE)
    params = _params(module)
    new = control.lifted.apply(params, control.read())

    def swap(path, variable):
        name = "/".join(map(str, path))
        return variable if new.get(name) is params.get(name) else variable.replace(new[name])

    return _copy(module, swap, base)


def _call(self: Any, base: type[nnx.Module], method: str, args: tuple, kwargs: dict) -> Any:
    """Runs a method of the original class on a shadow with transformed weights."""
    control = getattr(self, STATE)
    state = control.read()
    if state.fixed and not control.deterministic:
        control.write(control.lifted.update(_params(self), state))
    shadow = _shadow(self, base)
    pairs = [(mine, its, dict(vars(its))) for mine, its in zip(_nodes(self), _nodes(shadow), strict=True)]
    y = getattr(base, method)(shadow, *args, **kwargs)
    # What the method stored in attributes (sow, caches, counters) belongs to the module.
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


class BatchNorm(nnx.Module):
    """Batch normalization with running statistics. Parameters and statistics are named as Flax's.

    running ← momentum·running + (1 − momentum)·batch, variance biased. A batch in which nothing counts leaves
    the running statistics as they are. `train()` and `eval()` switch between batch and running statistics.

    Args:
      num_features: size of the last axis.
      use_running_average: evaluate with the running statistics; here, by `train`/`eval`, or in the call.
      momentum: what is kept of the running statistics per step.
      epsilon: ε under the root.
      use_bias: whether to add a learned bias.
      use_scale: whether to multiply by a learned scale.
      axis_name: name(s) of mapped axes to take the statistics over, by count.
      rngs: taken for the likeness to Flax's modules; nothing is drawn.

    >>> from flax import nnx
    >>> import jax.numpy as jnp
    >>> print(BatchNorm(1, epsilon=0.0)(jnp.array([[1.0], [3.0]])))
    [[-1.]
     [ 1.]]
    """

    def __init__(
        self,
        num_features: int,
        *,
        use_running_average: bool = False,
        momentum: float = 0.99,
        epsilon: float = 1e-5,
        use_bias: bool = True,
        use_scale: bool = True,
        axis_name: Any = None,
        rngs: nnx.Rngs | None = None,
    ):
        del rngs
        shape = check_shape("num_features", (num_features,))
        self.mean = nnx.BatchStat(jnp.zeros(shape))
        self.var = nnx.BatchStat(jnp.ones(shape))
        self.scale = nnx.Param(jnp.ones(shape)) if use_scale else nnx.data(None)
        self.bias = nnx.Param(jnp.zeros(shape)) if use_bias else nnx.data(None)
        self.use_running_average = use_running_average
        self.momentum, self.epsilon, self.axis_name = momentum, epsilon, axis_name

    def __call__(self, x: jax.Array, use_running_average: bool | None = None, *, mask=None) -> jax.Array:
        """Normalises `x`, shape (..., features); only entries where `mask` is true count."""
        evaluate = self.use_running_average if use_running_average is None else use_running_average
        mean, var = self.mean[...], self.var[...]
        if not evaluate:
            mean, var, count = batch_stats(x, where=mask, axis_name=self.axis_name)
            new = running_stats((self.mean[...], self.var[...]), (mean, var, count), self.momentum)
            self.mean[...], self.var[...] = new
        return batch_norm(x, _value(self.scale), _value(self.bias), mean=mean, var=var, eps=self.epsilon)

    def set_view(self, use_running_average: bool | None = None, **kwargs) -> dict:
        """Class method used by `nnx.view`.

        Args:
          use_running_average: if True, the stored statistics are used.
          **kwargs: returned for others.
        """
        if use_running_average is not None:
            self.use_running_average = use_running_average
        return kwargs


class LayerNorm(nnx.Module):
    """Layer normalization. Parameters are named as Flax's.

    Args:
      num_features: size of the normalised axis, or sizes of the axes.
      epsilon: ε under the root.
      use_bias: whether to add a learned bias.
      use_scale: whether to multiply by a learned scale.
      reduction_axes: axis or axes to normalise over.
      rngs: taken for the likeness to Flax's modules; nothing is drawn.

    >>> from flax import nnx
    >>> import jax.numpy as jnp
    >>> print(LayerNorm(2, epsilon=0.0)(jnp.array([1.0, 3.0])))
    [-1.  1.]
    """

    def __init__(
        self,
        num_features: int | Sequence[int],
        *,
        epsilon: float = 1e-6,
        use_bias: bool = True,
        use_scale: bool = True,
        reduction_axes: int | Sequence[int] = -1,
        rngs: nnx.Rngs | None = None,
    ):
        del rngs
        shape = check_shape("num_features", num_features if isinstance(num_features, Sequence) else (num_features,))
        self.scale = nnx.Param(jnp.ones(shape)) if use_scale else nnx.data(None)
        self.bias = nnx.Param(jnp.zeros(shape)) if use_bias else nnx.data(None)
        self.epsilon = epsilon
        self.reduction_axes = reduction_axes if isinstance(reduction_axes, int) else tuple(reduction_axes)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises `x` within each sample."""
        return layer_norm(x, _value(self.scale), _value(self.bias), axis=self.reduction_axes, eps=self.epsilon)


def _value(variable: nnx.Variable | None) -> jax.Array | None:
    return None if variable is None else variable[...]
