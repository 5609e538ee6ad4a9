"""Pictures of weights and masks, with matplotlib."""

from jaxweights.models.plots import plot_density, plot_mask

__all__ = [
    "plot_density",
    "plot_mask",
]
