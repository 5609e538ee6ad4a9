"""Statistics with counts: merged for any split of the batch, and averaged as in Flax and torch."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec
from x64 import enable_x64

import jaxweights as jw

FEATURES = 3


def masked_batch(seed, n, kept):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, FEATURES)) * rng.uniform(0.1, 10) + rng.normal() * 10
    return x, rng.random((n, 1)) < kept


def oracle(x, where):
    """float64 statistics of the unmasked entries, 0 if there are none."""
    x = np.float64(x)[where[:, 0]]
    if not len(x):
        return np.zeros(FEATURES), np.zeros(FEATURES), np.zeros(FEATURES)
    return x.mean(0), x.var(0), np.full(FEATURES, float(len(x)))


def check(stats, expected, rtol):
    for found, exact in zip(stats, expected, strict=True):
        np.testing.assert_allclose(found, exact, rtol=rtol, atol=rtol * (1 + np.abs(expected[0]).max()))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    cuts=st.lists(st.integers(0, 20), max_size=5),
    kept=st.sampled_from([0.0, 0.2, 0.6, 1.0]),
    data=st.data(),
)
def test_merged_parts_are_one_big_batch_whatever_the_split_and_the_order(seed, cuts, kept, data):
    x, where = masked_batch(seed, 20, kept)
    edges = [0, *sorted(cuts), 20]
    parts = [(x[a:b], where[a:b]) for a, b in itertools.pairwise(edges)]
    parts = data.draw(st.permutations(parts))
    with enable_x64(True):
        stats = [tuple(jnp.asarray(s) for s in oracle(*part)) for part in parts]
        while len(stats) > 1:  # any merge order
            i = data.draw(st.integers(0, len(stats) - 2))
            stats[i : i + 2] = [jw.merge_stats(stats[i], stats[i + 1])]
        check(stats[0], oracle(x, where), 1e-12)


def test_merging_keeps_the_digits_of_float32_at_a_large_mean():
    x = np.float32(np.random.default_rng(0).normal(size=(4096, FEATURES)) + 1e4)

    @jax.jit
    def run(x):
        parts = jax.vmap(jw.batch_stats)(x.reshape(64, 64, FEATURES))
        return jax.tree.map(lambda s: s[-1], jax.lax.associative_scan(jw.merge_stats, parts))

    merged = run(x)
    mean, var, count = oracle(x, np.ones((4096, 1), bool))
    np.testing.assert_allclose(merged[0], mean, rtol=2e-7)
    np.testing.assert_allclose(merged[1], var, rtol=2e-3)
    np.testing.assert_array_equal(merged[2], count)


def test_an_empty_operand_changes_nothing_even_if_it_is_nan():
    a = jw.batch_stats(jnp.array([[0.1, 7.0], [0.3, 1e30]]))
    nothing = (jnp.full(2, jnp.nan), jnp.full(2, jnp.nan), jnp.zeros(2))
    for merged in (jw.merge_stats(a, nothing), jw.merge_stats(nothing, a)):
        jax.tree.map(np.testing.assert_array_equal, merged, a)
    assert not any(s.any() for s in jw.merge_stats(nothing, nothing))


@pytest.mark.parametrize("kept", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("level", ["vmap", "shard_map", "jit"])
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_devices_are_one_big_batch(level, kind, kept):
    if level == "vmap" and kind == "Explicit":
        pytest.skip("vmap needs no mesh")
    x, where = masked_batch(0, 32, kept)
    where[:4] = kept > 0  # one device of eight with all rows
    where[4:8] = False  # and one with none
    x = np.float32(x)
    a, w = jnp.asarray(x), jnp.asarray(where)
    if level == "vmap":
        f = jax.jit(jax.vmap(lambda x, w: jw.batch_stats(x, where=w, axis_name="d"), axis_name="d"))
        stats = f(a.reshape(8, 4, FEATURES), w.reshape(8, 4, 1))
        for s in stats:
            np.testing.assert_array_equal(s, jnp.broadcast_to(s[:1], s.shape))
        stats = [s[0] for s in stats]
    else:
        mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType[kind],))
        a, w = jax.device_put((a, w), NamedSharding(mesh, PartitionSpec("d")))
        if level == "shard_map":
            f = jax.shard_map(
                lambda x, w: jw.batch_stats(x, where=w, axis_name="d"),
                mesh=mesh,
                in_specs=PartitionSpec("d"),
                out_specs=PartitionSpec(),
            )
        else:
            f = lambda x, w: jw.batch_stats(x, where=w)
        compiled = jax.jit(f).lower(a, w).compile()
        assert "all-gather" not in compiled.as_text()
        stats = compiled(a, w)
    check(stats, oracle(x, where), 2e-6)


def test_unmasked_batches_of_devices_merge_too():
    x, where = masked_batch(1, 32, 1.0)
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    f = jax.shard_map(
        lambda x: jw.batch_stats(x, axis_name="d"), mesh=mesh, in_specs=PartitionSpec("d"), out_specs=PartitionSpec()
    )
    check(jax.jit(f)(jnp.float32(x)), oracle(np.float32(x), where), 2e-6)


# Ghost batches


def test_ghost_batches_are_batches_of_their_own():
    x, where = masked_batch(2, 12, 0.7)
    x, where = np.float32(x).reshape(12, 1, FEATURES), where.reshape(12, 1, 1)
    norm = jax.jit(lambda x, where: jw.batch_norm(x, where=where))
    each = [norm(x[i : i + 4], where[i : i + 4]) for i in (0, 4, 8)]
    ghosts = {"where": where, "ghost_size": 4}
    whole, stats = jax.jit(lambda x: (jw.batch_norm(x, **ghosts), jw.batch_stats(x, **ghosts)))(x)
    np.testing.assert_allclose(whole, np.concatenate(each), rtol=1e-5, atol=1e-5)
    for i in range(3):
        part = slice(4 * i, 4 * i + 4)
        check([s[i] for s in stats], oracle(x[part, 0], where[part, 0]), 2e-6)


def test_running_statistics_take_ghost_batches_one_after_the_other():
    x = np.random.default_rng(3).normal(size=(12, FEATURES)) * 3 + 1
    running = mean, var = np.zeros(FEATURES), np.ones(FEATURES)
    for i in (0, 4, 8):  # Hoffer et al., algorithm 1
        mean = 0.9 * mean + 0.1 * x[i : i + 4].mean(0)
        var = 0.9 * var + 0.1 * x[i : i + 4].var(0)
    with enable_x64(True):
        new = jw.running_stats(
            tuple(map(jnp.asarray, running)), jw.batch_stats(jnp.asarray(x), ghost_size=4), momentum=0.9
        )
        np.testing.assert_allclose(new[0], mean, rtol=1e-13)
        np.testing.assert_allclose(new[1], var, rtol=1e-13)


# Conventions


def batches():
    rng = np.random.default_rng(4)
    return [np.float32(rng.normal(size=(6, 5, FEATURES)) * (1 + i) + i) for i in range(5)]


@pytest.mark.parametrize("momentum", [None, 0.7])
def test_the_convention_of_flax(momentum):
    options = {"use_running_average": False} | ({} if momentum is None else {"momentum": momentum})
    flax, ours = nn.BatchNorm(**options), jw.linen.BatchNorm(**options, convention="flax")
    variables = theirs = flax.init(jax.random.key(0), batches()[0])
    step = jax.jit(lambda module, v, x: module.apply(v, x, mutable=["batch_stats"]), static_argnums=0)
    for x in batches():
        y, new = step(ours, variables, x)
        expected, flaxs = step(flax, theirs, x)
        np.testing.assert_allclose(y, expected, atol=2e-5)
        variables, theirs = {**variables, **new}, {**theirs, **flaxs}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6), variables, theirs)
    y = ours.clone(use_running_average=True).apply(variables, x)
    np.testing.assert_allclose(y, flax.clone(use_running_average=True).apply(theirs, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("momentum", [None, 0.3])
@pytest.mark.parametrize("level", ["linen", "nnx"])
def test_the_convention_of_torch(level, momentum):
    torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'jaxweights[peers]'")
    theirs = torch.nn.BatchNorm1d(FEATURES, **({} if momentum is None else {"momentum": momentum}))
    options = {"momentum": momentum, "convention": "torch"}
    if level == "linen":
        module = jw.linen.BatchNorm(use_running_average=False, **options)
        variables = module.init(jax.random.key(0), batches()[0])
    else:
        module = jw.nnx.BatchNorm(FEATURES, **options)

    for x in batches():
        expected = theirs(torch.from_numpy(x).moveaxis(-1, 1)).moveaxis(1, -1).detach().numpy()
        if level == "linen":
            y, new = module.apply(variables, x, mutable=["batch_stats"])
            variables = {**variables, **new}
            mean, var = new["batch_stats"]["mean"], new["batch_stats"]["var"]
        else:
            y = module(jnp.asarray(x))
            mean, var = module.mean[...], module.var[...]
        np.testing.assert_allclose(y, expected, atol=5e-6)
        np.testing.assert_allclose(mean, theirs.running_mean.numpy(), rtol=2e-6, atol=1e-7)
        np.testing.assert_allclose(var, theirs.running_var.numpy(), rtol=2e-6)
    theirs.eval()
    expected = theirs(torch.from_numpy(x).moveaxis(-1, 1)).moveaxis(1, -1).detach().numpy()
    if level == "linen":
        y = module.clone(use_running_average=True).apply(variables, x)
    else:
        y = module(jnp.asarray(x), use_running_average=True)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


def test_one_entry_moves_the_mean_alone_in_torchs_convention():
    """torch raises: a single entry has no unbiased variance."""
    old = (jnp.array([1.0]), jnp.array([3.0]))
    mean, var = jw.running_stats(old, jw.batch_stats(jnp.array([[2.0]])), 0.5, convention="torch")
    assert mean == 1.5 and var == 3


@pytest.mark.parametrize("convention", ["flax", "torch"])
@pytest.mark.parametrize("options", [{}, {"ghost_size": 2}, {"renorm": (3.0, 5.0)}])
def test_a_batch_in_which_nothing_counts_changes_no_statistics(convention, options):
    x, mask = jnp.full((4, FEATURES), 7.0), jnp.zeros((4, 1), bool)
    linen = jw.linen.BatchNorm(use_running_average=False, convention=convention, **options)
    variables = jax.jit(linen.init)(jax.random.key(0), x)
    y, new = jax.jit(lambda v, x: linen.apply(v, x, mask=mask, mutable=["batch_stats"]))(variables, x)
    jax.tree.map(np.testing.assert_array_equal, new["batch_stats"], variables["batch_stats"])
    norm = jw.nnx.BatchNorm(FEATURES, convention=convention, **options)
    np.testing.assert_allclose(norm(x, mask=mask), y, rtol=1e-6)
    assert np.isfinite(y).all() and (norm.mean[...] == 0).all() and (norm.var[...] == 1).all()
