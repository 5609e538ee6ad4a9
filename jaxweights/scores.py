"""Scores of weights: pruning keeps the weights whose score is largest.

A score is a function of the weight, and of `grad` or `key` where it names them: `f(w)`, `f(w, grad)`, `f(w, key)`.
"""

from jaxweights.techniques.sparsification.scores import gradient, magnitude, random, saliency

__all__ = ["gradient", "magnitude", "random", "saliency"]
