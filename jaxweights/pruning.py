"""What `Prune` and `Regrow` are made of: structures, distributions over weights, schedules, and masks by score."""

from jaxweights.techniques.sparsification.distribution import ErdosRenyi, Global
from jaxweights.techniques.sparsification.masks import drop_and_grow, keep_largest
from jaxweights.techniques.sparsification.schedules import AlternatingSparsity, PolynomialSparsity
from jaxweights.techniques.sparsification.structure import Blocks, InputUnits, OutputUnits

__all__ = [
    "AlternatingSparsity",
    "Blocks",
    "ErdosRenyi",
    "Global",
    "InputUnits",
    "OutputUnits",
    "PolynomialSparsity",
    "drop_and_grow",
    "keep_largest",
]
