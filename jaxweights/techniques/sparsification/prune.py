"""Pruning: a fraction of the weights set to zero, once or on a schedule."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxweights.axes import Axes
from jaxweights.checks import check_scalar, check_state, check_weight, naming
from jaxweights.techniques.sparsification import scores
from jaxweights.techniques.sparsification.distribution import Distribution
from jaxweights.techniques.sparsification.masks import keep_largest
from jaxweights.techniques.sparsification.packed import masked, pack_mask, packed_shape, unpack_mask
from jaxweights.techniques.sparsification.pattern import check_sparsity
from jaxweights.techniques.sparsification.structure import Structure
from jaxweights.transform import Scalar, Transform


@dataclasses.dataclass(frozen=True)
class Prune(Transform):
    """Sets the given fraction of weights to zero, those of smallest score when the mask is made.

    A number prunes once: the mask is made from the initial weights and kept. A schedule prunes gradually: each
    update makes the mask anew, for the fraction of its step, and what is pruned stays pruned.

    A score that names `grad` needs the gradients, `update(w, state, grad)`: a number then prunes at the first update.
    `project` has the updates of the optimizer before it in their place.

    State: `mask`, packed as by `pack_mask`, true where a weight is kept; for a score that names `key`, `seed`.

    Args:
      sparsity: fraction of zeros in [0, 1], a number or a schedule; or (n, m), to keep n of every m consecutive inputs.
      score: what is kept, one of `jaxweights.scores` or any function f(w), f(w, grad), f(w, key) of the shape of w.
      structure: what is pruned as one, as for `keep_largest`.
      distribution: `Global()` or `ErdosRenyi()`, how the zeros are shared out among the weights that a rule of
        `on_tree` selects. By default each has the given fraction.
      axes: how a weight is read as a matrix, (..., in, out) by default. Each layer of a stack has its own count.

    >>> import jax, jax.numpy as jnp
    >>> w, t = jnp.array([0.3, -2.0, 0.1, 1.0]), Prune(0.5)
    >>> print(t.apply(w, t.init(w, jax.random.key(0))))
    [ 0. -2.  0.  1.]

    References: Han et al., arXiv:1506.02626, 2015; Zhu and Gupta, To prune, or not to prune: exploring the
    efficacy of pruning for model compression, arXiv:1710.01878, 2017.
    """

    sparsity: Scalar | tuple[int, int]
    _: dataclasses.KW_ONLY
    score: scores.Score = scores.magnitude
    structure: Structure | None = None
    distribution: Distribution | None = None
    axes: Axes | tuple[tuple[str, Axes], ...] | None = None

    def __post_init__(self):
        scores.needs(self.score)
        if isinstance(self.sparsity, tuple):
            check_sparsity(self.sparsity, 0)
        else:
            check_scalar("sparsity", self.sparsity, 0, 1, schedule=True)
        if self.distribution is None:
            return
        if isinstance(self.distribution, type) or not callable(getattr(self.distribution, "masks", None)):
            raise TypeError(
                f"distribution must be Global() or ErdosRenyi(), got {self.distribution!r}: pass an instance"
            )
        if isinstance(self.sparsity, tuple):
            raise ValueError(f"sparsity={self.sparsity} is the same in all weights: give a fraction to distribute")

    @property
    def joint(self) -> bool:
        """With a distribution."""
        return self.distribution is not None

    def init(self, w: Any, key: Any) -> Any:
        """The masks for the initial weights; all true if the score needs gradients."""
        weights, keys = (w, key) if self.joint else ({"": w}, {"": key})
        states, kept = {}, {}
        for path, w in weights.items():
            with _at(path):
                w = check_weight(w)
                states[path] = super().init(w, keys[path])
                kept[path] = jnp.ones(w.shape, bool)
                if "key" in scores.needs(self.score):
                    states[path]["seed"] = jax.random.bits(keys[path], (2,), jnp.uint32)
        if "grad" not in scores.needs(self.score):
            kept = self._masks(weights, states, None, kept)
        return self._one({p: {**s, "mask": pack_mask(kept[p])} for p, s in states.items()})

    def update(self, w: Any, state: Any, grad: Any = None) -> Any:
        """The masks for the sparsity of this step, if it is scheduled or the score needs gradients."""
        gradual = callable(self.sparsity)
        if not gradual and "grad" not in scores.needs(self.score):
            return state
        weights, states = self._several(w, state)
        grads = grad if self.joint else {"": grad}
        moved, kept = {}, {}
        for path, w in weights.items():
            with _at(path):
                state = states.get(path, {})
                check_state(state, mask=packed_shape(jnp.shape(w)))
                moved[path] = super().update(w, state)
                kept[path] = unpack_mask(state["mask"], jnp.shape(w))
        masks = self._masks(weights, moved, grads, kept)
        return self._one({p: {**s, "mask": pack_mask(masks[p] & kept[p])} for p, s in moved.items()})

    def apply(self, w: Any, state: Any) -> Any:
        """`w` where the mask is true, else 0."""
        weights, states = self._several(w, state)
        new = {}
        for path, w in weights.items():
            with _at(path):
                w = check_weight(w)
                check_state(states.get(path, {}), mask=packed_shape(w.shape))
                new[path] = masked(w, states[path]["mask"])
        return self._one(new)

    def anchor(self, w: Any, state: Any) -> Any:
        """0."""
        return dict.fromkeys(w, 0.0) if self.joint else 0.0

    def with_axes(self, axes: Any) -> Prune:
        """This spec with `axes`, or with those of each path."""
        if self.axes is not None or not axes:
            return self
        return dataclasses.replace(self, axes=tuple(sorted(axes.items())) if self.joint else axes)

    def _several(self, w, state):
        return (w, state) if self.joint else ({"": w}, {"": state})

    def _one(self, results):
        return results if self.joint else results[""]

    def _schedules(self):
        return ("sparsity",) if callable(self.sparsity) else ()

    def _masks(self, weights, states, grads, kept) -> dict[str, jax.Array]:
        scored = {}
        for path, w in weights.items():
            with _at(path):
                scored[path] = self._scored(w, states[path], (grads or {}).get(path))
        sparsity = self.sparsity
        if callable(sparsity):
            sparsity = next(iter(states.values()))["sparsity"] if states else 0.0
        if self.distribution is None:
            return {
                p: keep_largest(s, sparsity, structure=self.structure, axes=self.axes, within=kept[p])  # type: ignore
                for p, s in scored.items()
            }
        axes = dict(self.axes) if isinstance(self.axes, tuple) else dict.fromkeys(weights, self.axes)
        return self.distribution.masks(scored, sparsity, structure=self.structure, axes=axes, within=kept)  # type: ignore

    def _scored(self, w, state, grad) -> jax.Array:
        name = getattr(self.score, "__name__", repr(self.score))
        more = {}
        if "grad" in scores.needs(self.score):
            if grad is None:
                raise ValueError(f"the score {name} needs the gradients: call update(w, state, grad)")
            more["grad"] = grad
        if "key" in scores.needs(self.score):
            check_state(state, seed=(2,))
            key = jax.random.wrap_key_data(state["seed"], impl="threefry2x32")
            more["key"] = jax.random.fold_in(key, state.get("step", 0))
        scored = check_weight(self.score(w, **more), f"the result of the score {name}")
        if scored.shape != w.shape:
            raise ValueError(
                f"the score {name} must have the shape {w.shape} of w, got {scored.shape}: score each weight"
            )
        return scored


def _at(path: str):
    """Names the path in errors; that of a weight alone is the level's to name."""
    return naming("Prune", path) if path else contextlib.nullcontext()
