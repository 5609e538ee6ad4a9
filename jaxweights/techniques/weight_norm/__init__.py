"""Weight normalization, centring and weight standardization: reparameterizations per output unit."""

from jaxweights.techniques.weight_norm.centering import Center, center
from jaxweights.techniques.weight_norm.normalization import WeightNorm, weight_normalize
from jaxweights.techniques.weight_norm.standardization import WeightStandardization, weight_standardize

__all__ = ["Center", "WeightNorm", "WeightStandardization", "center", "weight_normalize", "weight_standardize"]
