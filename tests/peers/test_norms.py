"""Layer and batch norm against Flax's and Equinox's: defects of theirs that ours avoids.

The defects are those of flax 0.12.8 and equinox 0.13.8. If a test fails because a defect was fixed, delete it.
"""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxweights as jw

KEY = jax.random.key(0)
rng = np.random.default_rng(0)


def standardized(x, axis, eps):
    x = np.float64(x)
    return (x - x.mean(axis, keepdims=True)) / np.sqrt(x.var(axis, keepdims=True) + eps)


# name: (ours, Flax's with defaults, axis of the statistics, ε)
NORMS = {
    "layer": (jw.linen.LayerNorm(), nn.LayerNorm(), -1, 1e-6),
    "batch": (jw.linen.BatchNorm(False), nn.BatchNorm(False), 0, 1e-5),
}


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize(("mean", "theirs"), [(1e2, 1e-3), (1e3, 0.1), (1e4, 100)])
def test_fast_variance_loses_the_digits_that_the_mean_takes(name, mean, theirs):
    """E[x²] − E[x]² in float32, at variance 1: Flax's default is off by thousands at a mean of 1e4."""
    ours, flax, axis, eps = NORMS[name]
    x = np.float32(rng.normal(size=(256, 512)) + mean)
    variables, exact = jax.jit(ours.init)(KEY, x), standardized(x, axis, eps)
    run = jax.jit(lambda module, v, x: module.apply(v, x, mutable=["batch_stats"])[0], static_argnums=0)
    error = lambda module: np.abs(run(module, variables, x) - exact).max()
    assert error(ours) <= 2e-6
    assert error(flax) > theirs


# Two devices with four rows each: all rows count on one, a single outlier on the other.
ROWS = np.float32(rng.normal(size=(2, 4, 3)))
ROWS[1] += 10
COUNTS = np.array([[True] * 4, [True] + [False] * 3])[..., None]


def test_devices_are_averaged_by_what_counts_on_them():
    """Flax averages the device means without weights."""
    kept = np.float64(ROWS).reshape(8, 3)[COUNTS.ravel()]
    of_devices = np.stack([r[c.ravel()].mean(0) for r, c in zip(np.float64(ROWS), COUNTS, strict=True)])

    def running_mean(module, axis="d"):
        module = module(False, momentum=0.0, axis_name=axis)
        variables = jax.jit(module.init)(KEY, ROWS[0])
        step = lambda x, mask: module.apply(variables, x, mask=mask, mutable=["batch_stats"])[1]
        moved = jax.jit(jax.vmap(step, axis_name=axis))(ROWS, COUNTS)["batch_stats"]["mean"]
        np.testing.assert_array_equal(*moved)
        return moved[0]

    np.testing.assert_allclose(running_mean(jw.linen.BatchNorm), kept.mean(0), rtol=1e-5)
    np.testing.assert_allclose(running_mean(nn.BatchNorm), of_devices.mean(0), rtol=1e-5)
    assert (np.abs(of_devices.mean(0) - kept.mean(0)) > 2).all()


def test_a_batch_in_which_nothing_counts_leaves_the_running_statistics():
    """In Flax they become NaN permanently."""
    x, mask = jnp.float32(ROWS[0]), jnp.zeros((4, 1), bool)

    def linen(module):
        run = lambda x: module(False).apply(module(False).init(KEY, x), x, mask=mask, mutable=["batch_stats"])[1]
        return jax.jit(run)(x)["batch_stats"]

    def of_nnx(module):
        norm = module(3, rngs=nnx.Rngs(0))
        norm(x, mask=mask)
        return {"mean": norm.mean[...], "var": norm.var[...]}

    for ours, flax in (
        (linen(jw.linen.BatchNorm), linen(nn.BatchNorm)),
        (of_nnx(jw.nnx.BatchNorm), of_nnx(nnx.BatchNorm)),
    ):
        np.testing.assert_array_equal(ours["mean"], np.zeros(3))
        np.testing.assert_array_equal(ours["var"], np.ones(3))
        assert np.isnan(flax["mean"]).all() and np.isnan(flax["var"]).all()


def test_a_sample_in_which_nothing_counts_is_its_bias():
    """Flax returns NaN."""
    x, mask = jnp.float32(ROWS[0]), jnp.ones((4, 1), bool).at[2].set(False)
    for name in ("LayerNorm", "RMSNorm"):
        ours, flax = (getattr(level, name)() for level in (jw.linen, nn))
        variables = jax.jit(ours.init)(KEY, x)
        y, theirs = (jax.jit(module.apply)(variables, x, mask=mask) for module in (ours, flax))
        np.testing.assert_array_equal(y[2], np.zeros(3))
        assert np.isfinite(y).all() and np.isnan(theirs[2]).all()


def test_group_norm_takes_a_mask_that_broadcasts():
    """Flax documents this but fails to reshape the mask."""
    x, mask = jnp.float32(rng.normal(size=(2, 6, 4))), jnp.arange(6)[:, None] < 4
    variables = jax.jit(nn.GroupNorm(2).init)(KEY, x)
    y = jax.jit(jw.linen.GroupNorm(2).apply)(variables, x, mask=mask)
    expected = jax.jit(nn.GroupNorm(2).apply)(variables, x[:, :4])
    np.testing.assert_allclose(y[:, :4], expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(TypeError, match="reshape"):
        nn.GroupNorm(2).apply(variables, x, mask=mask)


def test_the_running_variance_is_never_beyond_what_has_been_seen():
    """Equinox starts from 1 but corrects the bias as if from 0: at first its variance is 25 times the batch's."""
    x = np.float32(rng.normal(size=(4096, 1)) * np.sqrt(4.08))
    seen = x.var()
    norm = eqx.nn.BatchNorm(1, axis_name="b", mode="batch", channelwise_affine=False)
    over_batch = lambda norm, state: jax.vmap(norm, axis_name="b", in_axes=(0, None), out_axes=(0, None))(x, state)
    _, state = over_batch(norm, eqx.nn.State(norm))
    evaluated, _ = over_batch(eqx.nn.inference_mode(norm), state)
    theirs = seen / np.var(evaluated)
    np.testing.assert_allclose(theirs, 99 + seen, rtol=1e-3)

    for convention in ("flax", "torch"):
        ours = jw.nnx.BatchNorm(1, convention=convention)
        ours(jnp.asarray(x))
        assert 1 < ours.var[0] < seen


def test_the_squares_of_large_activations_overflow_in_flax_and_torch():
    torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'jaxweights[peers]'")
    x = 1e30 * jax.random.normal(jax.random.key(0), (4, 64))
    theirs = nn.LayerNorm().apply({"params": {"scale": jnp.ones(64), "bias": jnp.zeros(64)}}, x)
    assert jnp.isnan(theirs).all()
    assert torch.nn.functional.layer_norm(torch.tensor(np.asarray(x)), (64,)).isnan().all()
    np.testing.assert_allclose(jw.layer_norm(x), standardized(x, -1, 0), atol=2e-6)


def test_flax_has_no_groups_of_devices_under_vmap():
    groups = [[0, 1], [2, 3]]
    xs = jax.random.normal(jax.random.key(0), (4, 8, 3))
    theirs = nn.BatchNorm(use_running_average=False, axis_name="d", axis_index_groups=groups)
    variables = theirs.init(jax.random.key(0), xs[0])
    with pytest.raises(NotImplementedError, match="axis_index_groups"):
        jax.vmap(lambda x: theirs.apply(variables, x, mutable=["batch_stats"]), axis_name="d")(xs)
    ours = jax.vmap(lambda x: jw.batch_norm(x, axis_name="d", axis_index_groups=groups), axis_name="d")(xs)
    for pair in (slice(0, 2), slice(2, 4)):
        np.testing.assert_allclose(ours[pair], jw.batch_norm(xs[pair]), atol=1e-6)
