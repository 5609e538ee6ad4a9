"""Pruning: a fraction of the weights set to zero, once or on a schedule."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jaxweights.core.axes import Axes
from jaxweights.core.checks import check_scalar, check_state, check_weight
from jaxweights.core.transform import Scalar, State, Transform
from jaxweights.numerics.batching import apply_if
from jaxweights.numerics.straight_through import straight_through
from jaxweights.techniques.sparsification import scores
from jaxweights.techniques.sparsification.distribution import Distribution
from jaxweights.techniques.sparsification.masks import check_tiling, keep_largest
from jaxweights.techniques.sparsification.packed import masked, pack_mask, packed_shape, unpack_mask
from jaxweights.techniques.sparsification.pattern import check_sparsity
from jaxweights.techniques.sparsification.structure import Structure


@dataclasses.dataclass(frozen=True)
class Prune(Transform):
    """Sets the given fraction of weights to zero, those of smallest score when the mask is made.

    A number prunes once: the mask is made from the initial weights and kept. A schedule prunes gradually: whenever its
    value changes, the mask is made anew, and what is pruned stays pruned. Where the value falls all weights compete
    again, as those of AC/DC do: dense and sparse phases are a schedule that goes to and from 0.

    A score of gradients is computed by `update(w, state, grad)`: a number then prunes at the first. `confine` passes
    gradients, `project` the updates of the optimizer before it.

    A lottery ticket is the weights of an early step with the mask of the trained ones: `apply(early, state)`.

    State: `mask`, packed by `pack_mask`, true where a weight is kept; of a random score the `seed`.

    Args:
      sparsity: fraction of zeros in [0, 1], a number or a schedule; or (n, m), to keep n of every m consecutive inputs.
      score: what is kept, one of `jaxweights.scores` or any function f(w), f(w, grad), f(w, key) of the shape of w.
      structure: what is pruned as one, as for `keep_largest`.
      distribution: `Global()` or `ErdosRenyi()`, how the zeros are shared out among the weights that a rule of
        `on_tree` selects. By default each has the given fraction.
      axes: how a weight is read as a matrix, (..., in, out) by default. Each layer of a stack has its own count.
      straight_through: whether the gradient passes to all weights as if none was pruned. They then go on moving, and
        each update makes the mask from them.

    >>> import jax, jax.numpy as jnp
    >>> w, t = jnp.array([0.3, -2.0, 0.1, 1.0]), Prune(0.5)
    >>> state = t.init(w, jax.random.key(0))
    >>> print(t.apply(w, state))
    [ 0. -2.  0.  1.]
    >>> print(t.apply(jnp.array([0.1, 0.2, 0.3, 0.4]), state))  # rewound
    [0.  0.2 0.  0.4]

    References: Han et al., arXiv:1506.02626, 2015; Zhu and Gupta, To prune, or not to prune: exploring the
    efficacy of pruning for model compression, arXiv:1710.01878, 2017; Frankle and Carbin, The Lottery Ticket
    Hypothesis, arXiv:1803.03635, 2018; Frankle, Dziugaite, Roy and Carbin, Linear Mode Connectivity and the Lottery
    Ticket Hypothesis, arXiv:1912.05671, 2019; Peste, Iofinova, Vladu and Alistarh, AC/DC: Alternating
    Compressed/DeCompressed Training of Deep Neural Networks, arXiv:2106.12379, 2021; Bengio, Léonard and Courville,
    arXiv:1308.3432, 2013 (straight-through).
    """

    sparsity: Scalar | tuple[int, int]
    _: dataclasses.KW_ONLY
    score: scores.Score = scores.magnitude
    structure: Structure | None = None
    distribution: Distribution | None = None
    axes: Axes | None = None
    straight_through: bool = False

    def __post_init__(self):
        scores.needs(self.score)
        check_tiling(self.structure)
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
    def joint(self):
        """With a distribution."""
        return self.distribution is not None

    def init(self, w, key):
        """The mask for the initial weights; all true if the score needs gradients."""
        return self.init_all({"": w}, {"": key}, {})[""]

    def update(self, w, state, grad=None):
        """The mask for the sparsity of this step, where that has changed."""
        return self.update_all({"": w}, {"": state}, {"": grad}, {})[""]

    def init_all(self, ws, keys, axes):
        """The masks for the initial weights, by path."""
        states = self.each(ws, axes, lambda t, path: t._start(ws[path], keys[path]))
        if not states or "grad" in scores.needs(self.score):
            return states
        masks = self._masks(ws, states, dict.fromkeys(ws), axes, kept=None)
        return {p: {**s, "mask": pack_mask(masks[p])} for p, s in states.items()}

    def update_all(self, ws, states, grads, axes):
        """The masks for the sparsity of this step, by path."""
        moved = self.each(ws, axes, lambda t, path: t._moved(ws[path], states[path]))
        if not self.moves or not ws:
            return moved
        before, after = (next(iter(s.values())) for s in (states, moved))
        old, new = (s.get("sparsity", 0.0) for s in (before, after))

        def remake(packed):
            kept = None
            if not self.straight_through:
                kept = {p: unpack_mask(packed[p], w.shape) | (new < old) for p, w in ws.items()}
            return {p: pack_mask(m) for p, m in self._masks(ws, moved, grads, axes, kept).items()}

        packed = {p: s["mask"] for p, s in states.items()}
        if self.straight_through:
            packed = remake(packed)
        else:
            packed = apply_if((before["step"] == 0) | (old != new), remake, packed)
        return {p: {**s, "mask": packed[p]} for p, s in moved.items()}

    def apply(self, w, state):
        """`w` where the mask is true, else 0."""
        w = check_weight(w)
        check_state(state, mask=packed_shape(w.shape))
        new = masked(w, state["mask"])
        return straight_through(w, new) if self.straight_through else new

    @property
    def moves(self) -> bool:
        """Whether updates do anything."""
        return callable(self.sparsity) or self.straight_through or "grad" in scores.needs(self.score)

    def _schedules(self):
        return ("sparsity",) if callable(self.sparsity) else ()

    def _start(self, w, key) -> State:
        """The state before the first mask, which keeps all."""
        state = super().init(check_weight(w), key)
        if self.moves:
            state["step"] = jnp.zeros((), jnp.int32)
        if "key" in scores.needs(self.score):
            state["seed"] = jax.random.bits(key, (2,), jnp.uint32)
        return {**state, "mask": pack_mask(jnp.ones_like(w, bool))}

    def _moved(self, w, state: State) -> State:
        """The state of the next step, with the same mask."""
        if not self.moves:
            return state
        check_state(state, mask=packed_shape(jnp.shape(w)), step=())
        return {**super().update(w, state), "step": state["step"] + 1}

    def _masks(self, ws, states, grads, axes, kept: Mapping[str, jax.Array] | None) -> dict[str, jax.Array]:
        score = lambda t, path: scores.evaluate(t.score, ws[path], states[path], grads[path])
        scored = self.each(ws, axes, score)
        axes = {p: self.axes or axes.get(p) for p in ws}
        sparsity = self.value("sparsity", next(iter(states.values())))
        if self.distribution is not None:
            return self.distribution.masks(scored, sparsity, structure=self.structure, axes=axes, within=kept)
        inside = lambda path: None if kept is None else kept[path]
        keep = lambda t, path: keep_largest(
            scored[path], sparsity, structure=t.structure, axes=t.axes, within=inside(path)
        )
        return self.each(ws, axes, keep)
