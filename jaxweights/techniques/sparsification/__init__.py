"""Sparsification: weights set to zero, by a threshold, by rank, or by what a layer is fed."""

from jaxweights.techniques.sparsification.magnitude import Prune, Sparsify, magnitude_mask, sparsify
from jaxweights.techniques.sparsification.repair import repair
from jaxweights.techniques.sparsification.sparsegpt import sparsegpt
from jaxweights.techniques.sparsification.wanda import wanda_mask

__all__ = ["Prune", "Sparsify", "magnitude_mask", "repair", "sparsegpt", "sparsify", "wanda_mask"]
