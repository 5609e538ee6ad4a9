"""Any Linen module with its weights transformed."""

from __future__ import annotations

import types
from collections.abc import Callable, Container, Mapping
from typing import Any

import flax.linen as nn
import jax
from flax.traverse_util import unflatten_dict

from jaxweights.core.axes import Axes
from jaxweights.core.transform import Transform
from jaxweights.levels.paths import STATE, Where, entries
from jaxweights.levels.tree import BoundTransform, TreeState, on_tree


class Transformed(nn.Module):
    """A Linen module that computes with transformed weights and stores the plain ones.

    The parameters keep their names and are never overwritten. The state of the transform is stored beside them, nested
    as they are: learned entries in the collection "params" under the name "weight_transform", all others in the
    collection "weight_transform". `apply` updates that collection if it is mutable: `model.apply(variables, x)`
    evaluates, `model.apply(variables, x, mutable=["weight_transform"])` is a training step. Training without it, which
    leaves the state of the first step, warns with a `StaleStateWarning`.

    The wrapper has all public methods of the module (`method="encode"`). `init` creates the variables that the module
    creates without it; only a key that a module draws from "params" after making parameters of its own is another.

    The stored state belongs to the weights before the last optimizer step. `update_state` brings it up to date, before
    evaluation and whenever weights were averaged. `init_state` makes it anew, for weights that a plain model was saved
    with: `variables = jw.linen.init_state(model, {"params": restored}, key)`.

    Averaging: average the parameters, keep the state of the last step, then call `update_state`. Floating
    entries of the state may be averaged too; averaged masks, indices and steps are refused.

    Attributes:
      module: any Linen module. It may use `nn.scan`, `nn.remat`, dropout, batch norm and `sow`.
      transform: a transform, or rules {glob: transform} on the paths within the module.
      where: the weights to transform, as in `on_tree`.
      layout: how a program reads the weights, as in `on_tree`: `jaxweights.linen.layout(module, variables, x)`.

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

    A training step of a model with dropout, and a checkpoint of it:

    >>> import optax, orbax.checkpoint as ocp, tempfile
    >>> class Mlp(nn.Module):
    ...     @nn.compact
    ...     def __call__(self, x, train=False):
    ...         return nn.Dense(1)(nn.Dropout(0.1, deterministic=not train)(nn.relu(nn.Dense(8)(x))))
    >>> model, tx = jw.linen.Transformed(Mlp(), jw.SpectralNorm()), optax.adam(1e-3)
    >>> key, x = jax.random.key(0), jnp.ones((4, 3))
    >>> variables = model.init(key, x)
    >>> params, state = variables["params"], {"weight_transform": variables["weight_transform"]}
    >>> @jax.jit
    ... def step(params, state, opt_state, key, x, y):
    ...     def loss(params):
    ...         options = {"train": True, "rngs": {"dropout": key}, "mutable": list(state)}
    ...         prediction, moved = model.apply({"params": params, **state}, x, **options)
    ...         return jnp.mean((prediction - y) ** 2), moved
    ...     grads, state = jax.grad(loss, has_aux=True)(params)
    ...     updates, opt_state = tx.update(grads, opt_state, params)
    ...     return optax.apply_updates(params, updates), state, opt_state
    >>> opt_state = tx.init(params)
    >>> for i in range(3):
    ...     params, state, opt_state = step(params, state, opt_state, jax.random.fold_in(key, i), x, x[:, :1])
    >>> with tempfile.TemporaryDirectory() as folder, ocp.StandardCheckpointer() as checkpointer:
    ...     checkpointer.save(f"{folder}/model", {"params": params, **state})
    ...     checkpointer.wait_until_finished()
    ...     variables = checkpointer.restore(f"{folder}/model", {"params": params, **state})
    >>> model.apply(jw.linen.update_state(model, variables), x).shape  # evaluation
    (4, 1)
    """

    module: nn.Module
    transform: Transform | Mapping[str, Transform]
    where: Where | None = None
    layout: Mapping[str, Axes] | None = None

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

        inner: set[str] = set()
        if self.is_initializing():
            inner = self._make_parameters(call)
        bound = bind(self, self.variables)
        state = self._make_state(inner) if self.is_initializing() else stored_state(bound, self.variables)
        used = bound
        if state.fixed and not self.is_initializing():
            if self.is_mutable_collection(STATE):
                state = bound.update(state)
                self._put(STATE, state.fixed)
            else:
                used = bound.watched(
                    f'its collection "{STATE}" is not mutable. In a training step call '
                    f'apply(..., mutable=["{STATE}"]) and keep what it returns'
                )

        # Leaves are matched by identity: `swap` runs once per scope, and a submodule that is shared with another module
        # has its own scope.
        new = {id(bound.weights[p]): w for p, w in used.apply(state).items() if w is not used.weights[p]}
        swapped: set[int] = set()

        def swap(leaf):
            swapped.add(id(leaf))
            return new.get(id(leaf), leaf)

        y = nn.map_variables(call, "params", trans_in_fn=lambda scope: jax.tree.map(swap, scope))(self.module)
        if missed := new.keys() - swapped:
            paths = [path for path, w in bound.weights.items() if id(w) in missed]
            raise ValueError(f"Transformed did not reach the weights {paths}: wrap the module that owns them")
        return y

    def _make_parameters(self, call: Callable[[nn.Module], Any]) -> set[str]:
        """Creates the parameters in a call that leaves no other trace: no caches, counters or draws of random keys.

        Returns the paths of the weights whose state wrappers further in keep.
        """
        inner: set[str] = set()

        def draw(module):
            module.scope.rng_counters = _copy(module.scope.rng_counters)
            before = _paths(module)
            call(module)
            inner.update(_paths(module) - before)

        others = nn.DenyList("params")
        nn.map_variables(draw, others, trans_out_fn=lambda _: {}, mutable=True)(self.module)
        return inner

    def _make_state(self, inner: Container[str] = ()) -> TreeState:
        """The state at initialization: what an earlier call made, and the rest from the key of the parameters."""
        bound = bind(self, self.variables)
        # A scope of its own, so that the module draws the keys that it draws without the wrapper.
        made = bound.init(self.scope.push(STATE, reuse=True).make_rng("params"))  # type: ignore[union-attr]
        for path in made.fixed:
            if path in inner:
                raise ValueError(
                    f"Transformed selects {path!r}, whose state a Transformed further in keeps: exclude it with where, "
                    f"or compose the transforms there, Transformed(module, Chain(inner, outer))"
                )
        stored = stored_state(bound, self.variables)
        state = TreeState(made.learned | stored.learned, made.fixed | stored.fixed)
        if state.learned.keys() - stored.learned.keys():  # within another wrapper, the first of two calls has made them
            self.put_variable("params", STATE, unflatten_dict(state.learned, sep="/"))
        self._put(STATE, state.fixed)
        return state

    def _put(self, collection: str, state: Mapping[str, Any]) -> None:
        """Stores entries by path beside those of wrappers further in."""
        for name, value in unflatten_dict(state, sep="/").items():
            self.put_variable(collection, name, value)


def bind(model: Transformed, variables: Mapping[str, Any]) -> BoundTransform:
    """The transform of a wrapper on its weights."""
    return on_tree(model.transform, model.where, layout=model.layout).bind(own_params(variables))


def own_params(variables: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of the module itself."""
    return {name: value for name, value in variables.get("params", {}).items() if name != STATE}


def stored_state(bound: BoundTransform, variables: Mapping[str, Any]) -> TreeState:
    """The stored state of a wrapper, without that of wrappers further in."""

    def own(collection):
        if flat := [name for name in collection if "/" in name]:
            raise ValueError(
                f"the state has the key {flat[0]!r}, as on_tree and earlier versions store it: nest it, as the "
                f'parameters are, with flax.traverse_util: unflatten_dict(flatten_dict(state, sep="/"), sep="/")'
            )
        return {path: entry for path, entry in entries(collection).items() if path in bound.weights}

    return TreeState(own(variables.get("params", {}).get(STATE, {})), own(variables.get(STATE, {})))


def _paths(module: nn.Module) -> set[str]:
    """The paths of the weights whose state wrappers in a bound module keep."""
    return set(entries(module.variables.get(STATE, {})))


def _copy(counters: dict) -> dict:
    return {key: _copy(value) if isinstance(value, dict) else value for key, value in counters.items()}
