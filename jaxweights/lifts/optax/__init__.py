"""The optax level: projections after the update, decay as a term of it, and learning rates by weight."""

from jaxweights.lifts.optax.mup import scale_by_mup
from jaxweights.lifts.optax.project import project
from jaxweights.lifts.optax.weight_decay import add_weight_decay

__all__ = ["add_weight_decay", "project", "scale_by_mup"]
