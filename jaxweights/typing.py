"""Types that public functions take and return, for annotations."""

from jaxweights.core.stored import FollowedStored, Stored
from jaxweights.core.transform import Number, Scalar, State
from jaxweights.levels.paths import Where
from jaxweights.levels.tree import TreeTransform
from jaxweights.models.layout import Layout
from jaxweights.models.summary import Summary, WeightSummary
from jaxweights.techniques.initialization import Initializer
from jaxweights.techniques.sparsification.distribution import Distribution
from jaxweights.techniques.sparsification.scores import Score
from jaxweights.techniques.sparsification.structure import Structure
from jaxweights.techniques.spectral import SpectralEstimate

__all__ = [
    "Distribution",
    "FollowedStored",
    "Initializer",
    "Layout",
    "Number",
    "Scalar",
    "Score",
    "SpectralEstimate",
    "State",
    "Stored",
    "Structure",
    "Summary",
    "TreeTransform",
    "WeightSummary",
    "Where",
]
