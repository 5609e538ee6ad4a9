"""Spectral normalization by an estimate of the spectral norm that each step of training improves."""

from __future__ import annotations

import dataclasses
import functools
import math
import string

import jax
import jax.numpy as jnp

from jaxweights.axes import Axes, Reading
from jaxweights.checks import check_integer, check_state, check_weight
from jaxweights.numerics import automatic, wide
from jaxweights.techniques.spectral_norm import iteration
from jaxweights.techniques.spectral_norm.exact import spectral_normalize
from jaxweights.techniques.spectral_norm.iteration import Operator
from jaxweights.transform import Transform

_INITIAL_STEPS = 5


@dataclasses.dataclass(frozen=True)
class SpectralNorm(Transform):
    """Spectral normalization.

    >>> import jax, jax.numpy as jnp
    >>> w, t = jnp.diag(jnp.array([1.0, 4.0])), SpectralNorm()
    >>> print(t.apply(w, t.init(w, jax.random.key(0))).round(4))
    [[0.25 0.  ]
     [0.   1.  ]]

    References: Miyato et al., arXiv:1802.05957, 2018.
    """

    n_steps: int = 1
    axes: Axes | None = None

    def __post_init__(self):
        check_integer("n_steps", self.n_steps, 1)

    def init(self, w, key):
        """A search from random vectors, brought close by a few steps."""
        w = check_weight(w)
        return _started(w, key, self.axes)

    def update(self, w, state, grad=None):
        """`n_steps` steps of the search."""
        w = check_weight(w)
        check_state(state, **_operator(w, self.axes).search_shapes())
        return _moved(w, state, self.axes, self.n_steps)

    def apply(self, w, state):
        """w / ‖Wv‖."""
        w = check_weight(w)
        check_state(state, **_operator(w, self.axes).search_shapes())
        sigma = automatic(lambda w, v: iteration.sigma(_operator(w, self.axes), v), w, state["v"])
        return spectral_normalize(w, sigma, axes=self.axes)


@functools.partial(jax.jit, static_argnames="axes")
def _started(w, key, axes):
    return _moved(w, automatic(lambda w: iteration.start(_operator(w, axes), key), w), axes, _INITIAL_STEPS)


@functools.partial(jax.jit, static_argnames=("axes", "n_steps"))
def _moved(w, search, axes, n_steps):
    def run(w, search):
        operator = _operator(w, axes)
        return jax.lax.fori_loop(0, n_steps, lambda _, s: iteration.step(operator, s), search)

    return automatic(run, w, search)


def _operator(w: jax.Array, axes: Axes | None) -> Operator:
    """The matrix that `axes` reads from `w`, or its transpose, so that x is on the smaller side.

    There is no reshape, so that shardings stay as they are.
    """
    view, r = Reading.of(axes, w.shape).split_groups(w.astype(wide(w.dtype)))
    size = lambda which: math.prod(view.shape[a] for a in which)
    large, small = sorted((r.contracted, r.output), key=size, reverse=True)
    names = string.ascii_letters[: view.ndim]
    pick = lambda which: "".join(names[a] for a in r.batch + which)
    spec = f"{names},{pick(small)}->{pick(large)}"
    return Operator(
        lambda x: jnp.einsum(spec, view, x, precision="highest"),
        tuple(view.shape[a] for a in r.batch + small),
        len(r.batch),
        view.dtype,
    )
