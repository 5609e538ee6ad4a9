"""The layers of stored stacks, against slices of the weights that were stored."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxweights as jw
from jaxweights.core.axes import Reading, axes_or_default
from jaxweights.core.layer import Layer, transpose

READINGS = {
    "dense": ((4, 3), None),
    "vector": ((4,), None),
    "conv": ((2, 2, 4, 3), jw.axes.CONV),
    "attention, outputs swapped": ((4, 2, 3), jw.Axes(input=0, output=(2, 1))),
    "stack": ((5, 4, 3), jw.Axes(batch=0)),
    "stack in the middle": ((4, 5, 3), jw.Axes(input=0, output=2, batch=1)),
    "stack behind": ((4, 3, 5), jw.Axes(input=0, output=1, batch=2)),
    "two stacks": ((6, 4, 5, 3), jw.Axes(input=1, output=-1, batch=(2, 0))),
    "depthwise stack": ((5, 3, 3, 1, 6), jw.axes.depthwise(6).stacked()),
}


def ordered(axes, shape):
    """The same reading, with its batch axes in the order of the array."""
    return dataclasses.replace(axes_or_default(axes, len(shape)), batch=tuple(sorted(Reading.of(axes, shape).batch)))


@pytest.mark.parametrize("name", READINGS)
def test_a_layer_knows_its_stack(name):
    """Its shape and its matrices are those of the weight, however many batch axes were sliced off or stacked."""
    shape, axes = READINGS[name]
    w = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    layer, matrices = Layer.of(axes, shape), ordered(axes, shape).matrix(w)
    batch = sorted(Reading.of(axes, shape).batch)
    sizes = [shape[a] for a in batch]

    def check(w, sizes, matrices):
        found_shape, found = layer.with_batch(sizes)
        assert found_shape == w.shape
        np.testing.assert_array_equal(found.matrix(w), matrices)

    check(np.stack([w, 2 * w]), [2, *sizes], np.stack([matrices, 2 * matrices]))
    for n in range(len(batch) + 1):
        sliced = w
        for a in reversed(batch[:n]):
            sliced = sliced.take(1, a)
        check(sliced, sizes[n:], matrices[(1,) * n])


@pytest.mark.parametrize("name", ["conv", "stack in the middle", "depthwise stack"])
def test_a_transposed_weight_is_read_as_the_same_matrices(name):
    shape, axes = READINGS[name]
    r, n = Reading.of(axes, shape), len(shape)
    for permutation in itertools.islice(itertools.permutations(range(n)), 1, None, 7):
        moved = Reading.of(transpose(axes, shape, permutation), [shape[a] for a in permutation])
        for role in ("input", "output", "batch", "window"):
            assert [permutation[a] for a in getattr(moved, role)] == list(getattr(r, role))


def sparse_stack(shape, axes):
    """At most two of every four rows of each matrix."""
    w = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    rows = axes.matrix(w)
    return np.asarray(axes.weight(rows * (jnp.arange(rows.shape[-2]) % 4 < 2)[:, None], shape))


def clustered(w, axes):
    values, index = np.unique(w, return_inverse=True)
    return jw.store_clusters(values, index.reshape(w.shape), axes=axes)


STORES = {
    "quantize": lambda w, axes: jw.quantize(w, 8, axes=axes),
    "pack": lambda w, axes: jw.sparse.pack(w, axes=axes),
    "pack_blocks": lambda w, axes: jw.sparse.pack_blocks(w, block=(2, 2), axes=axes),
    "store_clusters": lambda w, axes: clustered(w, axes),
}


@pytest.mark.parametrize("store", STORES)
def test_a_stored_stack_is_sliced_and_stacked_by_jax(store):
    shape, axes = (3, 8, 4), jw.Axes(batch=0)
    w, x = sparse_stack(shape, axes), np.random.default_rng(1).normal(size=(3, 2, 8)).astype(np.float32)
    stored = STORES[store](jnp.asarray(w), axes)
    one = jax.tree.map(lambda a: a[1], stored)
    again = jax.tree.map(lambda a: jnp.stack([a, a]), one)
    assert (stored.shape, one.shape, again.shape) == ((3, 8, 4), (8, 4), (2, 8, 4))
    assert Reading.of(one.axes, one.shape).batch == () and Reading.of(again.axes, again.shape).batch == (0,)

    @jax.jit
    def run(stored, one, x):
        _, layers = jax.lax.scan(lambda _, s: (None, s.todense()), None, stored)
        return stored.todense(), layers, one.todense(), jax.vmap(jw.matmul)(x, stored)

    dense, layers, second, y = run(stored, one, x)
    tolerance = np.abs(w).max() / 250 if store == "quantize" else 0
    np.testing.assert_allclose(dense, w, rtol=0, atol=tolerance)
    np.testing.assert_array_equal(layers, dense)
    np.testing.assert_array_equal(second, dense[1])
    np.testing.assert_allclose(y, x.astype(np.float64) @ np.float64(dense), atol=1e-4)


@pytest.mark.parametrize("store", ["pack", "pack_blocks"])
def test_the_arrays_of_a_stack_have_its_batch_axes_in_front(store):
    shape, axes = (6, 8, 5, 4), jw.Axes(input=1, output=3, batch=(2, 0))
    w = sparse_stack(shape, axes)
    stored = STORES[store](jnp.asarray(w), axes)
    np.testing.assert_array_equal(stored.todense(), w)
    sliced = jax.tree.map(lambda a: a[4], stored)
    assert sliced.shape == (8, 5, 4)
    np.testing.assert_array_equal(sliced.todense(), w[4])
    np.testing.assert_array_equal(jax.tree.map(lambda a: a[2], sliced).todense(), w[4, :, 2])
    moved = stored.transpose((2, 3, 0, 1))
    np.testing.assert_array_equal(moved.todense(), w.transpose(2, 3, 0, 1))
    np.testing.assert_array_equal(jax.tree.map(lambda a: a[3], moved).todense(), w[:, :, 3].transpose(2, 0, 1))


def test_rows_do_not_change_places():
    w = sparse_stack((4, 8, 3), jw.axes.ATTENTION_OUT)
    packed = jw.sparse.pack(jnp.asarray(w), axes=jw.axes.ATTENTION_OUT)
    assert packed.transpose((1, 0, 2)) is None
    np.testing.assert_array_equal(packed.transpose((2, 0, 1)).todense(), w.transpose(2, 0, 1))
