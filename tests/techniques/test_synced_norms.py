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
