"""Sparse storage: exact round trips, byte counts, and products, against NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxweights as jw
from jaxweights.core.axes import ATTENTION_IN, ATTENTION_OUT, CONV, Reading, axes_or_default

LAYERS = {
    "dense": ((64, 24), None, "...i,io->...o"),
    "attention": ((16, 4, 8), ATTENTION_IN, "...i,iop->...op"),
    "attention out": ((4, 8, 24), ATTENTION_OUT, "...ij,ijo->...o"),
    "output first": ((6, 4, 8), jw.Axes(input=(1, 2), output=0), "...ij,oij->...o"),
    "outputs swapped": ((8, 3, 2), jw.Axes(input=0, output=(2, 1)), "...i,iop->...op"),
    "conv": ((3, 3, 8, 6), CONV, "...hwi,hwio->...o"),
    "vector": ((64,), None, "...i,i->..."),
}
FORMATS = {
    "pack": lambda w, mask=None, axes=None: jw.sparse.pack(w, mask, axes=axes),
    "pack_blocks": lambda w, mask=None, axes=None: jw.sparse.pack_blocks(w, mask, block=(4, 1), axes=axes),
    "to_bcoo": lambda w, mask=None, axes=None: jw.sparse.to_bcoo(w, mask, axes=axes),
    "to_csr": lambda w, mask=None, axes=None: jw.sparse.to_csr(w, mask, axes=axes),
}
every_format = pytest.mark.parametrize("store", FORMATS.values(), ids=FORMATS)
ours = pytest.mark.parametrize("name", ["pack", "pack_blocks"])


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def n_m_mask(shape, n=2, m=4, axes=None, seed=0):
    """Mask of at most n in every m rows of the matrix, at random positions, in the weight's shape."""
    axes = axes_or_default(axes, len(shape))
    rows, columns = axes.matrix(np.zeros(shape, np.float32)).shape[-2:]
    rng = np.random.default_rng(seed)
    order = np.argsort(rng.random((rows // m, m, columns)), axis=1)
    kept = (order < rng.integers(0, n + 1, (rows // m, 1, columns))).reshape(rows, columns)
    return np.asarray(axes.weight(jnp.asarray(kept), shape))


def block_mask(mask, axes=None):
    """Mask of the 4x1 blocks of the matrix with any kept entry."""
    axes = axes_or_default(axes, mask.ndim)
    matrix = np.asarray(axes.matrix(mask))
    return np.asarray(axes.weight(jnp.asarray(matrix.reshape(-1, 4, matrix.shape[1]).any(1).repeat(4, 0)), mask.shape))


def masked(w, mask):
    return np.where(mask, w, np.zeros((), w.dtype))


def sparse(*shape, axes=None, seed=0):
    return masked(normal(*shape, seed=seed), n_m_mask(shape, axes=axes, seed=seed))


def bits(a):
    a = np.asarray(a)
    return a.view(f"u{a.dtype.itemsize}")


# Round trips


@ours
def test_what_is_kept_comes_back_bit_for_bit(name):
    stored, expected = {}, {}
    for layer, (shape, axes, _) in LAYERS.items():
        w, mask = normal(*shape), n_m_mask(shape, axes=axes)
        kept = np.argwhere(mask)
        w[tuple(kept[0])], w[tuple(kept[1])] = -0.0, np.nan
        stored[layer], expected[layer] = FORMATS[name](jnp.asarray(w), jnp.asarray(mask), axes), masked(w, mask)
        assert stored[layer].shape == shape and stored[layer].dtype == w.dtype
    restored = jax.jit(lambda stored: {layer: s.todense() for layer, s in stored.items()})(stored)
    for layer, w in restored.items():
        np.testing.assert_array_equal(bits(w), bits(expected[layer]), err_msg=layer)


def test_any_pattern_packs():
    x, cases = normal(3, 480, seed=1), []
    for n, m, size, dtype in [
        (1, 2, 1, jnp.float32),
        (2, 3, 2, jnp.float32),
        (2, 4, 2, jnp.bfloat16),
        (2, 4, 2, jnp.float16),
        (3, 4, 2, jnp.float32),
        (3, 8, 4, jnp.float32),
        (7, 16, 4, jnp.bfloat16),
    ]:
        mask = n_m_mask((m * 10, 9), n, m)
        w = jnp.asarray(normal(m * 10, 9)).astype(dtype)
        packed = jw.sparse.pack(w, jnp.asarray(mask), (n, m))
        assert packed.nbytes == 10 * n * 9 * w.dtype.itemsize + -(-10 * n * size // 8) * 9
        cases.append((packed, masked(np.asarray(w), mask), x[:, : m * 10]))

    @jax.jit
    def run(cases):
        return [(packed.todense(), [jw.matmul(rows, packed) for rows in (x, x[:1])]) for packed, _, x in cases]

    for (packed, w, x), (restored, products) in zip(cases, run(cases), strict=True):
        name = f"{packed.n}:{packed.m} in {packed.dtype}"
        np.testing.assert_array_equal(bits(restored), bits(w), err_msg=name)
        expected = x.astype(np.float64) @ w.astype(np.float64)
        for y in products:
            np.testing.assert_allclose(y, expected[: len(y)], atol=1e-4, err_msg=name)


def test_the_codes_are_those_of_2_to_4_hardware():
    """Two-bit positions in the order of the values, the first in the lowest bits."""
    w = jnp.array([0, 2, 0, -1, 0, 0, 0, 3, 5, 0, 0, 0], jnp.float32)[:, None]
    packed = jw.sparse.pack(w)
    np.testing.assert_array_equal(packed.values[:, 0], [2, -1, 0, 3, 5, 0])
    np.testing.assert_array_equal(packed.codes[:, 0], [1 | 3 << 2 | 0 << 4 | 3 << 6, 0 | 1 << 2])


@every_format
def test_by_default_what_is_not_zero_is_kept(store):
    w = np.where(n_m_mask((16, 6)), normal(16, 6), np.float32(-0.0))
    w[tuple(np.argwhere(w)[0])] = np.nan
    np.testing.assert_array_equal(bits(store(jnp.asarray(w)).todense()), bits(np.where(w == 0, np.float32(0), w)))


def test_bytes_are_those_of_the_arrays():
    w = jnp.asarray(sparse(64, 64))
    assert jw.sparse.pack(w).nbytes == w.nbytes * 17 // 32
    assert jw.sparse.pack(w.astype(jnp.bfloat16)).nbytes == w.nbytes // 2 * 9 // 16
    corner = w.at[16:].set(0).at[:, 32:].set(0)
    assert jw.sparse.pack_blocks(corner, block=(16, 16)).nbytes == 2 * (16 * 16 * 4 + 4 + 4)


@pytest.mark.parametrize("block", [(4, 3), (16, 2), (3, 16)])
def test_blocks_that_do_not_divide_the_matrix(block):
    w = normal(10, 7) * np.kron(normal(5, 7, seed=1) > 0, np.ones((2, 1), np.float32))
    x = normal(4, 10, seed=2)

    @jax.jit
    def run(w, x):
        stored = jw.sparse.pack_blocks(w, block=block, n_blocks=9)
        return stored.todense(), x @ stored, x[0] @ stored

    dense, many, one = run(w, x)
    np.testing.assert_array_equal(bits(dense), bits(np.where(w == 0, np.float32(0), w)))
    np.testing.assert_allclose(many, np.float64(x) @ w, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(one, np.float64(x[0]) @ w, rtol=1e-5, atol=1e-5)


def test_the_exports_have_the_indices_of_numpy():
    w = masked(normal(40, 30), normal(40, 30, seed=1) > 1)
    rows, columns = np.nonzero(w)
    coordinates, compressed = jw.sparse.to_bcoo(jnp.asarray(w)), jw.sparse.to_csr(jnp.asarray(w))
    np.testing.assert_array_equal(coordinates.indices, np.stack([rows, columns], 1))
    np.testing.assert_array_equal(compressed.indices, columns)
    np.testing.assert_array_equal(compressed.indptr, np.cumsum([0, *(w != 0).sum(1)]))
    for stored in (coordinates, compressed):
        np.testing.assert_array_equal(stored.data, w[rows, columns])


# Products


products = jax.jit(lambda inputs, stored: jax.tree.map(lambda x: jw.matmul(x, stored), inputs))


@ours
def test_matmul(name):
    for layer, (shape, axes, spec) in LAYERS.items():
        w = sparse(*shape, axes=axes)
        stored = FORMATS[name](jnp.asarray(w), None, axes)
        inputs = [shape[a] for a in Reading.of(axes, shape).contracted]
        xs = [normal(*lead, *inputs, seed=1) for lead in ((), (2, 3), (0,))]
        for x, y in zip(xs, products(xs, stored), strict=True):
            expected = np.einsum(spec, x.astype(np.float64), w.astype(np.float64))
            assert y.shape == expected.shape
            np.testing.assert_allclose(y, expected, atol=1e-4, err_msg=f"{layer}, {x.shape}")


@pytest.mark.parametrize("export", [jw.sparse.to_bcoo, jw.sparse.to_csr])
def test_matmul_with_an_export(export):
    w = sparse(16, 4, 8, axes=ATTENTION_IN)
    stored = export(jnp.asarray(w), axes=ATTENTION_IN)
    xs = [normal(*lead, 16, seed=1) for lead in ((), (2, 3), (0,))]
    for x, y in zip(xs, products(xs, stored), strict=True):
        np.testing.assert_allclose(y, x.astype(np.float64) @ w.reshape(16, 32), atol=1e-4)


def test_the_operator_is_the_function():
    w, x = jnp.asarray(sparse(64, 32)), jnp.asarray(normal(5, 64, seed=1))
    for stored in (jw.sparse.pack(w), jw.sparse.pack_blocks(w, block=(4, 4)), jw.quantize(w, 8)):
        np.testing.assert_array_equal(x @ stored, jw.matmul(x, stored))


def test_one_row_in_many_tiles():
    w, x = sparse(512, 40), normal(1, 512, seed=1)
    y = jw.matmul(jnp.asarray(x), jw.sparse.pack(jnp.asarray(w)))
    np.testing.assert_allclose(y, x.astype(np.float64) @ w, atol=1e-4)


@every_format
def test_products_of_16_bits_add_up_in_float32(store):
    w = jnp.zeros((4096, 2), jnp.bfloat16).at[::2].set(1)
    for y in products([jnp.ones((rows, 4096), jnp.float16) for rows in (1, 2)], store(w)):
        assert y.dtype == jnp.float16
        np.testing.assert_array_equal(np.asarray(y, np.float32), 2048.0)


@every_format
@pytest.mark.parametrize("rows", [1, 5])
def test_gradients(store, rows):
    """With respect to x: g @ wᵀ. With respect to the stored values: xᵀ @ g at their positions."""
    w, x, g = sparse(256, 12), normal(rows, 256, seed=1), normal(rows, 12, seed=2)
    stored = store(jnp.asarray(w))
    leaves, structure = jax.tree.flatten(stored)
    (floating,) = (i for i, a in enumerate(leaves) if jnp.issubdtype(a.dtype, jnp.floating))

    def assemble(a):
        return jax.tree.unflatten(structure, [*leaves[:floating], a, *leaves[floating + 1 :]])

    def loss(x, a):
        return jnp.sum(jw.matmul(x, assemble(a)) * g)

    by_x, by_stored = jax.jit(jax.grad(loss, (0, 1)))(jnp.asarray(x), leaves[floating])
    np.testing.assert_allclose(by_x, g.astype(np.float64) @ w.T, atol=1e-4)
    # Zeros stored in a block or in an incomplete group also get gradients.
    dense = np.where(w != 0, assemble(by_stored).todense(), 0)
    np.testing.assert_allclose(dense, np.where(w != 0, x.T.astype(np.float64) @ g, 0), atol=1e-4)


# jit, vmap, stacks, and mismatches

SIZED = {
    "pack": jw.sparse.pack,
    "pack_blocks": lambda w: jw.sparse.pack_blocks(w, block=(4, 1), n_blocks=24),
    "to_bcoo": lambda w: jw.sparse.to_bcoo(w, nse=48),
    "to_csr": lambda w: jw.sparse.to_csr(w, nse=48),
}


@pytest.mark.parametrize("store", SIZED.values(), ids=SIZED)
def test_jit_and_vmap(store):
    ws, x = np.stack([sparse(16, 6, seed=i) for i in range(3)]), normal(3, 2, 16, seed=9)
    stored = jax.jit(jax.vmap(store))(ws)
    if store is not SIZED["to_csr"]:  # JAX has no batching rule for its todense
        np.testing.assert_array_equal(jax.jit(jax.vmap(lambda s: s.todense()))(stored), ws)
    y = jax.jit(jax.vmap(jw.matmul))(x, stored)
    np.testing.assert_allclose(y, x.astype(np.float64) @ ws, atol=1e-5)


def test_a_stack_and_the_groups_of_a_convolution_pack_as_one():
    stack = np.stack([sparse(16, 6, seed=i) for i in range(3)])
    np.testing.assert_array_equal(jw.sparse.pack(jnp.asarray(stack), axes=jw.Axes(batch=0)).todense(), stack)
    grouped = sparse(3, 3, 8, 12)
    np.testing.assert_array_equal(jw.sparse.pack(jnp.asarray(grouped), axes=jw.axes.depthwise(4)).todense(), grouped)


def test_what_does_not_fit_under_jit_is_nan():
    w = jnp.ones((8, 2)).at[4:].set(0)
    packed = jax.jit(jw.sparse.pack)(w).todense()
    assert np.isnan(packed[:4]).any() and not np.isnan(packed[4:]).any()
    for store in (
        lambda w: jw.sparse.pack_blocks(w, block=(2, 2), n_blocks=1),
        lambda w: jw.sparse.to_bcoo(w, nse=7),
        lambda w: jw.sparse.to_csr(w, nse=7),
    ):
        assert np.isnan(jax.jit(store)(w).todense()).any()


@every_format
def test_nothing_kept_and_nothing_there(store):
    for shape in ((8, 4), (0, 4), (8, 0)):
        stored = store(jnp.zeros(shape))
        np.testing.assert_array_equal(stored.todense(), np.zeros(shape))
        for y in products([np.ones((rows, shape[0]), np.float32) for rows in (1, 3)], stored):
            np.testing.assert_array_equal(y, np.zeros((len(y), shape[1])))


def test_a_type_of_ones_own_multiplies():
    @dataclasses.dataclass
    class Diagonal:
        values: jax.Array

        shape = property(lambda self: (len(self.values),) * 2)
        dtype = property(lambda self: self.values.dtype)

        def todense(self):
            return jnp.diag(self.values)

        def __rmatmul__(self, x):
            return x * self.values

    np.testing.assert_array_equal(jw.matmul(jnp.ones(2), Diagonal(jnp.array([2.0, 3.0]))), [2, 3])
