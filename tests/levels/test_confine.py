"""Sparse training with any optimizer: masks, gradients and moments, against NumPy at every step."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import jaxweights as jw

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
SHAPES = {"a": {"kernel": (24, 10), "bias": (10,)}, "b": {"kernel": (10, 6), "scale": (6,)}, "table": (7, 9)}
PARAMS = jax.tree.map(lambda s: jnp.float32(RNG.normal(size=s)), SHAPES, is_leaf=lambda s: isinstance(s, tuple))
KERNELS = {"a/kernel": (24, 10), "b/kernel": (10, 6)}  # all shapes of the tree differ
RIGL = jw.Regrow(
    jw.Prune(0.7, score=jw.scores.random, distribution=jw.pruning.ErdosRenyi()),
    fraction=optax.cosine_decay_schedule(0.5, 8),
    every=2,
)
SET = jw.Regrow(jw.Prune(0.7), grow=jw.scores.random, every=1)
labels = lambda params: jax.tree.map_with_path(lambda path, _: "adam" if "b" in str(path[0]) else "sgd", params)
OPTIMIZERS = {
    "momentum": optax.sgd(0.1, momentum=0.9),
    "nesterov": optax.sgd(0.1, momentum=0.9, nesterov=True, accumulator_dtype=jnp.bfloat16),
    "adam": optax.adam(0.1),
    "adamw": optax.adamw(0.1),
    "lion": optax.lion(0.1),
    "rmsprop": optax.rmsprop(0.1, momentum=0.9),
    "adafactor": optax.adafactor(0.1, min_dim_size_to_factor=8),
    "adafactor whole": optax.adafactor(0.1, momentum=0.9, factored=False),
    "chain": optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(), optax.trace(0.5), optax.scale(-0.1)),
    "multi_transform": optax.multi_transform({"adam": optax.adam(0.1), "sgd": optax.sgd(0.1, momentum=0.9)}, labels),
    "masked": optax.masked(optax.adam(0.1), lambda p: jax.tree.map(lambda a: a.ndim == 2, p)),
    "inject_hyperparams": optax.inject_hyperparams(optax.adam)(learning_rate=optax.constant_schedule(0.1)),
}


def gradients(step, params=PARAMS):
    """Random dense gradients, nonzero at pruned entries too."""
    rng = np.random.default_rng(step)
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), params)


def run(tx, params, n_steps):
    """Returns (params, state) after each step."""

    @jax.jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state, out = tx.init(params), []
    for i in range(n_steps):
        params, state = step(params, state, gradients(i, params))
        out.append((params, state))
    return out


def mask_of(state, path):
    return np.asarray(jw.sparse.unpack_mask(state.transform.fixed[path]["mask"], KERNELS[path]))


SOME = [("momentum", jnp.float32), ("adam", jnp.bfloat16), ("adafactor", jnp.float32), ("multi_transform", jnp.float32)]
REST = [*((name, jnp.float32) for name in OPTIMIZERS if (name, jnp.float32) not in SOME), ("lion", jnp.bfloat16)]


@pytest.mark.parametrize(("name", "dtype"), [*SOME, *(pytest.param(*case, marks=pytest.mark.slow) for case in REST)])
def test_weights_and_moments_of_every_optimizer_are_zero_where_they_are_pruned(name, dtype):
    """Finds the moments of a kernel by shape, which no other weight shares."""
    t = jw.Regrow(jw.Prune(0.7), fraction=optax.cosine_decay_schedule(0.5, 6), every=2)
    start, masks = jax.tree.map(lambda p: p.astype(dtype), PARAMS), []
    for params, state in run(jw.confine(OPTIMIZERS[name], t, "a/kernel"), start, 7):
        masks.append(mask_of(state, "a/kernel"))
        moments = [a for a in jax.tree.leaves(state.optimizer) if a.shape == (24, 10)]
        for a in (params["a"]["kernel"], *moments):
            assert not np.asarray(a, np.float32)[~masks[-1]].any()
        assert masks[-1].sum() == 72 and np.count_nonzero(params["a"]["kernel"]) > 50
        assert np.count_nonzero(params["table"]) == 63
    changed = [bool((a != b).any()) for a, b in itertools.pairwise(masks)]
    assert changed == [False, True, False, True, False, False]  # at steps 2 and 4; at 6 the fraction is 0


def test_the_moments_are_there_to_be_found():
    """The test above is not vacuous: Adam has two moments per kernel, at any nesting."""
    for name in ("adam", "chain", "multi_transform", "masked", "inject_hyperparams"):
        state = jax.eval_shape(jw.confine(OPTIMIZERS[name], RIGL, "*/kernel").init, PARAMS)
        shapes = [a.shape for a in jax.tree.leaves(state.optimizer)]
        assert shapes.count((10, 6)) == (3 if name == "chain" else 2), name


def test_rigl_with_momentum_against_numpy():
    lr, beta, every, fraction = 0.1, 0.9, 2, 0.3
    t = jw.Regrow(jw.Prune(0.6), fraction=fraction, every=every)
    w = np.asarray(PARAMS["a"]["kernel"], np.float64)
    mask = np.ones(w.size, bool)
    mask[np.argsort(np.abs(w).ravel(), kind="stable")[:144]] = False
    trace = np.zeros(w.size)
    w = w.ravel()
    params = {"kernel": PARAMS["a"]["kernel"]}
    for step, (new, state) in enumerate(run(jw.confine(optax.sgd(lr, momentum=beta), t), params, 7)):
        g = np.float64(gradients(step, params)["kernel"]).ravel()
        if step > 0 and step % every == 0:
            k = int(np.floor(fraction * mask.sum() + 0.5))
            kept = np.flatnonzero(mask)
            mask[kept[np.argsort(np.abs(w[kept]), kind="stable")[:k]]] = False
            pruned = np.flatnonzero(~mask)
            mask[pruned[np.argsort(-np.abs(g[pruned]), kind="stable")[:k]]] = True
        trace = mask * (beta * trace + mask * g)
        w = mask * (w - lr * trace)
        np.testing.assert_array_equal(
            jw.sparse.unpack_mask(state.transform.fixed["kernel"]["mask"], (24, 10)).ravel(), mask
        )
        np.testing.assert_allclose(new["kernel"].ravel(), w, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(state.optimizer[0].trace["kernel"].ravel(), trace, rtol=1e-5, atol=1e-6)


def test_set_drops_the_smallest_and_grows_at_random():
    params = {"kernel": PARAMS["a"]["kernel"]}
    steps = run(jw.confine(optax.sgd(0.0), SET), params, 12)
    masks = [jw.sparse.unpack_mask(s.transform.fixed["kernel"]["mask"], (24, 10)) for _, s in steps]
    grown = np.zeros((24, 10), int)
    for (before, after), (weights, _) in zip(itertools.pairwise(masks), steps, strict=False):
        w = np.abs(np.asarray(weights["kernel"]))
        dropped = before & ~after
        assert before.sum() == after.sum() == 72 and 1 <= dropped.sum() <= 22
        assert w[dropped].max() <= np.sort(w[before])[21]
        grown += np.asarray(after & ~before)
    assert (grown[grown > 0] <= 6).all() and (grown > 0).sum() > 80  # spread over the kernel


def test_a_weight_that_comes_back_starts_from_zero_without_a_moment():
    params = {"kernel": PARAMS["a"]["kernel"]}
    t = jw.Regrow(jw.Prune(0.5), fraction=0.5, every=3)
    steps = run(jw.confine(optax.adam(0.1), t), params, 4)
    before, after = (jw.sparse.unpack_mask(s.transform.fixed["kernel"]["mask"], (24, 10)) for _, s in steps[2:])
    grown = np.asarray(after & ~before)
    g = np.asarray(gradients(3, params)["kernel"])
    assert 20 < grown.sum() <= 60  # some of the dropped have the largest gradients
    np.testing.assert_allclose(steps[3][1].optimizer[0].mu["kernel"][grown], 0.1 * g[grown], rtol=1e-5)
    assert (np.sign(steps[3][0]["kernel"]) == -np.sign(g))[grown].all()


def projected(tx, t, where):
    return optax.chain(tx, jw.project(t, where))


@pytest.mark.parametrize(
    ("level", "dtype"),
    [
        (jw.confine, jnp.bfloat16),
        (projected, jnp.float32),
        pytest.param(jw.confine, jnp.float32, marks=pytest.mark.slow),
        pytest.param(projected, jnp.bfloat16, marks=pytest.mark.slow),
    ],
)
def test_gradual_pruning_has_exact_zeros_through_momentum(level, dtype):
    """Zeros match the schedule at every step and never disappear."""
    schedule = jw.pruning.PolynomialSparsity(0.9, 2, 8, every=2)
    params = jax.tree.map(lambda p: p.astype(dtype), PARAMS)
    zeros = {path: np.zeros(shape, bool) for path, shape in KERNELS.items()}
    for step, (new, _) in enumerate(run(level(OPTIMIZERS["momentum"], jw.Prune(schedule), "*/kernel"), params, 10)):
        t = min(max((step - 2) // 2 * 2 / 6, 0), 1)
        sparsity = 0.9 - 0.9 * (1 - t) ** 3
        for path, before in zeros.items():
            now = np.asarray(new[path[0]]["kernel"]) == 0
            assert now.sum() == np.floor(sparsity * now.size + 0.5) and not (before & ~now).any()
            zeros[path] = now


def test_acdc_against_numpy():
    schedule = jw.pruning.AlternatingSparsity(0.75, sparse=2, dense=2, begin=1, end=9)
    w, trace, mask = np.float64(PARAMS["a"]["kernel"]), np.zeros((24, 10)), np.ones((24, 10), bool)
    params = {"kernel": PARAMS["a"]["kernel"]}
    phases = [0, 1, 1, 0, 0, 1, 1, 0, 0, 1, 1, 1]
    steps = run(jw.confine(optax.sgd(0.1, momentum=0.9), jw.Prune(schedule)), params, len(phases))
    for step, (new, _) in enumerate(steps):
        if phases[step] != ([0, *phases][step]):
            mask = np.ones(240, bool)
            mask[np.argsort(np.abs(w).ravel(), kind="stable")[: 180 * phases[step]]] = False
            mask = mask.reshape(24, 10)
        trace = mask * (0.9 * trace + mask * np.float64(gradients(step, params)["kernel"]))
        w = mask * (w - 0.1 * trace)
        np.testing.assert_allclose(new["kernel"], w, rtol=1e-5, atol=1e-6)
        assert (np.asarray(new["kernel"]) == 0).sum() == 180 * phases[step]


def test_a_lottery_ticket_is_found_in_rounds_and_rewound():
    """Trains, prunes 1 - 0.8^round of all and rewinds: masks are nested, and kept weights are the early ones."""
    early, params = PARAMS, PARAMS
    before = {path: np.ones(shape, bool) for path, shape in KERNELS.items()}
    for number in range(1, 4):
        # Weights pruned in the previous round are 0, so they are pruned again and stay 0 during training.
        lifted = jw.on_tree(jw.Prune(1 - 0.8**number, distribution=jw.pruning.Global()), "*/kernel")
        tx = jw.confine(
            optax.adam(0.05), jw.Prune(1 - 0.8 ** (number - 1), distribution=jw.pruning.Global()), "*/kernel"
        )
        trained, _ = run(tx, params, 3)[-1]
        masks = lifted.init(trained, KEY)
        params = lifted.apply(early, masks)
        kept = {p: np.asarray(jw.sparse.unpack_mask(masks.fixed[p]["mask"], s)) for p, s in KERNELS.items()}
        assert sum((~m).sum() for m in kept.values()) == np.floor((1 - 0.8**number) * 300 + 0.5)
        for path, mask in kept.items():
            np.testing.assert_array_equal(params[path[0]]["kernel"], np.where(mask, early[path[0]]["kernel"], 0))
            assert not (mask & ~before[path]).any()
        before = kept


@pytest.mark.slow
def test_training_resumes_bit_for_bit_from_a_checkpoint(tmp_path):
    tx = jw.confine(OPTIMIZERS["adamw"], {"a/kernel": RIGL, "b/kernel": SET})
    step = jax.jit(lambda p, s, g: (lambda u, s: (optax.apply_updates(p, u), s))(*tx.update(g, s, p)))
    now = (PARAMS, tx.init(PARAMS))
    for i in range(3):
        now = step(*now, gradients(i))
    assert now[1].transform.fixed["a/kernel"]["mask"].dtype == jnp.uint8
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", now)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", jax.tree.map(ocp.utils.to_shape_dtype_struct, now))
    for i in range(3, 6):
        now, restored = step(*now, gradients(i)), step(*restored, gradients(i))
    jax.tree.map(np.testing.assert_array_equal, restored, now)


def test_inside_a_mask_of_optax_and_for_one_array():
    """Works with leaves masked out by optax, and with a single array as parameters."""
    only = lambda p: {**jax.tree.map(lambda _: False, p), "a": {"kernel": True, "bias": True}}
    tx = optax.masked(jw.confine(optax.adam(0.1), jw.Prune(0.5), "a/kernel"), only)
    params, _ = run(tx, PARAMS, 3)[-1]
    assert (np.asarray(params["a"]["kernel"]) == 0).sum() == 120 and np.count_nonzero(params["b"]["kernel"]) == 60
    params, state = run(jw.confine(optax.adam(0.1), jw.Prune(0.5)), PARAMS["table"], 3)[-1]
    assert (np.asarray(params) == 0).sum() == 32 and (np.asarray(state.optimizer[0].nu) == 0).sum() == 32


def test_drop_and_grow_per_layer_of_a_stack_and_in_blocks():
    mask = RNG.random((3, 8, 6)) < 0.5
    drop, grow = (np.float32(RNG.normal(size=(3, 8, 6))) for _ in range(2))
    stack = jw.Axes(input=-2, output=-1, batch=0)
    new = jax.jit(lambda *a: jw.pruning.drop_and_grow(*a, axes=stack))(mask, drop, grow, 0.4)
    for m, d, g, n in zip(mask, drop, grow, new, strict=True):
        expected, k = m.ravel().copy(), int(np.floor(0.4 * m.sum() + 0.5))
        kept = np.flatnonzero(expected)
        expected[kept[np.argsort(d.ravel()[kept])[:k]]] = False
        pruned = np.flatnonzero(~expected)
        expected[pruned[np.argsort(-g.ravel()[pruned])[:k]]] = True
        np.testing.assert_array_equal(n.ravel(), expected)
    units = np.repeat([[1, 1, 1, 0, 0, 0]], 8, 0).astype(bool)
    swap = jax.jit(lambda *a: jw.pruning.drop_and_grow(*a, structure=jw.pruning.OutputUnits()))
    new = np.asarray(swap(units, drop[0], grow[0], 1.0))
    best = np.argsort(np.linalg.norm(grow[0], axis=0))[3:]
    assert (new == new[:1]).all() and set(np.flatnonzero(new[0])) == set(best)
