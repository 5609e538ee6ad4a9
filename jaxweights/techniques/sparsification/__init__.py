"""Sparsification: weights set to zero, by a threshold or by rank."""

from jaxweights.techniques.sparsification.magnitude import Prune, Sparsify, magnitude_mask, sparsify

__all__ = ["Prune", "Sparsify", "magnitude_mask", "sparsify"]
