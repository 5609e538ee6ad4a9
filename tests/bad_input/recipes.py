"""Recipes. What is wrong in TOML is in tests/command/test_recipe.py."""

from bad_input.vocabulary import T, V, W

import jaxweights as jw
from jaxweights.recipes import Recipe, Rule

PARAMS = {"kernel": W}


def compressed(*rules):
    return jw.one_shot(PARAMS, Recipe(rules).methods(PARAMS))


CASES = [
    ("rule for nothing", lambda: Rule("*"), V, "give prune, bits, format, cluster or keep"),
    ("rule without globs", lambda: Rule((), bits=4), T, "write '*'"),
    ("rule 9 bits", lambda: Rule("*", bits=9), V, "from 2 to 8, got 9"),
    ("rule two ways", lambda: Rule("*", bits=4, cluster=16), V, "give one of them"),
    ("rule a list", lambda: Rule("*", prune=[2, 4]), T, "write 0.5 or '2:4'"),
    ("rule clusters and zeros", lambda: Rule("*", prune=0.5, cluster=256), V, "from 1 to 255"),
    ("recipe a rule", lambda: jw.recipes.Recipe(Rule("*", bits=4)), T, "write (Rule('*', bits=4),)"),
    ("recipe without rules", lambda: Recipe(()), T, "one at least"),
    ("recipe matches nothing", lambda: compressed(Rule("head*", bits=4)), V, "The names are: kernel"),
    ("recipe with input", lambda: compressed(Rule("*", bits=4, input=-1)), V, "give one_shot a layout"),
    ("recipe 3:5 of 4", lambda: compressed(Rule("*", prune=(3, 5))), V, "needs a multiple of 5 inputs"),
]
