"""Sharing by place: patterns, their products, a codebook for each output unit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from jax import lax

import jaxweights as jw
from jaxweights import sharing


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def summed_over_members(index, gradient, n):
    """The sum of the gradients of the positions that share each value, one by one."""
    total = np.zeros(n)
    for i, g in zip(np.ravel(index), np.ravel(gradient), strict=True):
        if i >= 0:
            total[i] += g
    return total


def toeplitz(c, shape):
    return scipy.linalg.toeplitz(c[shape[0] - 1 :: -1], c[shape[0] - 1 :])


def circulant(c, shape):
    return scipy.linalg.circulant(c).T[: shape[0], : shape[1]]


def symmetric(c, shape):
    upper = np.zeros(shape, c.dtype)
    upper[np.triu_indices(shape[0])] = c
    return np.triu(upper) + np.triu(upper, 1).T


SHAPES = [(5, 5), (3, 7), (7, 3), (1, 4), (4, 1), (1, 1), (24, 17)]
MATRICES = [
    *((sharing.Toeplitz(shape=shape), toeplitz) for shape in SHAPES),
    *((sharing.Circulant(shape=shape), circulant) for shape in SHAPES),
    *((sharing.Symmetric(shape=(k, k)), symmetric) for k in (1, 2, 7)),
]


def test_structured_matrices_and_their_products():
    """Against SciPy; gradients are sums over the members of each value."""
    rows = lambda p: normal(2, 3, p.shape[0], seed=1)

    @jax.jit
    def run():
        results = []
        for p, _ in MATRICES:
            c, x = normal(p.n_values), rows(p)
            w, pull = jax.vjp(lambda c, p=p: jw.share(c, p), c)
            product, pull_product = (
                jax.vjp(p.matmul, x, c) if hasattr(p, "matmul") else jax.vjp(lambda x, c, p=p: x @ jw.share(c, p), x, c)
            )
            results.append(
                (w, pull(normal(*p.shape, seed=2))[0], product, pull_product(normal(*product.shape, seed=3)))
            )
        return results

    for (p, make), (w, gradient, product, (by_x, by_codebook)) in zip(MATRICES, run(), strict=True):
        c, x, index, name = normal(p.n_values), rows(p), p.index(), str(p)
        expected = make(c, p.shape)
        np.testing.assert_array_equal(w, expected, err_msg=name)
        np.testing.assert_array_equal(c[index], expected, err_msg=name)
        members = summed_over_members(index, normal(*p.shape, seed=2), p.n_values)
        np.testing.assert_allclose(gradient, members, atol=1e-5, err_msg=name)
        exact, back = expected.astype(np.float64), normal(*product.shape, seed=3).astype(np.float64)
        np.testing.assert_allclose(product, x @ exact, atol=2e-5, err_msg=name)
        np.testing.assert_allclose(by_x, back @ exact.T, atol=2e-5, err_msg=name)
        outer = np.einsum("abk,abn->kn", x, back)
        np.testing.assert_allclose(by_codebook, summed_over_members(index, outer, p.n_values), atol=5e-5, err_msg=name)


def test_products_in_16_bits_and_of_nothing():
    x, c = normal(4, 16), normal(31, seed=1)
    p = sharing.Toeplitz(shape=(16, 16))
    found = jax.jit(p.matmul)(jnp.bfloat16(x), jnp.bfloat16(c))
    assert found.dtype == jnp.bfloat16
    exact = np.float64(jnp.bfloat16(x)) @ toeplitz(np.float64(jnp.bfloat16(c)), (16, 16))
    np.testing.assert_allclose(np.float64(found), exact, rtol=2**-7, atol=1e-4)
    for shape in ((0, 3), (3, 0)):
        for p in (sharing.Toeplitz(shape=shape), sharing.Circulant(shape=shape)):
            c = jnp.ones(p.n_values)
            assert jw.share(c, p).shape == shape
            np.testing.assert_array_equal(p.matmul(jnp.ones((2, shape[0])), c), np.zeros((2, shape[1])))


# Convolutions

CONVOLUTIONS = [  # kernel_shape, input_shape, strides, padding, dilation, groups
    ((3, 3, 2, 4), (7, 6, 4), 1, ((1, 1), (1, 1)), 1, 2),
    ((3, 2, 1, 6), (6, 5, 3), (2, 1), ((0, 0), (2, 2)), (2, 1), 3),
    ((2, 3, 3, 2), (8, 9, 3), (1, 3), ((2, 2), (3, 3)), (3, 2), 1),
    ((1, 1, 1, 4), (3, 3, 4), 2, ((0, 0), (0, 0)), 1, 4),
]


def test_convolutions_are_those_of_torch():
    torch = pytest.importorskip("torch")

    @jax.jit
    def run():
        results = []
        for kernel_shape, input_shape, *geometry in CONVOLUTIONS:
            p = sharing.Convolution(kernel_shape, input_shape, *geometry)
            x, kernel = normal(2, *input_shape).reshape(2, -1), normal(*kernel_shape, seed=1)
            y, pull = jax.vjp(p.matmul, x, kernel)
            results.append((y, x @ jw.share(kernel, p), *pull(normal(*y.shape, seed=2))))
        return results

    for given, (product, dense, by_x, by_kernel) in zip(CONVOLUTIONS, run(), strict=True):
        kernel_shape, input_shape, strides, padding, dilation, groups = given
        x = torch.tensor(normal(2, *input_shape), dtype=torch.float64).permute(0, 3, 1, 2).requires_grad_()
        kernel = torch.tensor(normal(*kernel_shape, seed=1), dtype=torch.float64).permute(3, 2, 0, 1).requires_grad_()
        pads = [p for p, _ in padding]
        y = torch.nn.functional.conv2d(x, kernel, None, strides, pads, dilation, groups).permute(0, 2, 3, 1)
        y.backward(torch.tensor(normal(*product.shape, seed=2), dtype=torch.float64).reshape(y.shape))
        for found in (product, dense):
            np.testing.assert_allclose(found, y.detach().reshape(2, -1), atol=1e-5)
        np.testing.assert_allclose(by_x, x.grad.permute(0, 2, 3, 1).reshape(2, -1), atol=1e-5)
        np.testing.assert_allclose(by_kernel, kernel.grad.permute(2, 3, 1, 0), atol=1e-4)
        index = jw.conv_index(
            kernel_shape, input_shape, strides=strides, padding=padding, dilation=dilation, groups=groups
        )
        np.testing.assert_array_equal(index, sharing.Convolution(*given).index())


def test_a_large_image_is_convolved_without_its_matrix(optimizing):
    p = sharing.Convolution((3, 3, 3, 8), (224, 224, 3), strides=2)
    assert p.shape == (150528, 100352)  # whose index would take 30 GB
    image, kernel = jax.ShapeDtypeStruct(p.shape[:1], jnp.float32), jax.ShapeDtypeStruct((p.n_values,), jnp.float32)
    compiled = jax.jit(p.matmul).lower(image, kernel).compile(optimizing)
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * 4 * sum(p.shape)
    found = compiled(normal(150528), normal(216))
    numbers = ("NHWC", "HWIO", "NHWC")
    image, kernel = normal(150528).reshape(1, 224, 224, 3), normal(216).reshape(3, 3, 3, 8)
    expected = lax.conv_general_dilated(image, kernel, (2, 2), "SAME", dimension_numbers=numbers)
    np.testing.assert_allclose(found, expected.ravel(), atol=1e-4)


# Equivariance


def turned(image, flip, turns):
    """The image flipped from left to right, or not, then turned."""
    return np.rot90(image[:, ::-1] if flip else image, turns).copy()


def convolved(image, kernel):
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        image[None], kernel, (1, 1), "SAME", dimension_numbers=numbers, precision="highest"
    )[0]


@pytest.mark.parametrize(("group", "order"), [("p4", 4), ("p4m", 8)])
def test_group_convolutions_are_equivariant(group, order):
    """Of a turned image: the maps of each filter are turned, and in another order, the same for all filters."""
    lift = sharing.GroupConvolution(group, lifts=True)
    among = sharing.GroupConvolution(group)
    first, second = normal(3, 3, 2, order * 3), normal(5, 5, order * 3, order * 2, seed=1)
    t1, t2 = jw.ShareWeights(lift), jw.ShareWeights(among, codebook_gradient="sum")

    @jax.jit
    def maps(images):
        key = jax.random.key(0)
        k1, k2 = t1.apply(first, t1.init(first, key)), t2.apply(second, t2.init(second, key))
        hidden = jax.vmap(lambda image: convolved(jax.nn.relu(convolved(image, k1)), k2))(images)
        return hidden.reshape(*hidden.shape[:-1], order, 2), k1, k2

    image = normal(6, 6, 2, seed=2)
    poses = [(flip, turns) for flip in range(order // 4) for turns in range(4)]
    outputs, k1, k2 = maps(np.stack([turned(image, *pose) for pose in poses]))
    for kernel, size in ((k1, 3 * 3 * 2 * 3), (k2, 5 * 5 * order * 3 * 2)):
        assert len(np.unique(kernel)) == size  # no more is shared than must be
    outputs = np.asarray(outputs)
    for pose, found in zip(poses, outputs, strict=True):
        expected = turned(outputs[0], *pose)
        order_of = [
            next(h for h in range(order) if np.allclose(found[:, :, g], expected[:, :, h], atol=1e-4))
            for g in range(order)
        ]
        assert sorted(order_of) == list(range(order))
        assert (order_of == list(range(order))) == (pose == (0, 0))
        np.testing.assert_allclose(found.max(2), expected.max(2), atol=1e-4)
    if group == "p4":  # and not to flips
        flipped = np.asarray(maps(turned(image, 1, 0)[None])[0][0])
        assert not np.allclose(flipped.max(2), turned(outputs[0], 1, 0).max(2), atol=1e-2)


# Low displacement rank


def shifted(c, sign):
    """The matrix of c moved right by one from row to row, with a sign for what wraps around."""
    n = len(c)
    return np.array([[c[(j - i) % n] * (1 if j >= i else sign) for j in range(n)] for i in range(n)])


def test_displacement():
    left, right, x = normal(3, 12), normal(3, 12, seed=1), normal(2, 5, 12, seed=2)

    @jax.jit
    def run():
        product, pull = jax.vjp(sharing.displacement_matmul, x, left, right)
        return sharing.displacement(left, right), product, pull(normal(2, 5, 12, seed=3))

    found, product, (by_x, by_left, by_right) = run()
    factors = [(shifted(g, 1), shifted(h, -1)) for g, h in zip(np.float64(left), np.float64(right), strict=True)]
    w = sum(a @ b for a, b in factors)
    np.testing.assert_allclose(found, w, atol=2e-5)
    np.testing.assert_allclose(product, x @ w, atol=5e-5)
    cotangent = np.float64(normal(2, 5, 12, seed=3))
    np.testing.assert_allclose(by_x, cotangent @ w.T, atol=5e-5)
    outer, unit = np.einsum("abk,abn->kn", x, cotangent), np.eye(12)
    for r, (a, b) in enumerate(factors):  # linear in each factor
        expected = (
            [np.sum(outer * (shifted(e, 1) @ b)) for e in unit],
            [np.sum(outer * (a @ shifted(e, -1))) for e in unit],
        )
        np.testing.assert_allclose((by_left[r], by_right[r]), expected, atol=2e-4)
    # Sylvester's displacement has the rank of the sum.
    turn, skew = np.eye(12, k=1), np.eye(12, k=1)
    turn[-1, 0], skew[-1, 0] = 1, -1
    values = np.linalg.svd(turn @ w - w @ skew, compute_uv=False)
    assert values[2] > 0.1 and values[3] < 1e-10


def test_a_toeplitz_matrix_has_displacement_rank_two():
    w = toeplitz(normal(15), (8, 8)).astype(np.float64)
    c = np.array([(w[0, d] + w[8 - d, 0]) / 2 if d else w[0, 0] for d in range(8)])  # the circulant part
    s = np.array([(w[0, d] - w[8 - d, 0]) / 2 if d else 0 for d in range(8)])
    one = np.eye(8)[0]
    found = sharing.displacement(jnp.float32([c, one]), jnp.float32([one, s]))
    np.testing.assert_allclose(found, w, atol=1e-5)


def test_a_codebook_for_each_output_unit():
    w = normal(2, 6, 3, 4)
    for axes in (jw.Axes(batch=0), jw.Axes(input=1, output=(2, 3), batch=0), jw.axes.depthwise(2)):
        matrices = np.asarray(axes.matrix(w))
        *lead, rows, columns = matrices.shape
        index = np.random.default_rng(0).integers(-1, 5, matrices.shape)
        codebook = normal(int(np.prod(lead)) * columns, 5, seed=1)
        found = axes.matrix(jw.share(codebook, axes.weight(jnp.asarray(index), w.shape), axes=axes))
        found, index = np.asarray(found).reshape(-1, rows, columns), index.reshape(-1, rows, columns)
        for b in range(len(found)):
            for j in range(columns):
                values = np.append(codebook[b * columns + j], 0)  # −1 is the last
                np.testing.assert_array_equal(found[b, :, j], values[index[b, :, j]])
    beyond = jw.share(codebook, jnp.full(w.shape, 5), axes=axes)
    assert np.isnan(beyond).all()
