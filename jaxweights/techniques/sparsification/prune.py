"""Pruning: a fraction of the weights set to zero, once or on a schedule."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxweights.core.axes import Axes
from jaxweights.core.checks import check_state, check_weight
from jaxweights.core.joint import JointTransform, for_each, in_batches
from jaxweights.core.transform import Scalar, State
from jaxweights.numerics.batching import apply_if
from jaxweights.numerics.straight_through import straight_through
from jaxweights.techniques.sparsification import scores
from jaxweights.techniques.sparsification.distribution import Distribution
from jaxweights.techniques.sparsification.masks import keep_largest
from jaxweights.techniques.sparsification.packed import masked, pack_mask, packed_shape, unpack_mask
from jaxweights.techniques.sparsification.pattern import check_sparsity
from jaxweights.techniques.sparsification.structure import Structure, check_tiling

STEP = jax.ShapeDtypeStruct((), jnp.int32)
"""The entry `step` of a state."""


@dataclasses.dataclass(frozen=True)
class Prune(JointTransform):
    """Sets the given fraction of weights to zero: those whose score is smallest when the mask is made.

    A number prunes once: the mask is made from the initial weights and kept. A schedule prunes gradually: a new mask is
    made whenever its value changes, and pruned weights stay pruned. When the value falls, all weights compete again, as
    in AC/DC, whose dense and sparse phases are a schedule that alternates with 0.

    A score of gradients needs `update(w, state, grad)`; with a number, the first update prunes. In optax, `confine`
    passes the gradients, and `project` those of `tx.update(updates, state, params, grad=grads)`.

    A lottery ticket is the weights of an early step under the mask of the trained ones: `apply(early, state)`.

    State: `mask`, packed by `pack_mask`, true where a weight is kept; the `seed` of a random score.

    Args:
      sparsity: fraction of zeros in [0, 1], a number or a schedule; or (n, m), to keep n of every m consecutive inputs.
        It is never a count: 1 prunes all, and k of n units are k / n.
      score: keeps the largest: one of `jaxweights.scores`, or any function f(w), f(w, grad) or f(w, key) that returns
        an array of the shape of w.
      structure: what is pruned as a unit, as in `keep_largest`.
      distribution: `Global()` or `ErdosRenyi()`: how the zeros are distributed over the weights that a rule of
        `on_tree` selects. By default every weight has the given fraction.
      axes: how a weight is read as a matrix, (..., in, out) by default. Each layer of a stack has its own count.
      straight_through: whether gradients pass to all weights as if none were pruned. Pruned weights then keep moving,
        and every update makes the mask anew.

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
    scheduled: ClassVar[frozenset[str]] = frozenset({"sparsity"})
    takes_axes: ClassVar[bool] = True
    makes_zeros: ClassVar[bool] = True

    def __post_init__(self):
        scores.needs(self.score)
        check_tiling(self.structure)
        check_sparsity(self.sparsity, 0, schedule=True)
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
        """Whether there is a distribution: it compares all weights."""
        return self.distribution is not None

    def tells_apart(self, a, b):
        """Single entries are counted in each matrix. Which side of it is the input matters to patterns and groups."""
        if not super().tells_apart(a, b) or self.structure is not None or isinstance(self.sparsity, tuple):
            return super().tells_apart(a, b)
        return a.batch != b.batch if self.distribution is None else not a.same_matrices(b)

    def init_all(self, ws, keys, axes):
        """Makes the masks for the initial weights; all true if the score needs gradients."""
        states = in_batches(self, {path: (w, keys[path]) for path, w in ws.items()}, axes, Prune._start)
        if not states or "grad" in scores.needs(self.score):
            return states
        masks = self._masks(ws, states, dict.fromkeys(ws), axes, kept=None)
        return {p: {**s, "mask": pack_mask(masks[p])} for p, s in states.items()}

    def update_all(self, ws, states, grads, axes):
        """Makes the masks anew where the sparsity of this step differs from that of the step before."""
        moved = for_each(self, ws, axes, lambda t, path: t._moved(ws[path], states[path]))
        if not self.moves or not ws:
            return moved
        # The step and the sparsity are the same in all states.
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
        """Returns `w` where the mask is true, else 0."""
        w = check_weight(w)
        check_state(state, mask=mask_entry(w.shape))
        new = masked(w, state["mask"])
        return straight_through(w, new) if self.straight_through else new

    @property
    def moves(self) -> bool:
        """Whether updates change the state."""
        return callable(self.sparsity) or self.straight_through or "grad" in scores.needs(self.score)

    def _start(self, w, key) -> State:
        """The state before the first mask, with a mask that keeps all."""
        state = self.init_schedules() | {"mask": pack_mask(jnp.ones_like(check_weight(w), bool))}
        if self.moves:
            state["step"] = jnp.zeros((), jnp.int32)
        if "key" in scores.needs(self.score):
            state["seed"] = jax.random.bits(key, (2,), jnp.uint32)
        return state

    def _moved(self, w, state: State) -> State:
        """The state of the next step, with the same mask."""
        if not self.moves:
            return state
        check_state(state, mask=mask_entry(jnp.shape(w)), step=STEP)
        return {**self.update_schedules(state), "step": state["step"] + 1}

    def _masks(self, ws, states, grads, axes, kept: Mapping[str, jax.Array] | None) -> dict[str, jax.Array]:
        """The masks by path, within those that are `kept`."""

        def score(t, w, state, grad):
            return {"": scores.evaluate(t.score, w, state, grad)}

        def keep(t, path):
            within = None if kept is None else kept[path]
            return keep_largest(scored[path], sparsity, structure=t.structure, axes=t.axes, within=within)

        arguments = {path: (w, states[path], grads[path]) for path, w in ws.items()}
        if "key" in scores.needs(self.score):  # random numbers: one program for all weights that are alike
            scored = {path: s[""] for path, s in in_batches(self, arguments, axes, score).items()}
        else:
            scored = for_each(self, ws, axes, lambda t, path: score(t, *arguments[path])[""])
        sparsity = self.value("sparsity", next(iter(states.values())))
        if self.distribution is None:
            return for_each(self, ws, axes, keep)
        readings = for_each(self, ws, axes, lambda t, path: t.axes)
        return self.distribution.masks(scored, sparsity, structure=self.structure, axes=readings, within=kept)


def mask_entry(shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    """The entry `mask` of a state, for a weight of this shape."""
    return jax.ShapeDtypeStruct(packed_shape(shape), jnp.uint8)
