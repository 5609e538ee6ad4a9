"""Spectral normalization by a streaming estimate of the spectral norm, which every training step improves."""

from __future__ import annotations

import dataclasses
import functools
import math
import string
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from jaxweights.core.axes import Axes, Reading
from jaxweights.core.checks import check_integer, check_scalar, check_weight
from jaxweights.core.transform import Number, Scalar, State, Transform
from jaxweights.numerics.dtypes import accumulation_dtype
from jaxweights.numerics.sharding import auto_sharded
from jaxweights.techniques.spectral import iteration
from jaxweights.techniques.spectral.exact import spectral_normalize
from jaxweights.techniques.spectral.iteration import Operator, search_in


@dataclasses.dataclass(frozen=True)
class SpectralNorm(Transform):
    """Spectral normalization: w' = w·c/σ̂, where each update improves the estimate σ̂ = ‖Wv‖/‖v‖ <= σ.

    An update takes `n_steps` LOBPCG steps towards the leading singular vector v. Each multiplies four vectors by W and
    one by Wᵀ. An update takes more steps, up to 16, while a step still raises σ̂ by over 0.005%, for example after a
    large optimizer step has brought up a new direction. The gradient flows through σ̂ with v held fixed; once v has
    converged, this is the gradient of σ. A zero weight stays zero, and the search continues when it becomes nonzero.
    `spectral_estimate` returns σ̂ and a bound on its error.

    The target c may be a schedule. If `soft`, only matrices with σ̂ > c change; the others are kept bit for bit.

    State: `v`, shape (*batch, [groups], ...), and `basis`, (*batch, [groups], 4, ...), float32 or wider, where ... are
    the input or the output axes of the weight, whichever have fewer entries. Both start from random vectors. Neither
    need be of unit length: means of the states of several steps, as in an average of a whole model, are a state too.
    Call `update` on the averaged weights before evaluation, and σ̂ is as accurate as in training.

    >>> import jax, jax.numpy as jnp
    >>> w, t = jnp.diag(jnp.array([1.0, 4.0])), SpectralNorm()
    >>> print(t.apply(w, t.init(w, jax.random.key(0))).round(4))
    [[0.25 0.  ]
     [0.   1.  ]]

    References: Miyato et al., arXiv:1802.05957, 2018; Knyazev, SIAM J. Sci. Comput. 23, 2001.
    """

    n_steps: int = 1
    axes: Axes | None = None
    target: Scalar = 1.0
    soft: bool = False
    scheduled: ClassVar[frozenset[str]] = frozenset({"target"})
    takes_axes: ClassVar[bool] = True
    transposable: ClassVar[bool] = True

    def __post_init__(self):
        check_integer("n_steps", self.n_steps, 1)
        check_scalar("target", self.target, 0, schedule=True)

    def init(self, w, key):
        """Starts the search from random vectors and takes a few steps."""
        w = check_weight(w)
        return super().init(w, key) | iteration.init_search(w, key, _operator, self.axes)

    def update(self, w, state, grad=None):
        """Takes `n_steps` steps of the search, and more while the estimate grows."""
        w = check_weight(w)
        search = search_in(state, _operator(w, self.axes))
        return super().update(w, state, grad) | iteration.update_search(w, search, _operator, self.axes, self.n_steps)

    def apply(self, w, state):
        """w·c/σ̂."""
        w = check_weight(w)
        v = search_in(state, _operator(w, self.axes))["v"]
        return normalized(w, v, self.value("target", state), _operator, self.axes, axes=self.axes, soft=self.soft)


class SpectralEstimate(NamedTuple):
    """σ̂ = ‖Wv‖/‖v‖ and a bound on its distance from a singular value of W, both of shape (*batch, [groups])."""

    sigma: jax.Array
    error: jax.Array


def spectral_estimate(w: jax.Array, state: State, *, axes: Axes | None = None) -> SpectralEstimate:
    """The estimate of the spectral norm in a state of `SpectralNorm`, with an error bound.

    The bound is the residual ‖Wᵀu − σ̂v‖/√2 with u = Wv/σ̂ for the unit v: some singular value is at most that far from
    σ̂ = ‖Wv‖. It need not be the largest, but the largest is never below σ̂. The error of a σ̂ near σ is much smaller,
    about residual²/gap, where gap is the distance to the next singular value.

    Args:
      w: float array of any shape.
      state: the state of `SpectralNorm` for this weight.
      axes: how `w` is read as a matrix: the axes of the transform.

    Returns:
      `SpectralEstimate(sigma, error)`, float32 or wider, each of shape (*batch, [groups]).

    Raises:
      TypeError: `w` is not a float array, or `state` is not a dict.
      ValueError: `axes` does not fit `w`, or `state` belongs to another weight.

    >>> import jax, jax.numpy as jnp
    >>> import jaxweights as jw
    >>> params, lifted = {"a": jnp.diag(jnp.array([1.0, 4.0])), "b": jnp.eye(3)}, jw.on_tree(SpectralNorm())
    >>> state = lifted.init(params, jax.random.key(0))
    >>> for path, t in lifted.selected(params).items():  # of every weight of a tree, with its axes
    ...     sigma, error = spectral_estimate(params[path], state.fixed[path], axes=t.axes)
    ...     print(path, sigma.round(3), error < 1e-3)
    a 4.0 True
    b 1.0 True

    References: Parlett, The Symmetric Eigenvalue Problem, SIAM 1998, chapter 4.
    """
    w = check_weight(w)

    def run(w, v):
        operator = _operator(w, axes)
        return SpectralEstimate(iteration.sigma(operator, v), iteration.error_bound(operator, v))

    return auto_sharded(run, w, search_in(state, _operator(w, axes))["v"])


@functools.partial(jax.jit, static_argnames=("read", "spec", "axes", "soft"))
def normalized(
    w: jax.Array,
    v: jax.Array,
    target: Number,
    read: Callable[[jax.Array, Any], Operator],
    spec: Any,
    *,
    axes: Axes | None = None,
    soft: bool,
) -> jax.Array:
    """w·c/σ̂ for the σ̂ that v gives: one program where no other is being compiled."""
    sigma = auto_sharded(lambda w, v: iteration.sigma(read(w, spec), v), w, v)
    return spectral_normalize(w, sigma, axes=axes, target=target, soft=soft)


def _operator(w: jax.Array, axes: Axes | None) -> Operator:
    """The matrix that `axes` reads from `w`, or its transpose, whichever has x on the smaller side.

    The weight is not reshaped, so its sharding stays unchanged.
    """
    view, r = Reading.of(axes, w.shape).split_groups(w.astype(accumulation_dtype(w.dtype)))

    def size(which):
        return math.prod(view.shape[a] for a in which)

    large, small = sorted((r.contracted, r.output), key=size, reverse=True)
    names, block = string.ascii_letters[: view.ndim], string.ascii_letters[view.ndim]
    batch, x, y = ("".join(names[a] for a in which) for which in (r.batch, small, large))
    # CPUs multiply the rows of a matrix by a few vectors several times faster if the images come out as columns.
    rows = bool(x) and names[-1] == x[-1]
    image = f"{y}{block}" if rows else f"{block}{y}"

    def product(spec):
        return lambda xs: jnp.einsum(spec, view, xs, precision="highest")

    return Operator(
        product(f"{names},{batch}{block}{x}->{batch}{image}"),
        tuple(view.shape[a] for a in r.batch + small),
        len(r.batch),
        view.dtype,
        transpose=product(f"{names},{batch}{block}{y}->{batch}{block}{x}"),
        images_last=rows,
    )
