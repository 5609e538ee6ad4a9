"""Sparsification: weights set to zero by a threshold, by the rank of a score, or with statistics of the inputs."""

from jaxweights.techniques.sparsification import scores
from jaxweights.techniques.sparsification.distribution import ErdosRenyi, Global
from jaxweights.techniques.sparsification.keep_zeros import KeepZeros
from jaxweights.techniques.sparsification.masks import drop_and_grow, keep_largest, magnitude_mask
from jaxweights.techniques.sparsification.one_shot.reconstruction import reconstruct
from jaxweights.techniques.sparsification.one_shot.sparsegpt import sparsegpt
from jaxweights.techniques.sparsification.one_shot.wanda import wanda_mask
from jaxweights.techniques.sparsification.packed import pack_mask, unpack_mask
from jaxweights.techniques.sparsification.prune import Prune
from jaxweights.techniques.sparsification.regrow import Regrow
from jaxweights.techniques.sparsification.schedules import AlternatingSparsity, PolynomialSparsity
from jaxweights.techniques.sparsification.structure import Blocks, InputUnits, OutputUnits
from jaxweights.techniques.sparsification.threshold import Sparsify, sparsify

__all__ = [
    "AlternatingSparsity",
    "Blocks",
    "ErdosRenyi",
    "Global",
    "InputUnits",
    "KeepZeros",
    "OutputUnits",
    "PolynomialSparsity",
    "Prune",
    "Regrow",
    "Sparsify",
    "drop_and_grow",
    "keep_largest",
    "magnitude_mask",
    "pack_mask",
    "reconstruct",
    "scores",
    "sparsegpt",
    "sparsify",
    "unpack_mask",
    "wanda_mask",
]
