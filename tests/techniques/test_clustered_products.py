"""Products with a `ClusteredArray`: values, gradients, loops, meshes, devices and memory, against NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import export
from stored_weights import clusters, dense_of, error
from x64 import enable_x64

import jaxweights as jw


@pytest.mark.parametrize("rows", [100, pytest.param(4500, marks=pytest.mark.slow)])
def test_products_are_those_with_the_weight(rows):
    columns, rng = 70 if rows == 100 else 300, np.random.default_rng(1)
    made = {}
    for k in (1, 5, 16, 33, 256):
        for units in ((), (columns,)):
            pair = clusters((rows, columns), k, units=units, zeros=k not in (16, 256))
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
        codebook, index = clusters((80, columns), k, units=units, zeros=True)
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
    pairs = {name: clusters(shape, 6, zeros=True) for name, shape in shapes.items()}
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
        codebook, index = clusters((4, 64, 64), k, units=units)
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
    codebook, index = clusters((200, 8), 40)
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


def test_products_inside_a_shard_map():
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("x",))
    x, (codebook, index) = jnp.cos(jnp.arange(8 * 64.0)).reshape(8, 64), clusters((64, 8), 40)
    local = jax.shard_map(jw.matmul, mesh=mesh, in_specs=(jax.P("x"), jax.P()), out_specs=jax.P("x"))
    y = jax.jit(local)(x, jw.store_clusters(codebook, index))
    assert error(y, x, dense_of(codebook, index)) < 1e-6


# Devices and memory


def test_one_export_serves_all_platforms():
    for k in (16, 200):
        codebook, index = clusters((128, 64), k)
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
    q = jax.eval_shape(lambda: jw.store_clusters(*map(jnp.asarray, clusters((2048, 2048), 64)), has_zeros=False))
    f = jax.jit(lambda h, q: jax.lax.scan(lambda h, _: (jnp.tanh(h @ q), None), h, None, length=20)[0])
    memory = f.lower(jax.ShapeDtypeStruct((4, 2048), jnp.float32), q).compile(optimizing).memory_analysis()
    assert memory.temp_size_in_bytes < 8 * 2**20  # half of the weight in float32
