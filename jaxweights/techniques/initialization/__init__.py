"""Weight initializers: constants, distributions, variance scaling by fans, matrices, scaling by depth and width.

An initializer is a function `(key, shape, dtype=float32, *, ...) -> array`. It serves as a `kernel_init=` of Flax and
as a rule of `reinitialize`, as it is or with options set by `functools.partial(orthogonal, gain=2.0)`. Initializers
whose values depend on which axes are inputs and outputs take `axes`.
"""

from jaxweights.techniques.initialization.constants import constant, ones, zeros
from jaxweights.techniques.initialization.distributions import normal, truncated_normal, uniform
from jaxweights.techniques.initialization.fixup import fixup
from jaxweights.techniques.initialization.gain import gain
from jaxweights.techniques.initialization.identity import dirac, identity
from jaxweights.techniques.initialization.mup import MupScales, mup
from jaxweights.techniques.initialization.orthogonal import delta_orthogonal, orthogonal
from jaxweights.techniques.initialization.sparse import sparse
from jaxweights.techniques.initialization.variance_scaling import (
    Initializer,
    he_normal,
    he_uniform,
    lecun_normal,
    lecun_uniform,
    variance_scaling,
    xavier_normal,
    xavier_uniform,
)

__all__ = [
    "Initializer",
    "MupScales",
    "constant",
    "delta_orthogonal",
    "dirac",
    "fixup",
    "gain",
    "he_normal",
    "he_uniform",
    "identity",
    "lecun_normal",
    "lecun_uniform",
    "mup",
    "normal",
    "ones",
    "orthogonal",
    "sparse",
    "truncated_normal",
    "uniform",
    "variance_scaling",
    "xavier_normal",
    "xavier_uniform",
    "zeros",
]
