"""The state of transforms in NNX modules: where it is kept, and bringing it up to date."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx
from flax.traverse_util import unflatten_dict

from jaxweights.core.transform import State
from jaxweights.levels.paths import STATE, entries
from jaxweights.levels.tree import TreeState, TreeTransform


class TransformVariable(nnx.Variable):
    """State that a transform keeps between steps and that is not optimized: singular vectors, masks, counts."""


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
    >>> model = jw.nnx.transformed(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), jw.SpectralNorm(n_steps=20))
    >>> model.kernel[...] = jnp.float32([[3.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
    >>> update_state(model)
    >>> print(jw.spectral_norm(jw.nnx.fold(model).kernel[...]).round(4))
    1.0
    """
    for node, control in _controls(module, "update_state"):
        control._write(control.lifted.bind(params_of(node)).update(control._read()))


def init_state(module: nnx.Module, *, rngs: nnx.Rngs) -> None:
    """Makes the state of every transform in a module anew, in place, for the weights that the module has now.

    Weights that were loaded into a wrapped model need this: the scale of `WeightNorm`, masks and singular vectors that
    `transformed` made belong to the random weights. A plain checkpoint loads into a wrapped model, whose parameters
    have the same names, in two lines:

        nnx.update(model, restored)
        jw.nnx.init_state(model, rngs=nnx.Rngs(0))

    Args:
      module: what `transformed` returned, or a module that contains such modules.
      rngs: the source of the keys (stream "params"), one for each transformed module.

    Raises:
      TypeError: `module` is not an NNX module, or `rngs` not an `nnx.Rngs`.
      ValueError: it contains no transformed module, or one that was made under `nnx.vmap`.

    >>> from flax import nnx
    >>> import jax.numpy as jnp
    >>> import jaxweights as jw
    >>> plain = nnx.Linear(3, 2, rngs=nnx.Rngs(1))
    >>> model = jw.nnx.transformed(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), jw.WeightNorm())
    >>> nnx.update(model, nnx.state(plain))
    >>> init_state(model, rngs=nnx.Rngs(0))
    >>> bool(jnp.allclose(model(jnp.ones((1, 3))), plain(jnp.ones((1, 3)))))
    True
    """
    if not isinstance(rngs, nnx.Rngs):
        raise TypeError(f"rngs must be an nnx.Rngs, got {type(rngs).__name__}: write nnx.Rngs(0)")
    for node, control in _controls(module, "init_state"):
        control._replace(control.lifted.init(params_of(node), rngs.params()))


def _controls(module: nnx.Module, verb: str) -> list[tuple[nnx.Module, Control]]:
    """The transformed modules in a module, and the control of each."""
    if not isinstance(module, nnx.Module):
        raise TypeError(f"module must be an nnx.Module, got {module!r}: Linen has linen.{verb}")
    controls = [(node, getattr(node, STATE)) for node in nodes(module) if hasattr(node, STATE)]
    if not controls:
        raise ValueError(f"module is a {type(module).__name__} without a transformed module in it: nothing to update")
    return controls


class Control(nnx.Module):
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

    def _replace(self, state: TreeState) -> None:
        for part, new in (self.learned, state.learned), (self.fixed, state.fixed):
            for path, entry in entries(part).items():
                for name, variable in entry.items():
                    value = new[path][name]
                    if value.shape != variable.shape:
                        raise ValueError(
                            f"the state at {path!r} has {name!r} of shape {variable.shape}, made anew it has "
                            f"{value.shape}: make it as the module was made, under nnx.vmap"
                        )
                    variable[...] = value

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


def flat_params(module: nnx.Module) -> list[tuple[tuple, Any]]:
    """The parameters and their paths, without those of the transform itself."""
    return [(path, v) for path, v in nnx.to_flat_state(nnx.state(module, nnx.Param)) if STATE not in path]


def params_of(module: nnx.Module) -> dict[str, jax.Array]:
    """The parameters by path, without those of the transform itself."""
    return {name_of(path): v[...] for path, v in flat_params(module)}


def name_of(path: tuple) -> str:
    """The path of a variable as one string."""
    return "/".join(map(str, path))


def nodes(module: nnx.Module) -> list[nnx.Module]:
    """A module and all modules in it."""
    return [node for _, node in nnx.iter_graph(module) if isinstance(node, nnx.Module)]
