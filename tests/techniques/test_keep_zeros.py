"""Masks that a weight already has are held in training."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxweights as jw

RNG = np.random.default_rng(0)


def test_training_stays_within_the_masks_of_one_shot_pruning():
    x, y = (jnp.float32(RNG.normal(size=(64, n))) for n in (8, 4))
    params = {"up": jnp.float32(RNG.normal(size=(8, 16))), "down": jnp.float32(RNG.normal(size=(16, 4)))}

    def f(params, x):
        return jax.nn.relu(x @ params["up"]) @ params["down"]

    pruned = jw.compress(f, params, [x * jnp.exp(jnp.arange(8))], jw.methods.Wanda(0.5))
    tx = jw.confine(optax.adam(1e-2), jw.KeepZeros())

    @jax.jit
    def step(params, state):
        loss, grads = jax.value_and_grad(lambda params: jnp.mean((f(params, x) - y) ** 2))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    trained, state, losses = pruned, tx.init(pruned), []
    for _ in range(20):
        trained, state, loss = step(trained, state)
        losses.append(loss)
    for name, w in pruned.items():
        np.testing.assert_array_equal(trained[name] == 0, w == 0)
        assert not np.any(np.asarray(state.optimizer[0].mu[name])[np.asarray(w == 0)])
    assert losses[-1] < 0.9 * losses[0]


def test_what_counts_as_zero():
    w = jnp.array([0.0, -0.0, 1e-30, jnp.nan, jnp.inf, -1.0])
    t = jw.KeepZeros()
    state = t.init(w, jax.random.key(0))
    np.testing.assert_array_equal(t.apply(jnp.full(6, 2.0), state), [0, 0, 2, 2, 2, 2])
    np.testing.assert_array_equal(jax.grad(lambda w: t.apply(w, state).sum())(jnp.ones(6)), [0, 0, 1, 1, 1, 1])
