"""An NNX model as a function of its parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from flax import nnx


class SplitModel(NamedTuple):
    """A model in parts.

    Attributes:
      run: the call as a function (params, rest, *args, **kwargs). The model stays as it is.
      merge: a new model of params and the rest.
      params: the state of all `nnx.Param`.
      rest: the other state.
    """

    run: Callable[..., Any]
    merge: Callable[[Any, Any], Any]
    params: nnx.State
    rest: nnx.State


def split(name: str, model: Any, call: Callable[..., Any] | None) -> SplitModel:
    """Splits a model for the tool of this name; `call` is what to run, by default the model's own call."""
    if not isinstance(model, nnx.Module):
        raise TypeError(f"model must be an nnx.Module, got {model!r}: Linen has linen.{name}, others jaxweights.{name}")
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def merge(params: Any, rest: Any) -> Any:
        return nnx.merge(graph, params, rest, copy=True)

    def run(params: Any, rest: Any, *args: Any, **kwargs: Any) -> Any:
        merged = merge(params, rest)
        return merged(*args, **kwargs) if call is None else call(merged, *args, **kwargs)

    return SplitModel(run, merge, params, rest)
