"""The optax level: constraints hold bit for bit, decay, schedules, and every kind of tree."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxweights as jw

KEY = jax.random.key(0)


def train(tx, params, steps=40, compiler_options=None):
    """Trains on noise with a jitted step; yields the parameters after each step."""
    opt = jax.jit(tx.init)(params)

    @functools.partial(jax.jit, compiler_options=compiler_options)
    def step(params, opt, key):
        grads = jax.tree.map(lambda p: jax.random.normal(key, p.shape).astype(p.dtype), params)
        updates, opt = tx.update(grads, opt, params)
        return optax.apply_updates(params, updates), opt

    for i in range(steps):
        params, opt = step(params, opt, jax.random.fold_in(KEY, i))
        yield params


ADAM, SGD = optax.adam(0.05), optax.sgd(0.3, momentum=0.9)
slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("optimizer", "dtype"),
    [
        pytest.param(ADAM, jnp.float32, id="adam-float32"),
        pytest.param(ADAM, jnp.bfloat16, id="adam-bfloat16", marks=slow),
        pytest.param(ADAM, jnp.float16, id="adam-float16", marks=slow),
        pytest.param(SGD, jnp.float32, id="sgd-float32", marks=slow),
        pytest.param(SGD, jnp.bfloat16, id="sgd-bfloat16"),
        pytest.param(SGD, jnp.float16, id="sgd-float16"),
    ],
)
def test_a_clip_holds_bit_for_bit(optimizer, dtype, optimizing):
    params = {"w": jax.random.normal(KEY, (200, 50)).astype(dtype)}
    limit = np.float64(jnp.asarray(0.1, dtype))
    touched = 0
    for p in train(optax.chain(optimizer, jw.project(jw.ClipWeights(0.1))), params, compiler_options=optimizing):
        size = np.abs(np.asarray(p["w"], np.float64))
        assert size.max() <= limit
        touched += (size == limit).sum()
    assert touched > 1000


@pytest.mark.parametrize(
    "dtype", [jnp.bfloat16, pytest.param(jnp.float32, marks=slow), pytest.param(jnp.float16, marks=slow)]
)
def test_a_mask_holds_bit_for_bit(dtype, optimizing):
    w = jax.random.normal(KEY, (200, 50)).astype(dtype)
    order = np.argsort(np.abs(np.asarray(w, np.float32)).ravel(), kind="stable")
    pruned = np.zeros(w.size, bool)
    pruned[order[: w.size * 9 // 10]] = True
    for p in train(optax.chain(optax.adam(0.05), jw.project(jw.Prune(0.9))), {"w": w}, compiler_options=optimizing):
        np.testing.assert_array_equal(np.asarray(p["w"], np.float32).ravel() == 0, pruned)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_small_weights_and_negative_zero_stay_zero(dtype):
    params = {"w": jax.random.normal(KEY, (100, 10)).astype(dtype)}
    for p in train(optax.chain(optax.adam(0.05), jw.project(jw.Sparsify(0.5))), params):
        w = np.asarray(p["w"], np.float64)
        assert ((w == 0) | (np.abs(w) >= 0.5)).all()
        assert (w == 0).any()


def test_gradual_pruning_follows_its_schedule():
    params = {"w": jax.random.normal(KEY, (100, 10))}
    schedule = optax.polynomial_schedule(0.0, 0.8, 3, 10)
    previous = np.zeros((100, 10), bool)
    for i, p in enumerate(train(optax.chain(optax.adam(0.01), jw.project(jw.Prune(schedule))), params, 15)):
        zero = np.asarray(p["w"]) == 0
        assert zero.sum() == int(np.floor(1000 * float(schedule(i)) + 0.5))
        assert (zero >= previous).all()  # pruned weights stay pruned
        previous = zero


def test_weights_the_transform_keeps_get_their_update_unchanged():
    params = {"w": jnp.array([0.01, -0.02, 0.0999, 0.5]), "b": jnp.array([5.0])}
    updates = {"w": jnp.array([1e-9, 1e-3, 1.0, 0.0]), "b": jnp.array([1.0])}
    tx = jw.project(jw.ClipWeights(0.1), where="w")
    new, _ = tx.update(updates, tx.init(params), params)
    np.testing.assert_array_equal(new["w"][:2], updates["w"][:2])
    np.testing.assert_array_equal(new["b"], updates["b"])


def test_the_projection_is_that_of_the_moved_weight():
    params = {"w": jax.random.normal(KEY, (20, 30))}
    updates = {"w": jax.random.normal(jax.random.key(1), (20, 30))}
    for t, expected in (
        (jw.ClipNorm(1.0), lambda w: w / np.maximum(1, np.linalg.norm(w, axis=0))),
        (jw.SpectralNorm(n_steps=300), lambda w: w / np.linalg.norm(w, 2)),
        (jw.WeightNorm(), lambda w: w / np.linalg.norm(w, axis=0) * np.linalg.norm(np.asarray(params["w"]), axis=0)),
    ):
        tx = jw.project(t)
        new, _ = jax.jit(lambda u, p, tx=tx: tx.update(u, tx.init(p), p))(updates, params)
        moved = np.asarray(params["w"], np.float64) + np.asarray(updates["w"], np.float64)
        got = np.asarray(optax.apply_updates(params, new)["w"], np.float64)
        np.testing.assert_allclose(got, expected(moved), rtol=1e-4, atol=1e-5)


def test_spectral_norm_as_a_projection_holds_sigma_near_one():
    params = {"w": jax.random.normal(KEY, (30, 20))}
    for p in train(optax.chain(optax.adam(1e-3), jw.project(jw.SpectralNorm(n_steps=5))), params):
        last = p
    assert np.linalg.norm(np.asarray(last["w"], np.float64), 2) == pytest.approx(1, abs=0.02)


def modules():
    linear = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    return {
        "nnx state": nnx.state(linear, nnx.Param),
        "nnx module": linear,
        "equinox": eqx.nn.Linear(3, 4, key=KEY),
        "none": {"w": jnp.ones((3, 4)), "frozen": None},
    }


@pytest.mark.parametrize("kind", modules())
def test_trees_of_every_kind(kind):
    params = modules()[kind]
    tx = optax.chain(jw.add_weight_decay(0.1), optax.sgd(1.0), jw.project(jw.ClipWeights(0.25)))
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    new = optax.apply_updates(params, updates)
    for old, leaf in zip(jax.tree.leaves(params), jax.tree.leaves(new), strict=True):
        expected = np.clip(0.9 * np.asarray(old), -0.25, 0.25) if old.ndim == 2 else old
        np.testing.assert_allclose(leaf, expected, rtol=1e-6)


def test_nnx_optimizer_with_where():
    model = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    opt = nnx.Optimizer(model, optax.chain(optax.sgd(0.1), jw.project(jw.ClipWeights(0.2), "kernel")), wrt=nnx.Param)
    opt.update(model, nnx.grad(lambda m: m(jnp.ones((2, 3))).sum())(model))
    assert np.abs(model.kernel[...]).max() == np.float32(0.2)


def test_masked_and_multi_transform():
    params = {"a": jnp.full((2, 2), 3.0), "b": jnp.full((2, 2), 3.0)}
    zero = jax.tree.map(jnp.zeros_like, params)
    tx = optax.masked(jw.project(jw.ClipWeights(1.0)), {"a": True, "b": False})
    new = optax.apply_updates(params, tx.update(zero, tx.init(params), params)[0])
    assert (float(new["a"][0, 0]), float(new["b"][0, 0])) == (1, 3)
    tx = optax.multi_transform(
        {"clip": jw.project(jw.ClipWeights(1.0)), "decay": jw.add_weight_decay(1.0)}, {"a": "clip", "b": "decay"}
    )
    new = optax.apply_updates(params, tx.update(zero, tx.init(params), params)[0])
    assert (float(new["a"][0, 0]), float(new["b"][0, 0])) == (1, 6)


def test_inject_hyperparams_reaches_every_scalar():
    params = {"w": jnp.full((2, 2), 4.0)}
    zero = jax.tree.map(jnp.zeros_like, params)
    schedule = optax.linear_schedule(0.5, 0.0, 2)

    decay = optax.inject_hyperparams(jw.add_weight_decay)(rate=schedule)
    state = decay.init(params)
    for rate in (0.5, 0.25, 0.0):
        updates, state = jax.jit(decay.update)(zero, state, params)
        np.testing.assert_allclose(updates["w"], 4 * rate)

    clip = optax.inject_hyperparams(lambda limit: jw.project(jw.ClipWeights(limit)))(limit=schedule)
    state = clip.init(params)
    for limit in (0.5, 0.25, 0.0):
        updates, state = jax.jit(clip.update)(zero, state, params)
        np.testing.assert_allclose(optax.apply_updates(params, updates)["w"], limit)


def test_decay_is_a_term_of_the_gradient_and_skips_biases():
    params = {"w": jnp.array([[2.0, -4.0]]), "b": jnp.array([8.0])}
    grads = {"w": jnp.array([[1.0, 1.0]]), "b": jnp.array([1.0])}
    tx = optax.chain(jw.add_weight_decay(0.5), optax.sgd(0.1))
    updates, _ = tx.update(grads, tx.init(params), params)
    np.testing.assert_allclose(updates["w"], -0.1 * (np.array([[1.0, 1.0]]) + 0.5 * np.array([[2.0, -4.0]])))
    np.testing.assert_allclose(updates["b"], [-0.1])


def test_a_decay_schedule_counts_its_updates():
    params = {"w": jnp.ones((1, 1))}
    tx = jw.add_weight_decay(lambda step: 0.1 * step)
    state = tx.init(params)
    for expected in (0.0, 0.1, 0.2):
        updates, state = jax.jit(tx.update)({"w": jnp.zeros((1, 1))}, state, params)
        np.testing.assert_allclose(updates["w"], expected, rtol=1e-6)


def transformations():
    """Every transformation of this level, with schedules, 16-bit rounding and states."""
    ramp = optax.linear_schedule(0.1, 0.5, 5)
    clips = jw.Chain(jw.ClipWeights(ramp), jw.Prune(0.5))
    momentum, key = optax.sgd(0.1, momentum=0.9), jax.random.key(0)
    return {
        "decay": jw.add_weight_decay(ramp, cautious=True, toward=WEIGHTS),
        "L1 decay": jw.add_weight_decay(0.1, penalty_grad=jnp.sign, independent=True),
        **{
            f"project {type(t).__name__}": jw.project(t)
            for t in (clips, jw.ClipNorm(ramp), jw.WeightNorm(), jw.SpectralNorm(), jw.Around(jw.ClipWeights(0.1)))
        },
        "confine": jw.confine(momentum, jw.Regrow(jw.Prune(0.5), every=1)),
        "all": optax.chain(momentum, jw.add_weight_decay(0.1), jw.round_stochastically(key), jw.project(clips)),
    }


WEIGHTS = {"kernel": jax.random.normal(KEY, (8, 6)), "conv": jax.random.normal(KEY, (3, 3, 4, 6)), "bias": jnp.ones(6)}


def two_steps(tx, params):
    """Two updates, applied without `optax.apply_updates`, which promotes."""
    state = tx.init(params)
    for _ in range(2):
        grads = jax.tree.map(lambda p: p * jnp.asarray(0.1, p.dtype), params)
        updates, state = tx.update(grads, state, params)
        params = jax.tree.map(
            lambda p, u: (p.astype(jnp.float32) + u.astype(jnp.float32)).astype(p.dtype), params, updates
        )
    return params


@pytest.mark.parametrize("name", transformations())
def test_nothing_is_promoted(name):
    """In strict mode, types and ranks are checked when the program is traced."""
    tx = transformations()[name]
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
            params = jax.tree.map(lambda p, dtype=dtype: p.astype(dtype), WEIGHTS)
            new = jax.eval_shape(functools.partial(two_steps, tx), params)
            assert jax.tree.map(lambda a: (a.shape, a.dtype), new) == jax.tree.map(lambda a: (a.shape, a.dtype), params)


@pytest.mark.parametrize("name", ["decay", "project Chain", pytest.param("all", marks=slow)])
def test_disable_jit_changes_nothing(name):
    params = {"kernel": WEIGHTS["kernel"].astype(jnp.bfloat16), "bias": WEIGHTS["bias"]}
    tx = jw.add_weight_decay(0.1) if name == "decay" else transformations()[name]
    expected = jax.jit(functools.partial(two_steps, tx))(params)
    with jax.disable_jit():
        got = two_steps(tx, params)
    ulp = 2.0**-7  # what XLA fuses is rounded once
    jax.tree.map(lambda a, b: np.testing.assert_allclose(np.float64(a), np.float64(b), rtol=ulp), got, expected)
