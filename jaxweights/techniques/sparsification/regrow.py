"""Dynamic sparse training (RigL, SET): weak weights are dropped and others grown, at the same sparsity."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxweights.core.checks import check_integer, check_scalar, check_state
from jaxweights.core.joint import JointTransform, in_batches
from jaxweights.core.transform import Scalar
from jaxweights.numerics.batching import apply_if
from jaxweights.techniques.sparsification import scores
from jaxweights.techniques.sparsification.masks import drop_and_grow
from jaxweights.techniques.sparsification.packed import pack_mask, unpack_mask
from jaxweights.techniques.sparsification.prune import STEP, Prune, mask_entry


@dataclasses.dataclass(frozen=True)
class Regrow(JointTransform):
    """RigL and SET: at regular intervals, drops a fraction of the kept weights and grows as many others.

    It drops the weights of smallest magnitude. It grows those of largest gradient (RigL, `grow=scores.gradient`) or
    random ones (SET, `grow=scores.random`). Use it with `confine`, which passes the gradients and resets the moments
    of dropped weights, so that those of regrown weights start from 0.

    State: that of `start`, `step`, and the `seed` if a score is random.

    Args:
      start: the first mask, with its structure, distribution and axes, such as
        `Prune(0.9, score=scores.random, distribution=ErdosRenyi())`.
      grow: the score whose largest are grown: any function f(w), f(w, grad) or f(w, key) that returns an array of the
        shape of w.
      drop: the score whose smallest are dropped.
      fraction: how many of the kept weights to replace, in [0, 1], a number or a schedule. RigL decays it by
        `optax.cosine_decay_schedule(0.3, n_steps)`.
      every: number of steps between changes.

    >>> import jax, jax.numpy as jnp
    >>> t = Regrow(Prune(0.5), fraction=0.5, every=1)
    >>> w, grad = jnp.array([3.0, 2.0, 1.0, 0.0]), jnp.array([0.0, 0.0, 5.0, 6.0])
    >>> state = t.update(w, t.init(w, jax.random.key(0)), grad)
    >>> print(t.apply(w, t.update(w, state, grad)))
    [3. 0. 0. 0.]

    References: Mocanu et al., Scalable Training of Artificial Neural Networks with Adaptive Sparse Connectivity
    inspired by Network Science, arXiv:1707.04780, 2017 (SET); Evci, Gale, Menick, Castro and Elsen, Rigging the
    Lottery: Making All Tickets Winners, arXiv:1911.11134, 2019 (RigL).
    """

    start: Prune
    _: dataclasses.KW_ONLY
    grow: scores.Score = scores.gradient
    drop: scores.Score = scores.magnitude
    fraction: Scalar = 0.3
    every: int = 100
    scheduled: ClassVar[frozenset[str]] = frozenset({"fraction"})
    makes_zeros: ClassVar[bool] = True

    def __post_init__(self):
        if not isinstance(self.start, Prune):
            raise TypeError(f"start must be a Prune, got {self.start!r}: write Regrow(Prune(0.9))")
        if self.start.moves or isinstance(self.start.sparsity, tuple):
            raise ValueError(
                f"start must prune once, to a fraction of zeros, got {self.start}: give a number and a score of weights"
            )
        for score in (self.grow, self.drop):
            scores.needs(score)
        check_scalar("fraction", self.fraction, 0, 1, schedule=True)
        check_integer("every", self.every, 1)

    @property
    def joint(self):
        """Whether the first masks are made jointly."""
        return self.start.joint

    def init_all(self, ws, keys, axes):
        """Makes the first masks."""
        states = self.start.init_all(ws, keys, axes)
        more = in_batches(self, {path: (key,) for path, key in keys.items()}, axes, Regrow._start)
        return {path: state | more[path] for path, state in states.items()}

    def update_all(self, ws, states, grads, axes):
        """Updates the mask of each weight by itself: the number of its kept weights stays."""
        arguments = {path: (w, states[path], grads[path]) for path, w in ws.items()}
        return in_batches(self, arguments, axes, Regrow.update)

    def update(self, w, state, grad=None):
        """Drops and grows some weights, if it is time."""
        check_state(state, mask=mask_entry(jnp.shape(w)), step=STEP)
        step = state["step"]
        state = {**self.update_schedules(state), "step": step + 1}

        def rewire(packed):
            drop, grow = (scores.evaluate(score, w, state, grad) for score in (self.drop, self.grow))
            mask, fraction = unpack_mask(packed, w.shape), self.value("fraction", state)
            new = drop_and_grow(mask, drop, grow, fraction, structure=self.start.structure, axes=self.start.axes)
            return pack_mask(new)

        return {**state, "mask": apply_if((step > 0) & (step % self.every == 0), rewire, state["mask"])}

    def apply(self, w, state):
        """Returns `w` where the mask is true, else 0."""
        return self.start.apply(w, state)

    def with_axes(self, axes):
        """Returns this spec with `axes` for its start."""
        return dataclasses.replace(self, start=self.start.with_axes(axes))

    def _start(self, key):
        """What the state has beside that of `start`."""
        seeded = "key" in scores.needs(self.grow) | scores.needs(self.drop)
        seed = {"seed": jax.random.bits(key, (2,), jnp.uint32)} if seeded else {}
        return {**self.init_schedules(), "step": jnp.zeros((), jnp.int32), **seed}
