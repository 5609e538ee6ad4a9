"""Spectral normalization by an estimate of the spectral norm that each step of training improves."""

from __future__ import annotations

import dataclasses
import math
import string

import jax
import jax.numpy as jnp

from jaxweights.axes import Axes, Reading
from jaxweights.checks import check_integer, check_state, check_weight
from jaxweights.numerics import automatic, safe_divide, safe_norm, wide
from jaxweights.techniques.spectral_norm.exact import spectral_normalize
from jaxweights.transform import Transform

_INITIAL_STEPS = 15


@dataclasses.dataclass(frozen=True)
class SpectralNorm(Transform):
    """Spectral normalization by power iteration: w' = w / σ̂, σ̂ = uᵀWv.

    Each update makes `n_steps` steps v ← Wᵀu/‖Wᵀu‖, u ← Wv/‖Wv‖; the gradient flows through σ̂ with u and v
    held fixed, which is the gradient of σ at a fixed point. A zero weight stays zero and u, v are kept, so the
    iteration goes on when the weight becomes non-zero.

    State: `u`, shape (*batch, *rows), and `v`, shape (*batch, *columns) with the groups first, float32 or
    wider: they start after 15 steps from a random vector.

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
        """Random singular vectors, brought close by a few steps."""
        product = _Product.of(check_weight(w), self.axes)
        u = jax.random.normal(key, product.row_shape, product.dtype)
        v = jax.random.normal(jax.random.fold_in(key, 1), product.column_shape, product.dtype)
        return self._iterate(w, {"u": product.unit(u), "v": product.unit(v)}, _INITIAL_STEPS)

    def update(self, w, state, grad=None):
        """`n_steps` steps of power iteration."""
        return self._iterate(check_weight(w), state, self.n_steps)

    def apply(self, w, state):
        """w / uᵀWv."""
        product = _Product.of(check_weight(w), self.axes)
        check_state(state, u=product.row_shape, v=product.column_shape)
        sigma = automatic(lambda w, u, v: _Product.of(w, self.axes).sigma(u, v), w, state["u"], state["v"])
        return spectral_normalize(w, sigma, axes=self.axes)

    def _iterate(self, w, state, n_steps: int):
        product = _Product.of(w, self.axes)
        check_state(state, u=product.row_shape, v=product.column_shape)

        def run(w, state):
            product = _Product.of(w, self.axes)
            return jax.lax.fori_loop(0, n_steps, lambda _, s: product.step(s), state)

        return automatic(run, w, state)


@dataclasses.dataclass(frozen=True)
class _Product:
    """Products of a weight with row and column vectors of length 1: no larger than σ, so they overflow only if σ does.

    There is no reshape, so that shardings stay as they are.
    """

    w: jax.Array
    letters: tuple[str, str, str]  # of w, of a row vector, of a column vector
    row_shape: tuple[int, ...]
    column_shape: tuple[int, ...]
    n_batch: int

    @classmethod
    def of(cls, w: jax.Array, axes: Axes | None) -> _Product:
        view, r = Reading.of(axes, w.shape).split_groups(w.astype(wide(w.dtype)))
        names = string.ascii_letters[: view.ndim]
        pick = lambda which: "".join(names[a] for a in which)
        shape = lambda which: tuple(view.shape[a] for a in which)
        return cls(
            view,
            (names, pick(r.batch + r.contracted), pick(r.batch + r.output)),
            shape(r.batch + r.contracted),
            shape(r.batch + r.output),
            len(r.batch),
        )

    @property
    def dtype(self):
        return self.w.dtype

    def unit(self, x: jax.Array, fallback: jax.Array | None = None) -> jax.Array:
        """x / ‖x‖; where x is zero, the fallback (or the first basis vector)."""
        axis = tuple(range(self.n_batch, x.ndim))
        norm = safe_norm(x, axis, keepdims=True)
        if fallback is None:
            fallback = jnp.full(x.shape, 1 / math.sqrt(max(1, math.prod(x.shape[self.n_batch :]))), x.dtype)
        return jnp.where(norm == 0, fallback, safe_divide(x, norm))

    def contract(self, *operands: tuple[str, jax.Array], out: str) -> jax.Array:
        spec = ",".join(s for s, _ in operands) + "->" + out
        return jnp.einsum(spec, *(a for _, a in operands), precision="highest")

    def step(self, state):
        full, rows, columns = self.letters
        v = self.unit(self.contract((full, self.w), (rows, state["u"]), out=columns), state["v"])
        u = self.unit(self.contract((full, self.w), (columns, v), out=rows), state["u"])
        return {"u": u, "v": v}

    def sigma(self, u, v) -> jax.Array:
        full, rows, columns = self.letters
        wv = self.contract((full, self.w), (columns, v), out=rows)
        return self.contract((rows, wv), (rows, u), out=rows[: self.n_batch])
