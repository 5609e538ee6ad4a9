"""The transform protocol for third parties: declared schedules and axes, joint transforms, gradients."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxweights as jw

KEY = jax.random.key(0)
W = jnp.arange(6.0).reshape(2, 3) - 2
ATTENTION = {f"{name}/kernel": jnp.ones((8, 2, 4)) for name in ("query", "key", "value")}
ATTENTION["out/kernel"] = jnp.ones((2, 4, 8))


@dataclasses.dataclass(frozen=True)
class Mapped(jw.Transform):
    """f(w) times a scale that may be a schedule. The field `f` is callable but not a schedule."""

    f: Callable[[jax.Array], jax.Array]
    scale: Any = 1.0
    scheduled: ClassVar[frozenset[str]] = frozenset({"scale"})

    def apply(self, w, state):
        return self.f(w) * self.value("scale", state)


@pytest.mark.parametrize("f", [jnp.tanh, jnp.sort, jnp.square], ids=lambda f: f.__name__)
def test_a_callable_field_is_a_schedule_only_if_it_is_declared_as_one(f):
    t, expected = Mapped(f), f(W)
    assert t.init(W, KEY) == {} and t.update(W, {}) == {}
    lifted = jw.on_tree(t, where="w")
    np.testing.assert_array_equal(lifted.apply({"w": W}, lifted.init({"w": W}, KEY))["w"], expected)
    tx = jw.project(t, where="w")
    updates, _ = jax.jit(tx.update)({"w": 0 * W}, tx.init({"w": W}), {"w": W})
    np.testing.assert_allclose(W + updates["w"], expected, rtol=1e-6)
    model = jw.linen.Transformed(nn.Dense(3, use_bias=False), t)
    variables = {"params": {"kernel": W}}
    np.testing.assert_allclose(model.apply(variables, jnp.eye(2)), expected, rtol=1e-6)


def test_a_declared_schedule_is_evaluated_at_each_update():
    t = Mapped(jnp.tanh, lambda step: 2.0**step)
    state = t.init(W, KEY)
    for scale in (1, 1, 2, 4):
        np.testing.assert_allclose(t.apply(W, state), scale * np.tanh(W), rtol=1e-6)
        state = t.update(W, state)


@dataclasses.dataclass(frozen=True)
class Flipped(jw.Transform):
    """Reverses the weight along `axes`, which do not describe a matrix."""

    axes: tuple[int, ...] | None = None

    def apply(self, w, state):
        return jnp.flip(w, self.axes)


def test_a_tree_fills_in_axes_only_where_they_are_declared():
    assert jw.WeightNorm.takes_axes and not Flipped.takes_axes
    norms, flips = (jw.on_tree(t).selected(ATTENTION) for t in (jw.WeightNorm(), Flipped()))
    assert {t.axes for t in norms.values()} == {jw.axes.ATTENTION_IN, jw.axes.ATTENTION_OUT}
    assert {t.axes for t in flips.values()} == {None}


@dataclasses.dataclass(frozen=True)
class UnitNorm(jw.JointTransform):
    """Divides all weights of a rule by their joint norm at the last update."""

    def init_all(self, ws, keys, axes):
        norm = jnp.sqrt(sum(jnp.sum(w**2) for w in ws.values()))
        return {path: {"norm": norm} for path in ws}

    def update_all(self, ws, states, grads, axes):
        return self.init_all(ws, {}, axes)

    def apply(self, w, state):
        return w / state["norm"]


def test_a_joint_transform_sees_the_weights_of_its_rule_within_a_chain_and_around_a_center_too():
    params = {"a": W, "b": 3 * W, "c": W}
    rules = {"[ab]": UnitNorm(), "c": UnitNorm()}
    lifted = jw.on_tree(rules)
    new = lifted.apply(params, lifted.init(params, KEY))
    norm = np.linalg.norm(W)
    for path, factor in (("a", 1 / np.sqrt(10)), ("b", 3 / np.sqrt(10)), ("c", 1)):
        np.testing.assert_allclose(new[path], W * factor / norm, rtol=1e-6)

    halved = jw.on_tree(jw.Chain(Mapped(jnp.sign), UnitNorm()), where="[ab]")
    new = halved.apply(params, halved.init(params, KEY))
    np.testing.assert_allclose(new["a"], np.sign(W) / np.sqrt(10), rtol=1e-6)

    around = jw.on_tree(jw.Around(UnitNorm()), where="[ab]")
    state = around.init(params, KEY)
    moved = {"a": W + 3, "b": 3 * W - 4, "c": W}
    new = jax.jit(lambda params, state: around.apply(params, around.update(params, state)))(moved, state)
    np.testing.assert_allclose(new["a"], W + 3 / np.sqrt(6 * 25), rtol=1e-6)
    np.testing.assert_allclose(new["b"], 3 * W - 4 / np.sqrt(6 * 25), rtol=1e-6)
    alone = UnitNorm().init(W, KEY)
    np.testing.assert_allclose(UnitNorm().apply(W, UnitNorm().update(2 * W, alone)), W / (2 * norm), rtol=1e-6)


def test_around_holds_a_jointly_pruned_distance():
    params = {"a": W, "b": 10 * W}
    t = jw.Around(jw.Prune(0.5, score=jw.scores.saliency, distribution=jw.pruning.Global()))
    lifted = jw.on_tree(t, where="*")
    moved = {"a": W + 1, "b": 10 * W + jnp.arange(6.0).reshape(2, 3)}
    state = lifted.update(moved, lifted.init(params, KEY), {"a": jnp.ones((2, 3)), "b": jnp.ones((2, 3))})
    new = lifted.apply(moved, state)
    # The distances are six ones and 0 to 5. The 0 is pruned; ties go by path and index.
    np.testing.assert_array_equal(new["a"] - params["a"], [[0, 0, 0], [0, 0, 1]])
    np.testing.assert_array_equal(new["b"] - params["b"], [[0, 1, 2], [3, 4, 5]])


@dataclasses.dataclass(frozen=True)
class Remembering(jw.Transform):
    """Stores the gradient it receives."""

    def init(self, w, key):
        return {"grad": jnp.full_like(w, jnp.nan)}

    def update(self, w, state, grad=None):
        return state if grad is None else {"grad": grad}

    def apply(self, w, state):
        return w


def test_grad_is_a_gradient_and_never_an_update():
    params, grads = {"w": W}, {"w": 2 * W}
    seen = lambda state: state.transform.fixed["w"]["grad"]
    tx = optax.chain(optax.sgd(0.1), jw.project(Remembering(), where="w"))
    _, state = tx.update(grads, tx.init(params), params)
    assert np.isnan(seen(state[1])).all()
    _, state = tx.update(grads, tx.init(params), params, grad=grads)
    np.testing.assert_array_equal(seen(state[1]), grads["w"])
    tx = jw.confine(optax.adam(0.1), Remembering(), where="w")
    _, state = tx.update(grads, tx.init(params), params)
    np.testing.assert_array_equal(seen(state), grads["w"])


@dataclasses.dataclass(frozen=True)
class Rotating(jw.Transform):
    """Keeps one output after the other, scaled by the running mean of the norm of the weight."""

    def init(self, w, key):
        return {"turn": jnp.zeros((), jnp.int32), "norm": jnp.sqrt(jnp.sum(w**2))}

    def update(self, w, state, grad=None):
        return {"turn": state["turn"] + 1, "norm": (state["norm"] + jnp.sqrt(jnp.sum(w**2))) / 2}

    def apply(self, w, state):
        return jnp.where(jnp.arange(w.shape[-1]) == state["turn"] % w.shape[-1], w / state["norm"], 0)


@pytest.mark.parametrize("t", [Rotating(), jw.Chain(jw.SpectralNorm(), Rotating()), jw.Around(Rotating())])
def test_a_tree_refuses_the_mean_of_an_integer_that_a_third_party_keeps(t):
    lifted = jw.on_tree(t, where="w")
    state = lifted.init({"w": W}, KEY)
    mean = jax.tree.map(lambda a: 0.9 * a + 0.1 * a, state)
    for verb in (lifted.apply, lifted.update):
        with pytest.raises(TypeError, match="turn' of dtype float32, init makes it int32: it was averaged or cast"):
            verb({"w": W}, mean)
    mixed = jax.tree.map(lambda a, b: a if jnp.issubdtype(a.dtype, jnp.integer) else b, state, mean)
    np.testing.assert_allclose(lifted.apply({"w": W}, mixed)["w"], lifted.apply({"w": W}, state)["w"], rtol=1e-5)
