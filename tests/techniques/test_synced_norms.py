"""Norms of a sharded array: values and gradients match a single device, for any split."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxweights as jw

rng = np.random.default_rng(0)
X, CT = (jnp.float32(rng.normal(size=(16, 4, 6)) + mean) for mean in (3, 0))
SCALE, BIAS = jnp.float32(rng.normal(size=6)), jnp.float32(rng.normal(size=6))
WHERE = jnp.asarray(rng.random((16, 4, 1)) < 0.6).at[:2].set(False)  # one of eight devices is fully masked
SPLIT, WHOLE = PartitionSpec("d"), PartitionSpec()


def mesh(kind):
    return jax.make_mesh((8,), ("d",), axis_types=(AxisType[kind],))


@functools.partial(jax.jit, static_argnums=0)
def value_and_pull(f, args, ct):
    y, pull = jax.vjp(f, *args)
    return y, *pull(ct)


def close(found, expected):
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


@functools.cache
def one_batch(masked):
    f = lambda *args: jw.batch_norm(*args, where=WHERE if masked else None)
    return value_and_pull(f, (X, SCALE, BIAS), CT)


@pytest.mark.parametrize("masked", [False, True])
def test_batch_norm_over_a_mapped_axis(masked):
    split = lambda a: a.reshape(8, 2, *a.shape[1:])
    norm = lambda x, where, scale, bias: jw.batch_norm(x, scale, bias, where=where if masked else None, axis_name="d")
    each = jax.vmap(norm, (0, 0, None, None), axis_name="d")
    f = lambda x, scale, bias: each(split(x), split(WHERE), scale, bias).reshape(X.shape)
    close(value_and_pull(f, (X, SCALE, BIAS), CT), one_batch(masked))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_batch_norm_in_shard_map(masked, kind):
    norm = lambda x, where, scale, bias: jw.batch_norm(x, scale, bias, where=where if masked else None, axis_name="d")
    each = jax.shard_map(norm, mesh=mesh(kind), in_specs=(SPLIT, SPLIT, WHOLE, WHOLE), out_specs=SPLIT)
    place = lambda a: jax.device_put(a, NamedSharding(mesh(kind), SPLIT))
    f = lambda x, scale, bias: each(x, place(WHERE), scale, bias)
    args = place(X), *(jax.device_put(a, NamedSharding(mesh(kind), WHOLE)) for a in (SCALE, BIAS))
    close(jax.jit(lambda *args: value_and_pull(f, args[:3], args[3]))(*args, place(CT)), one_batch(masked))


NORMS = {
    "batch": jw.batch_norm,
    "layer": jw.layer_norm,
    "rms": lambda x, scale, bias, **o: jw.rms_norm(x, scale, **o),
    "group": lambda *a, **o: jw.group_norm(*a, n_groups=2, **o),
    "instance": jw.instance_norm,
}


@pytest.mark.parametrize(("name", "masked"), [("batch", False), *((name, True) for name in NORMS)])
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_sharded_arrays_in_a_plain_jit(name, masked, kind):
    def run(x, where, scale, bias, ct):
        f = lambda *args: NORMS[name](*args, where=where if masked else None)
        return value_and_pull(f, (x, scale, bias), ct)

    place = lambda a, spec=SPLIT: jax.device_put(a, NamedSharding(mesh(kind), spec))
    args = place(X), place(WHERE), place(SCALE, WHOLE), place(BIAS, WHOLE), place(CT)
    compiled = jax.jit(run).lower(*args).compile()
    assert "all-gather" not in compiled.as_text()
    close(compiled(*args), jax.jit(run)(X, WHERE, SCALE, BIAS, CT))


GROUPS = [[0, 3], [1, 2, 4], [5, 6, 7]]


def by_groups(f):
    """f on each group of devices as one batch, in the order of the devices."""

    def run(x):
        parts = x.reshape(8, 2, *x.shape[1:])
        out = jnp.zeros_like(parts)
        for group in GROUPS:
            rows = jnp.asarray(group)
            out = out.at[rows].set(f(parts[rows].reshape(-1, *x.shape[1:])).reshape(-1, *parts.shape[1:]))
        return out.reshape(x.shape)

    return run


@pytest.mark.parametrize("mapped", ["vmap", "shard_map"])
def test_groups_of_devices_are_batches_of_their_own(mapped):
    """Of any size; `jax.lax.psum` has no groups in either map."""
    norm = lambda x: jw.batch_norm(x, SCALE, BIAS, axis_name="d", axis_index_groups=GROUPS)
    if mapped == "vmap":
        each = lambda x: jax.vmap(norm, axis_name="d")(x.reshape(8, 2, *x.shape[1:])).reshape(x.shape)
    else:
        each = jax.shard_map(norm, mesh=mesh("Auto"), in_specs=SPLIT, out_specs=SPLIT)
    expected = by_groups(lambda x: jw.batch_norm(x, SCALE, BIAS))
    both = jax.jit(lambda x: [value_and_pull(f, (x,), CT) for f in (each, expected)])
    close(*both(X))


@pytest.mark.parametrize("name", ["layer", "rms", "group", "instance"])
def test_samples_split_over_devices(name):
    """The axis that is split is one that the norm reduces: features for layer norm, positions for the others."""
    axis = 2 if name in ("layer", "rms") else 1
    x, ct = (jnp.moveaxis(a, 0, axis) for a in (X, CT))
    scale, bias = (None, None) if axis == 2 else (SCALE, BIAS)
    f = lambda x, **o: NORMS[name](x, scale, bias, **o)
    spec = PartitionSpec(*[None] * axis, "d")
    each = jax.shard_map(lambda x: f(x, axis_name="d"), mesh=mesh("Auto"), in_specs=spec, out_specs=spec)
    close(*jax.jit(lambda x: [value_and_pull(g, (x,), ct) for g in (each, f)])(x))


@pytest.mark.parametrize("masked", [False, True])
def test_a_distant_mean_and_large_squares_over_a_mapped_axis(masked, optimizing):
    """As for one batch, to 2e-6 at a mean of 1e4, and where squares overflow; gradients too."""
    split = lambda a: a.reshape(8, 2, *a.shape[1:])
    norm = lambda x, where: jw.batch_norm(x, where=where if masked else None, axis_name="d", eps=0.0)
    each = lambda x: jax.vmap(norm, axis_name="d")(split(x), split(WHERE)).reshape(x.shape)
    run = jax.jit(lambda x, ct: value_and_pull.__wrapped__(each, (x,), ct), compiler_options=optimizing)
    where = np.broadcast_to(WHERE if masked else True, X.shape)
    ct = np.where(where, CT, 0)
    for shift, factor in ((1e4, 1.0), (0.0, 2.0**100), (0.0, 2.0**-100)):
        x = np.float32((np.float64(X) + shift) * factor)
        z = np.float64(x) - np.float64(x).mean((0, 1), where=where)
        deviation = np.sqrt((z**2).mean((0, 1), where=where))
        z = z / deviation
        slope = ct - ct.mean((0, 1), where=where) - z * (ct * z).mean((0, 1), where=where)
        y, gradient = run(x, ct)
        np.testing.assert_allclose(y, z, rtol=2e-6, atol=2e-6)
        np.testing.assert_allclose(np.float64(gradient) * deviation, np.where(where, slope, 0), rtol=1e-5, atol=1e-5)
