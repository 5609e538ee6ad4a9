"""Sparsification by threshold and by rank, against NumPy comparisons and stable argsort."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxweights as jw

FLOATS = [jnp.float32, jnp.bfloat16, jnp.float16]


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def argsort_rule(w, zeros):
    """Mask that is False at the smallest magnitudes, ties by flat index, NaN last."""
    order = np.argsort(np.abs(np.float64(w)).ravel(), kind="stable")
    mask = np.ones(np.size(w), bool)
    mask[order[:zeros]] = False
    return mask.reshape(np.shape(w))


# sparsify


@pytest.mark.parametrize("dtype", FLOATS)
def test_sparsify(dtype):
    weights = [jnp.asarray(normal(*shape), dtype) for shape in ((), (9,), (30, 4), (0, 3))]
    sparsify = jax.jit(lambda weights, threshold: [jw.sparsify(w, threshold) for w in weights])
    for threshold in (0.0, 0.5, 1.0, np.inf):
        for w, out in zip(weights, sparsify(weights, threshold), strict=True):
            assert out.dtype == dtype and out.shape == w.shape
            np.testing.assert_array_equal(out, np.where(np.abs(np.float64(w)) >= threshold, w, 0))


def test_sparsify_edges():
    w = jnp.array([0.5, -0.5, 0.49999997, jnp.nan, jnp.inf, -jnp.inf, 0.0])
    np.testing.assert_array_equal(jw.sparsify(w, 0.5), [0.5, -0.5, 0, 0, np.inf, -np.inf, 0])
    np.testing.assert_array_equal(jw.sparsify(jnp.float16([6e4]), 1e6), [0])
    # A threshold is rounded to the dtype, so the weight it rounds to meets it.
    tenth = jnp.asarray([0.1], jnp.bfloat16)
    np.testing.assert_array_equal(jw.sparsify(tenth, 0.1), tenth)


def test_sparsify_gradient():
    w = jnp.array([-0.7, 0.2, 0.5, 0.0])
    np.testing.assert_array_equal(jax.grad(lambda w: jw.sparsify(w, 0.5).sum())(w), [1, 0, 1, 0])


# magnitude_mask


magnitude_mask = jax.jit(jw.magnitude_mask)


@pytest.mark.parametrize("dtype", FLOATS)
def test_magnitude_mask_is_the_argsort_rule(dtype):
    more_shapes = [(7,), (3, 4, 5)] if dtype == jnp.float32 else []
    for shape in [(20, 15), *more_shapes]:
        for w in (normal(*shape), normal(*shape).round(), np.zeros(shape), np.ones(shape)):
            w = jnp.asarray(w, dtype)
            for sparsity in (0, 0.1, 0.5, 0.77, 1.0):
                expected = argsort_rule(w, int(np.floor(sparsity * w.size + 0.5)))
                np.testing.assert_array_equal(magnitude_mask(w, sparsity), expected, err_msg=f"{shape}, {sparsity}")


def test_a_constant_sparsity_counts_as_a_traced_one():
    w, sparsities = normal(20, 15).astype(np.float32), (0, 0.1, 0.5, 0.77, 1.0)
    masks = jax.jit(lambda w: [jw.magnitude_mask(w, sparsity) for sparsity in sparsities])(w)
    for mask, sparsity in zip(masks, sparsities, strict=True):
        np.testing.assert_array_equal(mask, argsort_rule(w, int(np.floor(sparsity * 300 + 0.5))), err_msg=f"{sparsity}")


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 2**16 - 1), min_size=6, max_size=6), st.integers(0, 8))
def test_magnitude_mask_of_any_value(bits, eighths):
    values = np.array(bits, np.uint16).view(np.float16)
    mask = magnitude_mask(values, np.float32(eighths / 8))
    np.testing.assert_array_equal(mask, argsort_rule(values, (6 * eighths + 4) // 8))


@pytest.mark.parametrize("n", [10, 1000, 12345])
def test_magnitude_mask_counts_exactly(n):
    w = jnp.float32(normal(n))
    masks = jax.jit(jax.vmap(jw.magnitude_mask, (None, 0)))(w, jnp.float32(np.arange(65) / 64))
    np.testing.assert_array_equal((~masks).sum(1), (np.arange(65) * n + 32) // 64)


def test_magnitude_mask_of_nothing_and_of_a_scalar():
    assert jw.magnitude_mask(jnp.zeros((0, 3)), 0.5).shape == (0, 3)
    assert not jw.magnitude_mask(jnp.float32(3), 0.5) and jw.magnitude_mask(jnp.float32(3), 0.4)


def test_magnitude_mask_keeps_nan_longest():
    w = jnp.array([jnp.inf, jnp.nan, 1.0, -jnp.inf])
    np.testing.assert_array_equal(jw.magnitude_mask(w, 0.75), [False, True, False, False])


# Transforms


def test_prune_once():
    w, t = jnp.float32(normal(20, 10)), jw.Prune(0.6)
    state = jax.jit(t.init)(w, jax.random.key(0))
    np.testing.assert_array_equal(jw.sparse.unpack_mask(state["mask"], w.shape), argsort_rule(w, 120))
    later = jnp.float32(normal(20, 10, seed=1))
    state = jax.jit(t.update)(later, state)
    np.testing.assert_array_equal(t.apply(later, state), np.where(argsort_rule(w, 120), later, 0))


def test_prune_on_a_schedule_only_grows():
    t = jw.Prune(lambda step: jnp.minimum(0.2 * (step + 1), 0.8))
    w = jnp.float32(normal(10, 10))
    state, kept, update = jax.jit(t.init)(w, jax.random.key(0)), np.ones((10, 10), bool), jax.jit(t.update)
    for step in range(6):
        w = jnp.float32(normal(10, 10, seed=step))
        state = update(w, state)
        zeros = min(20 * (step + 1), 80)
        kept &= argsort_rule(np.where(kept, w, 0), zeros)
        np.testing.assert_array_equal(jw.sparse.unpack_mask(state["mask"], w.shape), kept)
        assert (~kept).sum() == zeros


def test_apply_and_its_gradient_do_not_see_what_is_pruned():
    t, state = jw.Prune(0.5), {"mask": jw.sparse.pack_mask(jnp.array([True, False, True]))}
    w = jnp.array([1.0, jnp.nan, 3.0])
    np.testing.assert_array_equal(t.apply(w, state), [1, 0, 3])
    np.testing.assert_array_equal(jax.grad(lambda w: t.apply(w, state).sum())(w), [1, 0, 1])


def test_sparsify_on_a_schedule():
    t, w = jw.Sparsify(lambda step: 0.3 * step), jnp.array([0.1, 0.4, 0.7])
    state = t.init(w, jax.random.key(0))
    for kept in ([1, 1, 1], [0, 1, 1], [0, 0, 1]):
        state = t.update(w, state)
        np.testing.assert_array_equal(t.apply(w, state), w * jnp.array(kept))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: jw.sparsify(jnp.ones(3), -1.0), ValueError, "threshold"),
        (lambda: jw.sparsify(jnp.ones(3), float("nan")), ValueError, "NaN"),
        (lambda: jw.sparsify(jnp.ones(3, jnp.int32), 1.0), TypeError, "floating"),
        (lambda: jw.magnitude_mask(jnp.ones(3), 1.1), ValueError, "sparsity"),
        (lambda: jw.magnitude_mask(jnp.ones(3), jnp.ones(2)), ValueError, "scalar"),
        (lambda: jw.Prune(-0.1), ValueError, "sparsity"),
    ],
)
def test_errors(make, error, message):
    with pytest.raises(error, match=message):
        make()
