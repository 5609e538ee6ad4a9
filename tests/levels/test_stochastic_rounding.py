"""Stochastic rounding of 16-bit updates: unbiased, to a neighbour, and with constraints that hold bit for bit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import jaxweights as jw

KEY = jax.random.key(0)
NARROW = [jnp.bfloat16, jnp.float16]


def stepped(tx, params, updates, state):
    """Parameters and state after one update."""
    new, state = tx.update(updates, state, params)
    return optax.apply_updates(params, new), state


def rounded(p, u, key):
    """p after an update u."""
    tx = jw.round_stochastically(key)
    return stepped(tx, p, u, tx.init(p))[0]


def wild(dtype, n=400):
    """Weights and updates of all sizes: powers of two, zeros and subnormals, and updates far below an ulp."""
    rng = np.random.default_rng(0)
    low, high = (-23, 14) if dtype == jnp.float16 else (-100, 100)
    p = rng.normal(size=n) * 2.0 ** rng.uniform(low, high, n)
    p[:80] = np.tile([1, -1, 0.5, -0.5, 4, -4, 0, -0.0], 10)
    p = p.astype(dtype)
    u = np.float32(np.float64(p) * rng.normal(size=n) * 2.0 ** rng.uniform(-12, 1, n))
    u[:80] = rng.normal(size=80) * 10.0 ** rng.uniform(-3, -2, 80)
    return p, u


@pytest.mark.parametrize("dtype", NARROW)
def test_the_mean_is_the_sum_and_each_value_a_neighbour(dtype, optimizing):
    p, u = wild(dtype)
    n, exact = 20_000, np.float64(p) + np.float64(u)
    nearest = exact.astype(dtype)
    below = np.where(np.float64(nearest) > exact, np.nextafter(nearest, dtype(-np.inf)), nearest)
    low, high = np.float64(below), np.float64(np.nextafter(below.astype(dtype), dtype(np.inf)))

    @functools.partial(jax.jit, compiler_options=optimizing)
    def ups(keys):
        draws = jax.vmap(lambda key: rounded(jnp.asarray(p), jnp.asarray(u), key))(keys).astype(jnp.float32)
        return jnp.sum(draws == np.float32(high), 0), jnp.sum(draws == np.float32(low), 0)

    up, down = map(np.float64, ups(jax.random.split(KEY, n)))
    chance = (exact - low) / (high - low)
    np.testing.assert_array_equal(up + down, n)
    np.testing.assert_array_equal(up[chance == 0], 0)
    common = (n * chance > 20) & (n * (1 - chance) > 20)
    z = (up - n * chance)[common] / np.sqrt(n * chance * (1 - chance))[common]
    assert common.sum() > 250 and np.abs(z).max() < 4.5
    assert abs(np.sum(z**2) - z.size) < 4 * np.sqrt(2 * z.size)  # χ²


def test_an_update_far_below_an_ulp_is_not_lost():
    """1 + u is 1 in float32 too: the chance of a step must come from u itself."""
    chance = 2.0**-13
    u = jnp.full(2**20, -chance * 2.0**-8, jnp.float32)  # below 1, the spacing of bfloat16 is 2^-8
    tiny = u * 2.0**-6  # 1 + tiny is 1 in float32
    for updates, n in ((u, 2**20 * chance), (tiny, 2**20 * chance / 64)):
        new = jax.jit(rounded)(jnp.ones(2**20, jnp.bfloat16), updates, KEY)
        moved = int(jnp.sum(new < 1))
        assert set(np.unique(np.float32(new))) <= {1 - 2.0**-8, 1.0}
        assert abs(moved - n) < 4 * np.sqrt(n) and moved > 0


def test_weights_decay_by_less_than_an_ulp():
    """2,000 steps of 1e-4·w: (1 − 1e-4)^2000 of the weights is left. Without stochastic rounding, all of them."""
    decay = (jw.add_weight_decay(0.1), optax.sgd(1e-3))
    params = {name: jnp.ones((64, 64), dtype) for name, dtype in (("b16", jnp.bfloat16), ("f16", jnp.float16))}
    zero = jax.tree.map(lambda p: jnp.zeros(p.shape), params)

    @jax.jit
    def train(params):
        def run(tx):
            def step(carry, _):
                return stepped(tx, carry[0], zero, carry[1]), None

            return jax.lax.scan(step, (params, tx.init(params)), length=2000)[0][0]

        return run(optax.chain(*decay, jw.round_stochastically(KEY))), run(optax.chain(*decay))

    for new, lost in zip(*(map(np.float64, jax.tree.leaves(tree)) for tree in train(params)), strict=True):
        assert abs(new.mean() - (1 - 1e-4) ** 2000) < 4 * new.std() / np.sqrt(new.size) < 0.002
        assert abs(lost.mean() - (1 - 1e-4) ** 2000) > 0.1


@pytest.mark.parametrize("dtype", NARROW)
def test_constraints_hold_bit_for_bit_and_other_weights_are_untouched(dtype, optimizing):
    """After `project` and in `confine`."""
    params = {"w": (0.2 * jax.random.normal(KEY, (200, 50))).astype(dtype)}
    updates = {"w": 1e-3 * jax.random.normal(jax.random.key(1), (200, 50))}
    rounding, mask = jw.round_stochastically(KEY), jw.Prune(0.5)
    limit = np.float64(jnp.asarray(0.1, dtype))
    both = optax.chain(rounding, jw.project(jw.Chain(jw.ClipWeights(0.1), mask)))

    @functools.partial(jax.jit, compiler_options=optimizing)
    def run(params, updates):
        txs = rounding, both, jw.confine(rounding, mask)
        return [stepped(tx, params, updates, tx.init(params))[0]["w"] for tx in txs]

    free, kept, confined = (np.float64(w) for w in run(params, updates))
    w = np.float64(params["w"])
    # 0.1 is crossed by some: below it before the step, above it after.
    assert ((np.abs(free) > limit) & (np.abs(w) < limit)).any()
    assert np.abs(kept).max() == limit
    pruned = np.zeros(w.size, bool)
    pruned[np.argsort(np.abs(w).ravel(), kind="stable")[:5000]] = True
    pruned = pruned.reshape(w.shape)
    np.testing.assert_array_equal(confined == 0, pruned)
    np.testing.assert_array_equal(confined[~pruned], free[~pruned])
    assert (kept == 0).sum() == 5000
    inside = (kept != 0) & (np.abs(free) <= limit)
    np.testing.assert_array_equal(kept[inside], free[inside])


def test_other_weights_keep_their_updates():
    params = {"w": jnp.ones(3), "n": jnp.ones(3, int), "h": jnp.ones(3, jnp.bfloat16), "none": None}
    updates = {"w": jnp.full(3, 1e-9), "n": jnp.ones(3), "h": None, "none": None}
    tx = jw.round_stochastically(KEY)
    new, _ = tx.update(updates, tx.init(params), params)
    assert all(new[name] is updates[name] for name in updates)


def test_overflow_and_nan_are_those_of_the_plain_update():
    """The largest value is not left for infinity."""
    top = float(jnp.finfo(jnp.float16).max)
    p = jnp.array([top, -top, top, 1, jnp.nan, jnp.inf], jnp.float16)
    u = jnp.array([15, -15, 1e6, jnp.nan, 1, 1], jnp.float32)
    draws = jax.jit(jax.vmap(functools.partial(rounded, p, u)))(jax.random.split(KEY, 100))
    np.testing.assert_array_equal(draws, np.tile(np.float16([top, -top, np.inf, np.nan, np.nan, np.inf]), (100, 1)))


def test_each_step_and_each_weight_has_a_key_of_its_own():
    """The same key gives the same result: eagerly, under jit, vmap and on a mesh, with keys of both kinds."""
    params = {"a": jnp.ones((64, 32), jnp.bfloat16), "b": jnp.ones((64, 32), jnp.bfloat16)}
    updates = jax.tree.map(lambda p: jnp.full(p.shape, -(2.0**-9)), params)  # half of the weights move

    def two_steps(key, params, updates):
        tx = jw.round_stochastically(key)
        state = tx.init(params)
        first, state = tx.update(updates, state, params)
        return first, tx.update(updates, state, params)[0]

    first, second = expected = two_steps(KEY, params, updates)
    draws = [np.asarray(u).ravel() for u in (first["a"], first["b"], second["a"], second["b"])]
    assert np.abs(np.corrcoef(draws) - np.eye(4)).max() < 0.1
    same = functools.partial(jax.tree.map, np.testing.assert_array_equal)
    same(jax.jit(two_steps)(KEY, params, updates), expected)
    keys = jax.random.split(KEY, 3)
    batch = jax.jit(jax.vmap(two_steps, (0, None, None)))(keys, params, updates)
    same(jax.tree.map(lambda a: a[1], batch), two_steps(keys[1], params, updates))
    same(two_steps(jax.random.PRNGKey(0), params, updates), expected)
    split = NamedSharding(jax.make_mesh((4, 2), ("x", "y")), PartitionSpec("x", "y"))
    same(jax.jit(two_steps)(KEY, *jax.device_put((params, updates), split)), expected)


def test_the_state_can_be_donated():
    params, key = {"w": jnp.ones(8, jnp.bfloat16)}, jax.random.key(3)
    tx = jw.round_stochastically(key)
    step = jax.jit(lambda state: tx.update(params, state, params)[1], donate_argnums=0)
    first, again = step(tx.init(params)), step(tx.init(params))
    np.testing.assert_array_equal(jax.random.key_data(first.key), jax.random.key_data(again.key))
    assert step(first).key.shape == key.shape
