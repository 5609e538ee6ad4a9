"""`ClusteredArray` as a weight, as a pytree and in products, against the codebook and the index it is made of."""

import copy
import dataclasses
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax import export
from jax.sharding import NamedSharding, PartitionSpec
from stored_weights import floats_of_size
from x64 import enable_x64

import jaxweights as jw
from jaxweights.core.axes import Reading

# Weights


def shared(shape, k, *, units=(), zeros=False, seed=0):
    """(codebook, index) with every value in use, and zeros if they are asked for."""
    rng = np.random.default_rng(seed)
    index = rng.permutation(np.arange(np.prod(shape)) % (k + zeros)).reshape(shape) - zeros
    return rng.normal(size=(*units, k)).astype(np.float32), index


def dense_of(codebook, index, unit=0):
    """The weight in NumPy; `unit` numbers the codebook of each entry."""
    books = codebook.reshape(-1, codebook.shape[-1])
    return np.where(index < 0, 0, books[np.broadcast_to(unit, index.shape), index])


def slow_unless(quick, *values):
    return pytest.param(*values, marks=() if quick else pytest.mark.slow)


MOST = ("dense", "out-projection of heads", "depthwise stack")
READINGS = {
    "dense": ((24, 6), None),
    "output first": ((6, 24), jw.Axes(input=1, output=0)),
    "stack behind": ((24, 6, 2), jw.Axes(input=0, output=1, batch=2)),
    "heads": ((24, 2, 3), jw.axes.ATTENTION_IN),
    "out-projection of heads": ((2, 12, 6), jw.axes.ATTENTION_OUT),
    "depthwise stack": ((2, 3, 3, 4, 6), jw.axes.depthwise(3).stacked()),
}


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
        made[f"{k}"] = shared(shape, k, zeros=zeros), 0
        made[f"{k} for each unit"] = shared(shape, k, units=(n_units,), zeros=zeros), unit
        if batch:
            made[f"{k} for each layer"] = shared(shape, k, units=batch, zeros=zeros), unit // (n_units // batch[0])
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
        q = jw.store_clusters(*shared((320, 4), k, zeros=zeros))
        assert (q.bits, q.words.nbytes, q.nbytes) == (bits, 320 * 4 * bits // 8, 320 * 4 * bits // 8 + 4 * k)
    # −1 is looked up, or is told where values are not known.
    codebook, index = shared((24, 6), 16)
    assert not jw.store_clusters(codebook, index).has_zeros
    assert jax.jit(lambda c, i: jw.store_clusters(c, i, has_zeros=True))(codebook, index).bits == 5
    assert repr(jw.store_clusters(codebook, index)) == "ClusteredArray(24×6 float32 of 16 values; 136 bytes)"


def test_no_code_reads_beyond_the_codebook():
    codebook, index = shared((32, 2), 5, zeros=True)
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


# Products


def error(y, x, dense):
    """The largest error of x @ w in units of |x| @ |w|: a float32 sum of K products errs by K·2^-24 at most."""
    x, dense = np.asarray(x, np.float64), np.asarray(dense, np.float64)
    return np.max(np.abs(np.asarray(y, np.float64) - x @ dense) / (np.abs(x) @ np.abs(dense) + 1e-30), initial=0)


@pytest.mark.parametrize("rows", [100, pytest.param(4500, marks=pytest.mark.slow)])
def test_products_are_those_with_the_weight(rows):
    columns, rng = 70 if rows == 100 else 300, np.random.default_rng(1)
    made = {}
    for k in (1, 5, 16, 33, 256):
        for units in ((), (columns,)):
            pair = shared((rows, columns), k, units=units, zeros=k not in (16, 256))
            made[f"{k} {units}"] = jw.store_clusters(*pair), dense_of(*pair, np.arange(columns) if units else 0)
    xs = [rng.normal(size=(m, rows)).astype(np.float32) for m in (1, 2, 9)]
    products = jax.jit(lambda xs, stored: {name: [x @ q for x in xs] for name, q in stored.items()})
    for name, found in products(xs, {name: q for name, (q, _) in made.items()}).items():
        for x, y in zip(xs, found, strict=True):
            assert error(y, x, made[name][1]) < 1e-6, name


def test_gradients_are_those_of_the_shared_weight():
    """In x and in the codebook: a value sums what its members receive, and zeros stay zeros."""
    rng, columns = np.random.default_rng(2), 5
    x, dy = rng.normal(size=(3, 80)).astype(np.float32), rng.normal(size=(3, columns)).astype(np.float32)
    dx = rng.normal(size=(3, 80)).astype(np.float32)
    for k, units in ((5, ()), (40, (columns,))):
        codebook, index = shared((80, columns), k, units=units, zeros=True)
        q = jw.store_clusters(codebook, index)
        dense = dense_of(codebook, index, np.arange(columns) if units else 0)
        change = dataclasses.replace(q, words=np.zeros(q.words.shape, jax.dtypes.float0), codebook=0 * q.codebook + 1)

        @jax.jit
        def derivatives(q, change, x, dy, dx):
            product = lambda x, c: x @ dataclasses.replace(q, codebook=c)
            y, back = jax.vjp(product, x, q.codebook)
            each = jax.vmap(lambda x, dy: jax.vjp(lambda x: x @ q, x)[1](dy)[0])(x, dy)
            of_dense = jax.grad(lambda c: jnp.sum(dataclasses.replace(q, codebook=c).todense() * (x.T @ dy)))(
                q.codebook
            )
            return y, *back(dy), each, of_dense, jax.jvp(product, (x, q.codebook), (dx, change.codebook))[1]

        y, of_x, of_codebook, each, of_dense, forward = derivatives(q, change, x, dy, dx)
        assert error(y, x, dense) < 1e-6
        assert error(of_x, dy, dense.T) < 1e-6 and error(each, dy, dense.T) < 1e-6
        ones = (index >= 0).astype(np.float64)
        np.testing.assert_allclose(forward, dx @ dense + x @ ones, rtol=1e-4, atol=1e-4)
        of_w, expected = np.float64(x).T @ np.float64(dy), np.zeros((k, columns))
        np.add.at(expected, (index, np.broadcast_to(np.arange(columns), index.shape)), of_w * ones)
        expected = expected if units else expected.sum(1, keepdims=True)
        for found in (of_codebook, of_dense):
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_a_codebook_is_fine_tuned_while_it_is_stored():
    """In a convolution and a dense layer, by any optimizer; what is 0 stays 0."""
    rng = np.random.default_rng(3)
    shapes = {"conv": (3, 3, 2, 4), "dense": (4, 3)}
    pairs = {name: shared(shape, 6, zeros=True) for name, shape in shapes.items()}
    stored = {name: jw.store_clusters(*pair) for name, pair in pairs.items()}
    x, target = jnp.asarray(rng.normal(size=(8, 6, 6, 2)), jnp.float32), jnp.asarray(rng.normal(size=(8, 3)))

    def model(params, x):
        y = jax.lax.conv_general_dilated(x, params["conv"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return jnp.tanh(y).mean((1, 2)) @ params["dense"]

    def loss(params, f):
        return jnp.mean((f(params, x) - target) ** 2)

    tx = optax.adam(0.05)

    def train(f, weights_of):
        def step(carry, _):
            codebooks, state = carry
            value, gradient = jax.value_and_grad(lambda c: loss(weights_of(c), f))(codebooks)
            updates, state = tx.update(gradient, state)
            return (optax.apply_updates(codebooks, updates), state), value

        start = {name: q.codebook for name, q in stored.items()}
        (codebooks, _), losses = jax.lax.scan(step, (start, tx.init(start)), length=20)
        return weights_of(codebooks), losses

    @jax.jit
    def run(indices):
        shared = lambda c: {name: jw.share(c[name][:, 0], index) for name, index in indices.items()}
        in_place = lambda c: {name: dataclasses.replace(q, codebook=c[name]) for name, q in stored.items()}
        return train(jw.with_stored(model), in_place), train(model, shared)

    (trained, losses), (expected, losses_of_arrays) = run({name: index for name, (_, index) in pairs.items()})
    np.testing.assert_allclose(losses, losses_of_arrays, rtol=1e-3)
    assert losses[-1] < 0.9 * losses[0]
    for name, q in trained.items():
        np.testing.assert_allclose(q.todense(), expected[name], rtol=1e-3, atol=1e-3)
        zeros = np.asarray(stored[name].todense()) == 0
        assert zeros.any() and np.array_equal(np.asarray(q.todense()) == 0, zeros)


def test_stacks_are_multiplied_in_vmap_and_scan():
    x, axes = np.random.default_rng(0).normal(size=(4, 3, 64)).astype(np.float32), jw.Axes(batch=0)
    for k, units in ((16, ()), (40, (4,))):
        codebook, index = shared((4, 64, 64), k, units=units)
        which = np.arange(np.prod(units, dtype=int)).reshape(4, 1, -1) if units else 0
        stack, dense = jw.store_clusters(codebook / 8, index, axes=axes), dense_of(codebook / 8, index, which)

        @jax.jit
        def run(stack, x):
            both = jax.vmap(jw.matmul)(x, stack)
            weights = jax.vmap(jw.matmul, in_axes=(None, 0))(x[0], stack)
            chain = lambda x: jax.lax.scan(lambda h, q: (h @ q, None), x, stack)[0]
            return both, weights, chain(x[0]), jax.grad(lambda x: jnp.sum(chain(x)))(x[0])

        product = np.linalg.multi_dot(list(np.float64(dense)))
        expected = x @ dense, x[0] @ dense, x[0] @ product, np.ones((3, 64)) @ product.T
        for found, right in zip(run(stack, x), expected, strict=True):
            np.testing.assert_allclose(found, right, rtol=1e-4, atol=1e-4)


def test_dtypes_of_x():
    codebook, index = shared((200, 8), 40)
    q, dense, x = (
        jw.store_clusters(codebook, index),
        dense_of(codebook, index),
        jnp.cos(jnp.arange(400.0)).reshape(2, 200),
    )
    half = x.astype(jnp.bfloat16)
    y = jax.jit(jw.matmul)(half, q)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float64(y), np.float64(half) @ dense, rtol=2**-7, atol=1e-4)
    with enable_x64():
        x64 = jnp.asarray(np.asarray(x, np.float64))
        y = jax.jit(jw.matmul)(x64, q)
        assert y.dtype == jnp.float64 and error(y, x64, dense) < 1e-14
    with jax.disable_jit():
        assert error(x @ q, x, dense) < 1e-6


@pytest.mark.parametrize("shape", [(0, 3), (5, 0)])
def test_empty_matrices(shape):
    q = jw.store_clusters(jnp.ones(2), jnp.zeros(shape, jnp.int8))
    assert q.todense().shape == shape
    for m in (0, 1, 9):
        y = jnp.ones((m, shape[0])) @ q
        assert y.shape == (m, shape[1]) and not np.any(y)


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
        codebook, index = shared((512, 64), k, units=units)
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


def test_products_inside_a_shard_map():
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("x",))
    x, (codebook, index) = jnp.cos(jnp.arange(8 * 64.0)).reshape(8, 64), shared((64, 8), 40)
    local = jax.shard_map(jw.matmul, mesh=mesh, in_specs=(jax.P("x"), jax.P()), out_specs=jax.P("x"))
    y = jax.jit(local)(x, jw.store_clusters(codebook, index))
    assert error(y, x, dense_of(codebook, index)) < 1e-6


# Devices and memory


def test_one_export_serves_all_platforms():
    for k in (16, 200):
        codebook, index = shared((128, 64), k)
        q, x = jw.store_clusters(codebook, index), jnp.ones((1, 128))
        exported = export.export(jax.jit(jw.matmul), platforms=["cpu", "tpu", "cuda"])(x, q)
        assert exported.platforms == ("cpu", "tpu", "cuda")
        assert error(exported.call(x, q), x, dense_of(codebook, index)) < 1e-6


def lowered_products(m, k, side=4096):
    abstract = jax.ShapeDtypeStruct
    store = lambda codebook, index: jw.store_clusters(codebook, index, has_zeros=False)
    q = jax.eval_shape(store, abstract((k,), jnp.float32), abstract((side, side), jnp.int16))
    x = abstract((m, side), jnp.float32)
    return jax.jit(jw.matmul).lower(x, q), jax.jit(jax.grad(lambda x, q: jnp.sum((x @ q) ** 2))).lower(x, q)


@pytest.mark.parametrize("m", [1, pytest.param(128, marks=pytest.mark.slow)])
@pytest.mark.parametrize("k", [64, pytest.param(16, marks=pytest.mark.slow), pytest.param(256, marks=pytest.mark.slow)])
def test_no_dense_weight_is_made(k, m, optimizing):
    product, gradient = lowered_products(m, k)
    limit = 8 * 2**20  # 1/8 of the weight in float32
    assert product.compile(optimizing).memory_analysis().temp_size_in_bytes <= limit
    assert gradient.compile(optimizing).memory_analysis().temp_size_in_bytes <= 2 * limit


def test_a_loop_with_the_same_weight_does_not_look_it_up_ahead(optimizing):
    q = jax.eval_shape(lambda: jw.store_clusters(*map(jnp.asarray, shared((1024, 1024), 64)), has_zeros=False))
    f = jax.jit(lambda h, q: jax.lax.scan(lambda h, _: (jnp.tanh(h @ q), None), h, None, length=20)[0])
    memory = f.lower(jax.ShapeDtypeStruct((4, 1024), jnp.float32), q).compile(optimizing).memory_analysis()
    assert memory.temp_size_in_bytes < 2 * 2**20  # half of the weight in float32


def test_only_rows_that_are_looked_up_become_floats():
    ids = jnp.array([[3, 500], [0, 1]])
    f = lambda table, ids: (jnp.take(table, ids, axis=0), jax.vmap(lambda i: table[i])(ids[0]))
    for axes in (None, jw.Axes(input=-1, output=-2)):
        codebook, index = shared((512, 16), 40)
        q = jw.store_clusters(codebook, index, axes=axes)
        with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
            assert not floats_of_size(jw.with_stored(f), 512, q, ids)
        for found, expected in zip(jax.jit(jw.with_stored(f))(q, ids), (ids, ids[0]), strict=True):
            np.testing.assert_array_equal(found, dense_of(codebook, index)[expected])
