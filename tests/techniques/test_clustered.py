"""`ClusteredArray` as a weight and as a pytree, against the codebook and the index it is made of."""

import copy
import dataclasses
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from stored_weights import READINGS, clusters, dense_of, error, floats_of_size, slow_unless

import jaxweights as jw
from jaxweights.core.axes import Reading

MOST = ("dense", "out-projection of heads", "depthwise stack")


def unit_of(axes, shape):
    """The number of the output unit of each entry, counted along (*batch, *output)."""
    r = Reading.of(axes, shape)
    order = (*sorted(r.batch), *r.output)
    units = np.arange(np.prod([shape[a] for a in order])).reshape([shape[a] for a in order])
    places = np.argsort(order)
    return np.expand_dims(units.transpose(places), r.contracted), units.size


def weights(shape, axes):
    """{name: (stored, dense)}: one codebook, one for each unit, one for each of a stack; with and without zeros."""
    unit, n_units = unit_of(axes, shape)
    batch = tuple(shape[a] for a in sorted(Reading.of(axes, shape).batch))
    made = {}
    for k, zeros in ((5, True), (33, False)):
        made[f"{k}"] = clusters(shape, k, zeros=zeros), 0
        made[f"{k} for each unit"] = clusters(shape, k, units=(n_units,), zeros=zeros), unit
        if batch:
            made[f"{k} for each layer"] = clusters(shape, k, units=batch, zeros=zeros), unit // (n_units // batch[0])
    return {name: (jw.store_clusters(*pair, axes=axes), dense_of(*pair, unit)) for name, (pair, unit) in made.items()}


@pytest.mark.parametrize("reading", [slow_unless(name in MOST, name) for name in READINGS])
def test_it_is_the_weight_of_codebook_and_index(reading):
    """The weight, its transposes, another dtype, its rows and columns."""
    shape, axes = READINGS[reading]
    made = weights(shape, axes)
    permutation, index = (*range(1, len(shape)), 0), jnp.array([[1, 0], [shape[0] - 1, 1]])

    @jax.jit
    def run(stored):
        out = {}
        for name, q in stored.items():
            moved, some = q.transpose(permutation), q.take(index)
            out[name] = q.todense(), None if moved is None else moved.todense(), some, q.astype(jnp.bfloat16).todense()
        return out

    r = Reading.of(axes, shape)
    rows_move, is_table = 0 in r.contracted and len(r.contracted) > 1, (0,) in (r.contracted, r.output)
    for name, (found, moved, some, half) in run({name: q for name, (q, _) in made.items()}).items():
        q, expected = made[name]
        assert q.shape == shape and q.dtype == jnp.float32
        np.testing.assert_array_equal(found, expected, err_msg=name)
        np.testing.assert_array_equal(half, jnp.asarray(expected, jnp.bfloat16))
        assert (moved is None, some is None) == (rows_move, not is_table or bool(r.batch))
        if moved is not None:
            np.testing.assert_array_equal(moved, expected.transpose(permutation))
        if some is not None:
            np.testing.assert_array_equal(some, expected[index])


def test_codes_take_as_few_bits_as_they_can():
    for k, zeros, bits in ((1, False, 1), (1, True, 1), (2, True, 2), (16, False, 4), (16, True, 5), (255, True, 8)):
        q = jw.store_clusters(*clusters((320, 4), k, zeros=zeros))
        assert (q.bits, q.words.nbytes, q.nbytes) == (bits, 320 * 4 * bits // 8, 320 * 4 * bits // 8 + 4 * k)
    # −1 is looked up, or is told where values are not known.
    codebook, index = clusters((24, 6), 16)
    assert not jw.store_clusters(codebook, index).has_zeros
    assert jax.jit(lambda c, i: jw.store_clusters(c, i, has_zeros=True))(codebook, index).bits == 5
    assert repr(jw.store_clusters(codebook, index)) == "ClusteredArray(24×6 float32 of 16 values; 136 bytes)"


def test_no_code_reads_beyond_the_codebook():
    codebook, index = clusters((32, 2), 5, zeros=True)
    q = jw.store_clusters(codebook, index)
    codes = jnp.asarray(np.arange(64).reshape(32, 2) % 8)
    every = dataclasses.replace(q, words=jw.formats.pack(codes, 3))
    expected = np.array([*codebook, 0, np.nan, np.nan], np.float32)[np.asarray(codes)]
    np.testing.assert_array_equal(every.todense(), expected)
    np.testing.assert_array_equal(every.take(jnp.arange(32)), expected)
    assert np.isnan(jnp.ones(32) @ every).all()
    # Under jit, an index that is out of range cannot raise.
    assert np.isnan(jax.jit(lambda c, i: jw.store_clusters(c, i + 1, has_zeros=True))(codebook, index).codebook).all()


@jax.jit
def third_of_each(stacks):
    return {name: jax.tree.map(lambda a: a[2], stack).todense() for name, stack in stacks.items()}


def test_the_first_axis_becomes_one_of_a_stack():
    """Where a slice is whole words, so that a loop over it sees codes."""
    for shape, axes, fits in (
        ((3, 32, 4), jw.Axes(input=1, output=2, window=0), True),
        ((3, 5, 4), jw.Axes(input=1, output=2, window=0), False),
        ((3, 24, 4), jw.Axes(input=1, output=(0, 2)), True),
        ((3, 3, 4, 6), jw.axes.depthwise(3), False),
    ):
        r = Reading.of(axes, shape)
        left = [tuple(a for a in of if a != 0) for of in (r.input, r.output, r.window)]
        as_stack = jw.Axes(left[0], left[1], 0, left[2], r.groups)
        made = weights(shape, axes)
        stacks = {name: q.read_as(as_stack) for name, (q, _) in made.items()}
        assert all((stack is not None) == fits for stack in stacks.values())
        if fits:
            for name, found in third_of_each(stacks).items():
                np.testing.assert_array_equal(found, made[name][1][2])


# A pytree


def bits(tree):
    return [(a.dtype, np.asarray(a).tobytes()) for a in jax.tree.leaves(tree)]


def same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected) and bits(found) == bits(expected)


def test_copies_are_the_same_bit_for_bit(tmp_path):
    """pickle, copy.deepcopy, tree.map, jit with and without donation, and Orbax."""
    tree = {name: q for name, (q, _) in weights((2, 24, 6), jw.Axes(batch=0)).items()}
    for copied in (pickle.loads(pickle.dumps(tree)), copy.deepcopy(tree), jax.tree.map(lambda a: a + 0, tree)):
        same(copied, tree)
    given = jax.tree.map(jnp.copy, tree)
    same(jax.jit(lambda tree: tree, donate_argnums=0)(given), tree)
    assert all(a.is_deleted() for a in jax.tree.leaves(given))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "orbax", tree)
        checkpointer.wait_until_finished()
        same(checkpointer.restore(tmp_path / "orbax", jax.tree.map(ocp.utils.to_shape_dtype_struct, tree)), tree)
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree["5"])]
    assert names == [".words", ".codebook"]  # checkpoints are read by them


@pytest.mark.parametrize("axis", [0, 1])
def test_codes_may_be_sharded_along_any_axis(axis):
    mesh, explicit = (jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType[t],)) for t in ("Auto", "Explicit"))
    x, made = jnp.cos(jnp.arange(3 * 512.0)).reshape(3, 512), {}
    for k, units in ((16, ()), (64, ()), (40, (64,))):
        codebook, index = clusters((512, 64), k, units=units)
        made[f"{k}"] = jw.store_clusters(codebook, index), dense_of(codebook, index, np.arange(64) if units else 0)

    def place(a, mesh):
        spec = [None] * a.ndim
        spec[axis] = "x" if a.shape[axis] % 8 == 0 else None
        return jax.device_put(a, NamedSharding(mesh, PartitionSpec(*spec)))

    placed = {name: jax.tree.map(lambda a: place(a, mesh), q) for name, (q, _) in made.items()}
    assert all(q.words.sharding.shard_shape(q.words.shape)[axis] * 8 == q.words.shape[axis] for q in placed.values())

    @jax.jit
    def run(x, stored):
        of_codebooks = lambda c: {n: x @ dataclasses.replace(q, codebook=c[n]) for n, q in stored.items()}
        y, back = jax.vjp(of_codebooks, {n: q.codebook for n, q in stored.items()})
        return y, back(y)[0], jax.grad(lambda x: sum(jnp.sum(x @ q) for q in stored.values()))(x)

    explicitly = {name: jax.tree.map(lambda a: place(a, explicit), q) for name, (q, _) in made.items()}
    for name, y in jax.jit(lambda x, stored: {n: x @ q for n, q in stored.items()})(x, explicitly).items():
        assert error(y, x, made[name][1]) < 1e-6
    y, of_codebooks, of_x = run(x, placed)
    assert error(of_x, jnp.ones((3, 192)), np.concatenate([dense for _, dense in made.values()], 1).T) < 1e-6
    for name, (q, dense) in made.items():
        assert error(y[name], x, dense) < 1e-6
        expected = jax.grad(lambda c, q=q: jnp.sum((x @ dataclasses.replace(q, codebook=c)) ** 2 / 2))(q.codebook)
        np.testing.assert_allclose(of_codebooks[name], expected, rtol=1e-4, atol=1e-3)


def test_only_rows_that_are_looked_up_become_floats():
    ids = jnp.array([[3, 500], [0, 1]])
    f = lambda table, ids: (jnp.take(table, ids, axis=0), jax.vmap(lambda i: table[i])(ids[0]))
    for axes in (None, jw.Axes(input=-1, output=-2)):
        codebook, index = clusters((512, 16), 40)
        q = jw.store_clusters(codebook, index, axes=axes)
        with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
            assert not floats_of_size(jw.with_stored(f), 512, q, ids)
        for found, expected in zip(jax.jit(jw.with_stored(f))(q, ids), (ids, ids[0]), strict=True):
            np.testing.assert_array_equal(found, dense_of(codebook, index)[expected])
