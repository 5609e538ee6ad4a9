"""The optax level: projections after the update, and decay as a term of it."""

from jaxweights.lifts.optax.project import project
from jaxweights.lifts.optax.weight_decay import add_weight_decay

__all__ = ["add_weight_decay", "project"]
