"""The optax level: projections after the update, masks around it, decay as a term of it, learning rates by weight."""

from jaxweights.lifts.optax.confine import confine
from jaxweights.lifts.optax.mup import scale_by_mup
from jaxweights.lifts.optax.project import project
from jaxweights.lifts.optax.weight_decay import add_weight_decay

__all__ = ["add_weight_decay", "confine", "project", "scale_by_mup"]
