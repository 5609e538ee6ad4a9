"""Recipes: which weights are pruned, quantized and clustered, and how; in TOML or in Python.

`jaxweights compress` applies one to a file, and on a tree in memory it is `jaxweights.one_shot(params,
recipe.methods(params))`.
"""

from jaxweights.models.recipe import Recipe, Rule

__all__ = ["Recipe", "Rule"]
