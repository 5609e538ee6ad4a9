"""What every tool asks of a Linen model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn


def check_model(name: str, model: Any, variables: Any, *collections: str) -> None:
    """Raises unless `model` is a module and `variables` are its collections, with "params" and these among them."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a linen.Module, got {model!r}: NNX has nnx.{name}, others jaxweights.{name}")
    needed = ("params", *collections)
    if not isinstance(variables, Mapping) or not set(needed) <= variables.keys():
        listing = " and ".join(f'"{collection}"' for collection in needed)
        raise TypeError(
            f"variables must be the collections of the module, {listing} among them: pass what init returned"
        )


def call(module: Any, *batch: Any) -> Any:
    """The module's own call."""
    return module(*batch)
