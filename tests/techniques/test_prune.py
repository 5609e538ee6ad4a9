"""Prune on trees: scores, distributions and schedules, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxweights as jw

KEY = jax.random.key(0)
NORMAL = np.random.default_rng(0).normal
SHAPES = {"b": {"kernel": (24, 10)}, "a": {"kernel": (3, 3, 4, 8), "bias": (8,)}}
of_shape = lambda f: jax.tree.map(f, SHAPES, is_leaf=lambda x: isinstance(x, tuple))
PARAMS = of_shape(lambda shape: jnp.float32(NORMAL(size=shape).round(1)))
GRADS = of_shape(lambda shape: jnp.float32(NORMAL(size=shape)))
PATHS = ("a/kernel", "b/kernel")  # in order
FLAT = [PARAMS["a"]["kernel"], PARAMS["b"]["kernel"]]
FLAT_GRADS = [GRADS["a"]["kernel"], GRADS["b"]["kernel"]]
unpack_mask = jax.jit(jw.sparse.unpack_mask, static_argnums=1)


def masks_of(state):
    return [np.asarray(unpack_mask(state.fixed[p]["mask"], w.shape)) for p, w in zip(PATHS, FLAT, strict=True)]


def lowest(values, zeros, among=None):
    """Masks, False at the lowest `zeros` of all arrays jointly, ties in order; entries not `among` come first."""
    flat = np.concatenate([np.float64(v).ravel() for v in values])
    if among is not None:
        flat = np.where(np.concatenate([m.ravel() for m in among]), flat, -np.inf)
    mask = np.ones(flat.size, bool)
    mask[np.argsort(flat, kind="stable")[:zeros]] = False
    ends = np.cumsum([v.size for v in values])[:-1]
    return [m.reshape(v.shape) for m, v in zip(np.split(mask, ends), values, strict=True)]


def equal(masks, expected):
    for mask, e in zip(masks, expected, strict=True):
        np.testing.assert_array_equal(mask, e)


def count(sparsity, n):
    return int(np.floor(sparsity * n + 0.5))


def test_global_pruning_of_a_tree_is_one_argsort():
    lifted = jw.on_tree(jw.Prune(0.7, distribution=jw.pruning.Global()))
    state = jax.jit(lifted.init)(PARAMS, KEY)
    expected = lowest([np.abs(w) for w in FLAT], count(0.7, 528))
    equal(masks_of(state), expected)
    new = jax.jit(lifted.apply)(PARAMS, state)
    np.testing.assert_array_equal(new["a"]["kernel"], np.where(expected[0], FLAT[0], 0))
    np.testing.assert_array_equal(new["a"]["bias"], PARAMS["a"]["bias"])


def test_each_rule_has_a_pool_of_its_own():
    """The same spec under two rules prunes each separately. With a single weight, the distribution has no effect."""
    rules = {f"{p}": jw.Prune(0.5, distribution=jw.pruning.Global()) for p in PATHS}
    state = jax.jit(jw.on_tree(rules).init)(PARAMS, KEY)
    equal(masks_of(state), [lowest([np.abs(w)], w.size // 2)[0] for w in FLAT])
    alone = jax.jit(jw.Prune(0.5, distribution=jw.pruning.Global()).init)(FLAT[0], KEY)
    np.testing.assert_array_equal(alone["mask"], state.fixed["a/kernel"]["mask"])


def test_snip_is_global_pruning_by_saliency_at_the_first_gradient():
    lifted = jw.on_tree(jw.Prune(0.8, score=jw.scores.saliency, distribution=jw.pruning.Global()))
    state = jax.jit(lifted.init)(PARAMS, KEY)
    equal(masks_of(state), [np.ones(w.shape, bool) for w in FLAT])
    update = jax.jit(lifted.update)
    state = update(PARAMS, state, GRADS)
    sensitivity = [np.abs(np.float32(w) * np.float32(g)) for w, g in zip(FLAT, FLAT_GRADS, strict=True)]
    equal(masks_of(state), lowest(sensitivity, count(0.8, 528)))
    later = update(PARAMS, state, jax.tree.map(lambda g: g[::-1], GRADS))
    equal(masks_of(later), masks_of(state))


def test_erdos_renyi_on_a_tree_keeps_the_total():
    """Densities in proportion to Σ(dims)/Π(dims), computed from the shapes alone."""
    lifted = jw.on_tree(jw.Prune(0.6, score=jw.scores.random, distribution=jw.pruning.ErdosRenyi()))
    init = jax.jit(lifted.init)
    masks = masks_of(init(PARAMS, KEY))
    kept = 528 - count(0.6, 528)
    dims = [3 + 3 + 4 + 8, 24 + 10]
    assert sum(m.sum() for m in masks) == kept
    for mask, d in zip(masks, dims, strict=True):
        assert abs(mask.sum() - kept * d / sum(dims)) <= 1
    other = masks_of(init(PARAMS, jax.random.key(1)))
    assert all((m != o).any() and m.sum() == o.sum() for m, o in zip(masks, other, strict=True))


def test_a_custom_score_and_a_structure():
    square = lambda w: -jnp.square(w)
    state = jax.jit(jw.on_tree(jw.Prune(0.5, score=square)).init)(PARAMS, KEY)
    equal(masks_of(state), [lowest([-(np.square(np.float32(w)))], w.size // 2)[0] for w in FLAT])
    lifted = jw.on_tree(jw.Prune(0.5, structure=jw.pruning.OutputUnits(), distribution=jw.pruning.Global()))
    state = jax.jit(lifted.init)(PARAMS, KEY)
    norms = [np.linalg.norm(np.float64(w).reshape(-1, w.shape[-1]), axis=0) for w in FLAT]
    equal([m.reshape(-1, m.shape[-1])[0] for m in masks_of(state)], lowest(norms, 9))


ramp = lambda step: jnp.minimum(0.25 * step, 0.75)


@pytest.mark.parametrize("distribution", [None, jw.pruning.Global()], ids=str)
def test_a_schedule_prunes_within_what_is_kept(distribution):
    """With new weights at every step, pruned entries stay pruned and counts follow the schedule."""
    lifted = jw.on_tree(jw.Prune(ramp, distribution=distribution))
    update = jax.jit(lifted.update)
    state, kept = jax.jit(lifted.init)(PARAMS, KEY), [np.ones(w.shape, bool) for w in FLAT]
    for step in range(5):
        rng = np.random.default_rng(step)
        new = jax.tree.map(lambda w, rng=rng: jnp.float32(rng.normal(size=w.shape)), PARAMS)
        state = update(new, state)
        flat = [np.abs(new["a"]["kernel"]), np.abs(new["b"]["kernel"])]
        if step <= 3:  # the sparsity has changed
            if distribution:
                kept = lowest(flat, count(float(ramp(step)), 528), kept)
            else:
                kept = [lowest([w], count(float(ramp(step)), w.size), [k])[0] for w, k in zip(flat, kept, strict=True)]
        equal(masks_of(state), kept)


def test_where_the_sparsity_falls_all_weights_compete_again():
    values = jnp.array([0.0, 0.5, 0.25, 0.0])
    t = jw.Prune(lambda step: values[step])
    w = [jnp.float32(NORMAL(size=(6, 4))) for _ in range(4)]
    state, update = jax.jit(t.init)(w[0], KEY), jax.jit(t.update)
    for step, zeros in enumerate((0, 12, 6, 0)):
        state = update(w[step], state)
        mask = unpack_mask(state["mask"], (6, 4))
        np.testing.assert_array_equal(mask, lowest([np.abs(w[step])], zeros)[0])


def test_a_mask_is_not_made_anew_while_the_sparsity_stays():
    """The work is in a while loop, which stays one under vmap and runs only if a batch entry needs it."""
    t = jw.Prune(optax.linear_schedule(0.0, 0.5, 1))
    ws = jnp.stack([FLAT[1], FLAT[1][::-1]])
    states = jax.jit(jax.vmap(lambda w: t.init(w, KEY)))(ws)
    names = [e.primitive.name for e in jax.make_jaxpr(jax.vmap(t.update))(ws, states).eqns]
    assert names.count("while") == 1 and "bitcast_convert_type" not in names and "reduce" not in names


@pytest.mark.parametrize("sparsity", [0.5, (2, 4)])
def test_straight_through(sparsity):
    """The gradient reaches pruned weights, and each update prunes the currently smallest weights."""
    t = jw.Prune(sparsity, straight_through=True)
    w = jnp.float32(NORMAL(size=(8, 6)))
    state = jax.jit(t.init)(w, KEY)
    np.testing.assert_array_equal(jax.grad(lambda w: jnp.sum(2 * t.apply(w, state)))(w), np.full((8, 6), 2.0))
    moved = w[::-1]
    state = jax.jit(t.update)(moved, state)
    expected = np.where(jw.magnitude_mask(moved, sparsity), moved, 0)
    np.testing.assert_array_equal(t.apply(moved, state), expected)
    assert (expected == 0).sum() == 24


def test_a_chain_with_a_distribution_is_its_members_one_after_the_other():
    chain = jw.on_tree(jw.Chain(jw.ClipWeights(0.8), jw.Prune(0.5, distribution=jw.pruning.Global())))
    clipped = [np.clip(w, np.float32(-0.8), np.float32(0.8)) for w in FLAT]
    expected = lowest([np.abs(w) for w in clipped], 264)
    new = jax.jit(lambda params: chain.apply(params, chain.update(params, chain.init(params, KEY))))(PARAMS)
    for path, w, mask in zip("ab", clipped, expected, strict=True):
        np.testing.assert_array_equal(new[path]["kernel"], np.where(mask, w, 0))


def test_distributions_read_attention_and_stacks_as_such():
    """(layers, in, out) with a bias of (layers, out) is a stack, and each of its layers has its own density."""
    params = {"stack": {"kernel": jnp.float32(NORMAL(size=(3, 16, 8))), "bias": jnp.zeros((3, 8))}}
    state = jax.jit(jw.on_tree(jw.Prune(0.5, distribution=jw.pruning.ErdosRenyi())).init)(params, KEY)
    mask = unpack_mask(state.fixed["stack/kernel"]["mask"], (3, 16, 8))
    np.testing.assert_array_equal(mask.sum((1, 2)), [64, 64, 64])
    local = jax.jit(jw.on_tree(jw.Prune(0.3)).init)(params, KEY)
    mask = unpack_mask(local.fixed["stack/kernel"]["mask"], (3, 16, 8))
    np.testing.assert_array_equal((~mask).sum((1, 2)), [38, 38, 38])


def test_nan_is_kept_longest_and_infinity_next():
    w = jnp.array([[1.0, jnp.nan, -jnp.inf, 2.0]])
    for zeros, kept in [(1, [0, 1, 1, 1]), (2, [0, 1, 1, 0]), (3, [0, 1, 0, 0]), (4, [0, 0, 0, 0])]:
        state = jax.jit(jw.Prune(zeros / 4, distribution=jw.pruning.Global()).init)(w, KEY)
        np.testing.assert_array_equal(unpack_mask(state["mask"], (1, 4)), np.array([kept], bool))
