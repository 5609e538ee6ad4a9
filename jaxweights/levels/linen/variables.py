"""What is done with the variables of a transformed Linen module: fold or store them, update or make the state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from jaxweights.levels.linen.transformed import Transformed, bind, stored_state
from jaxweights.levels.paths import STATE
from jaxweights.levels.tree import BoundTransform


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
    bound = _bind(model, variables, "fold")
    return _plain(variables, bound.tree.replaced(bound.apply(stored_state(bound, variables))))


def store(model: Transformed, variables: Mapping[str, Any]) -> dict[str, Any]:
    """`fold`, with the weights as they are kept after training: stored in few bits under `FakeQuantize` and `LSQ`.

    `with_stored(model.module.apply)(store(model, variables), ...)` equals `model.apply(variables, ...)` up to rounding.

    Args:
      model: a `Transformed` module.
      variables: all its collections. For one inside a larger model, its part of them.

    Returns:
      The collections without the state of the transform.

    Raises:
      TypeError: `model` is not a `Transformed`.
      ValueError: the state is missing, or no format has the values that `FakeQuantize` trains.

    >>> import flax.linen as nn, jax, jax.numpy as jnp
    >>> import jaxweights as jw
    >>> model = jw.linen.Transformed(nn.Dense(8), jw.FakeQuantize("int4"))
    >>> variables = model.init(jax.random.key(0), jnp.ones((1, 64)))
    >>> print(store(model, variables)["params"]["kernel"])
    QuantizedArray(64×8 float32 as int4; 288 bytes)
    """
    bound = _bind(model, variables, "store")
    return _plain(variables, bound.tree.replaced(bound.store(stored_state(bound, variables))))


def update_state(model: Transformed, variables: Mapping[str, Any]) -> dict[str, Any]:
    """The variables with the state of the transform updated for the current weights.

    A training step updates the state, then the optimizer moves the weights: until the next step, the state belongs to
    the old weights, and spectral normalization, say, leaves σ slightly above 1. Call this before evaluation, and after
    loading or averaging weights. Learned entries stay. The update counts as a step of schedules, so go on training from
    the variables that were given.

    Args:
      model: a `Transformed` module.
      variables: all its collections. For one inside a larger model, its part of them. Of a whole model,
        `model.apply(variables, x, mutable=["weight_transform"])[1]` updates the state for any input `x`.

    Returns:
      All collections, with the same structure.

    Raises:
      TypeError: `model` is not a `Transformed`.
      ValueError: the state is missing.

    >>> import flax.linen as nn, jax, jax.numpy as jnp
    >>> import jaxweights as jw
    >>> model = jw.linen.Transformed(nn.Dense(2), jw.SpectralNorm(n_steps=20))
    >>> variables = model.init(jax.random.key(0), jnp.ones((1, 3)))
    >>> variables["params"]["kernel"] = jnp.array([[3.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
    >>> kernel = fold(model, update_state(model, variables))["params"]["kernel"]
    >>> print(jw.spectral_norm(kernel).round(4))
    1.0
    """
    bound = _bind(model, variables, "update")
    state = bound.update(stored_state(bound, variables))
    new = dict(variables)
    if state.fixed:
        new[STATE] = _merged(variables[STATE], unflatten_dict(state.fixed, sep="/"))
    return new


def init_state(model: nn.Module, variables: Mapping[str, Any], key: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """The variables with the state of every transform made anew for the weights that are given, as `init` makes it.

    Weights that were loaded into a wrapped model need this: the scale of `WeightNorm`, masks and singular vectors that
    `init` made belong to the random weights. A plain checkpoint loads into a wrapped model, whose parameters have the
    same names, in one line:

        variables = jw.linen.init_state(model, {"params": restored}, key)

    Args:
      model: a `Transformed` module, or a module that contains some.
      variables: {"params": those of the plain module} and its other collections, or those of the wrapped module, whose
        state is replaced.
      key: a `jax.random` key, or keys by name, as for `model.init`. The same key makes the state that `init` makes.
      *args: the arguments of a call, arrays or `jax.ShapeDtypeStruct`: only a call tells which modules a module
        contains. A `Transformed` without others in it needs none. Nothing but the state is computed.
      **kwargs: keyword arguments of the call, and `method`, the name of another method to call.

    Returns:
      All collections that were given, with the state of the transforms.

    Raises:
      TypeError: `model` is not a Linen module, or `variables` have no "params".
      ValueError: the call reaches no `Transformed`, or not all whose state is given; or a parameter is missing.

    >>> import flax.linen as nn, jax, jax.numpy as jnp
    >>> import jaxweights as jw
    >>> plain, x = nn.Dense(2), jnp.ones((1, 3))
    >>> checkpoint = plain.init(jax.random.key(0), x)
    >>> model = jw.linen.Transformed(plain, jw.WeightNorm())
    >>> variables = init_state(model, checkpoint, jax.random.key(1))
    >>> bool(jnp.allclose(model.apply(variables, x), plain.apply(checkpoint, x)))
    True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a linen.Module, got {model!r}: NNX has nnx.init_state")
    if not isinstance(variables, Mapping) or "params" not in variables:
        raise TypeError('variables must be the collections of the module, "params" among them: pass {"params": params}')
    alone = isinstance(model, Transformed) and not args and not kwargs
    if not (alone or args or kwargs):
        raise ValueError(f"init_state finds what a {type(model).__name__} wraps by a call: pass its arguments")
    method = kwargs.pop("method", "__call__")
    old = _state(variables)
    given = {name: _without_state(collection) for name, collection in variables.items() if name != STATE}
    reached = set()

    def note(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        reached.add(type(context.module))
        return call(*args, **kwargs)

    def make(module: Any, given: Mapping[str, Any]) -> None:
        for collection, tree in given.items():
            for name, value in tree.items():
                module.put_variable(collection, name, value)
        if alone:
            module._make_state()
        else:
            values, named = jax.tree.map(_array, (args, kwargs))
            getattr(module, method)(*values, **named)

    @jax.jit  # of which only the state is left
    def run(key: Any, given: Mapping[str, Any]) -> dict[str, Any]:
        with nn.intercept_methods(note):
            made = nn.init(make, model)(key, given)
        if missing := flatten_dict(_without_state(made["params"])).keys() - flatten_dict(given["params"]).keys():
            raise ValueError(
                f"the variables lack the parameters {sorted('/'.join(path) for path in missing)}: pass all parameters "
                f"of the module, under the names that init gives them"
            )
        return _state(made)

    new = run(key, given)
    if not any(issubclass(cls, Transformed) for cls in reached):
        raise ValueError(
            f"the call of {type(model).__name__} reaches no Transformed: wrap a module, or pass the arguments of a "
            f"call that reaches the wrapped one"
        )
    if missed := _weights_of(old) - _weights_of(new):
        raise ValueError(
            f"init_state reaches no Transformed that keeps the state of {sorted(missed)}: pass the arguments of a call "
            f"that reaches it, or variables without this state"
        )
    filled = {**given, "params": _merged(given["params"], new["params"])}
    return filled | {STATE: new[STATE]} if new[STATE] else filled


def _plain(variables: Mapping[str, Any], params: Any) -> dict[str, Any]:
    """The collections of the plain module with these parameters."""
    return {name: value for name, value in variables.items() if name != STATE} | {"params": params}


def _bind(model: Any, variables: Mapping[str, Any], verb: str) -> BoundTransform:
    """The transform of a wrapper on its weights."""
    if not isinstance(model, Transformed):
        raise TypeError(
            f"model must be a linen.Transformed, got {type(model).__name__}: there is nothing to {verb}. For a "
            f"Transformed inside it, pass that and its part of the variables"
        )
    return bind(model, variables)


def _state(variables: Mapping[str, Any]) -> dict[str, Any]:
    """The state of all transforms: what is learned, among the parameters, and all else."""
    learned = {path: leaf for path, leaf in flatten_dict(variables["params"]).items() if STATE in path}
    return {"params": unflatten_dict(learned), STATE: variables.get(STATE, {})}


def _weights_of(state: Mapping[str, Any]) -> set[str]:
    """The paths of the weights that a state is of."""
    paths = [path for part in state.values() for path in flatten_dict(part)]
    return {"/".join(name for name in path[:-1] if name != STATE) for path in paths}


def _without_state(tree: Any) -> Any:
    """Nested dicts without the learned state of transforms, copied."""
    if not isinstance(tree, Mapping):
        return tree
    return {name: _without_state(value) for name, value in tree.items() if name != STATE}


def _array(leaf: Any) -> Any:
    """An argument of a call; zeros in place of a shape."""
    return jnp.zeros(leaf.shape, leaf.dtype) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf


def _merged(old: Any, new: Any) -> Any:
    """Nested dicts with new leaves, among others."""
    if not isinstance(new, Mapping):
        return new
    return {**old, **{name: _merged(old.get(name, {}), value) for name, value in new.items()}}
