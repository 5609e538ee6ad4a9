"""Weight initialization: constants, distributions, scales by the fans of a layer, matrices, scales by depth and width.

An initializer is a function `(key, shape, dtype=float32, *, ...) -> array`, so it is a `kernel_init=` of Flax and a
rule of `reinitialize` as it stands, and with its options set by `functools.partial(orthogonal, gain=2.0)`. Those whose
values depend on which axes are input and output take `axes`.
"""

from jaxweights.techniques.initialization import (
    Initializer,
    MupScales,
    constant,
    delta_orthogonal,
    dirac,
    fixup,
    gain,
    he_normal,
    he_uniform,
    identity,
    lecun_normal,
    lecun_uniform,
    mup,
    normal,
    ones,
    orthogonal,
    sparse,
    truncated_normal,
    uniform,
    variance_scaling,
    xavier_normal,
    xavier_uniform,
    zeros,
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
