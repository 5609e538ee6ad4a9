"""Axes: the matrix read from a kernel is the linear operator of its layer."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax_modules import random_params, scanned

import jaxweights as jw
from jaxweights.core.axes import (
    ATTENTION_IN,
    ATTENTION_OUT,
    CONV,
    CONV_TRANSPOSE_KERNEL,
    DENSE,
    EMBED,
    Axes,
    dense_general,
    depthwise,
)

KEY = jax.random.key(0)


def operator(layer, in_shape):
    """Returns the matrix of a linear function, from its Jacobian at zero."""
    jacobian = np.asarray(jax.jit(jax.jacobian(layer))(jnp.zeros(in_shape)))
    return jacobian.reshape(-1, int(np.prod(in_shape))).T


def linen(module, x_shape):
    params = random_params(module, x_shape)
    return lambda x: module.apply({"params": params}, x), params["kernel"]


def rngs():
    return nnx.Rngs(0)


def close(matrix, expected):
    np.testing.assert_allclose(np.asarray(matrix), expected, rtol=1e-5, atol=1e-6)


# Single-matrix layers: Linen


@pytest.mark.parametrize(
    ("module", "x_shape", "axes"),
    [
        (nn.Dense(5), (3,), DENSE),
        (nn.DenseGeneral((4, 5)), (3,), ATTENTION_IN),
        (nn.DenseGeneral(5, axis=(-2, -1)), (3, 4), ATTENTION_OUT),
        (nn.DenseGeneral((4, 5), axis=(-2, -1)), (2, 3), dense_general(2, 2)),
        (nn.DenseGeneral((2, 4, 5), axis=(0, 1, 2)), (2, 3, 2), dense_general(3, 3)),
        (nn.Conv(5, (3,), padding="VALID"), (3, 4), CONV),
        (nn.Conv(5, (3, 2), padding="VALID"), (3, 2, 4), CONV),
        (nn.Conv(3, (2, 3, 2), padding="VALID"), (2, 3, 2, 2), CONV),
    ],
    ids=[
        "Dense",
        "DenseGeneral-1-2",
        "DenseGeneral-2-1",
        "DenseGeneral-2-2",
        "DenseGeneral-3-3",
        *map("Conv{}".format, (1, 2, 3)),
    ],
)
def test_linen_layer(module, x_shape, axes):
    layer, kernel = linen(module, x_shape)
    close(axes.matrix(kernel), operator(layer, x_shape))


def test_linen_dense_general_with_batch_axes():
    module = nn.DenseGeneral((2, 3), axis=-1, batch_dims=(0,))
    layer, kernel = linen(module, (4, 5))
    true = operator(layer, (4, 5)).reshape(4, 5, 4, 6)
    close(dense_general(1, 2, 1).matrix(kernel), np.stack([true[i, :, i] for i in range(4)]))


def test_linen_conv_local_is_a_matrix_per_position():
    layer, kernel = linen(nn.ConvLocal(3, (2,), padding="VALID"), (4, 2))
    matrices = Axes(batch=0).matrix(kernel)
    true = operator(layer, (4, 2)).reshape(4, 2, 3, 3)  # (position, in, output position, out)
    for i in range(3):
        # ConvLocal orders its rows as (in, window).
        close(matrices[i].reshape(2, 2, 3).swapaxes(0, 1), true[i : i + 2, :, i])


# Single-matrix layers: NNX


@pytest.mark.parametrize(
    ("make", "x_shape", "axes"),
    [
        (lambda: nnx.Linear(3, 5, rngs=rngs()), (3,), DENSE),
        (lambda: nnx.LinearGeneral(3, (4, 5), rngs=rngs()), (3,), ATTENTION_IN),
        (lambda: nnx.LinearGeneral((3, 4), 5, axis=(-2, -1), rngs=rngs()), (3, 4), ATTENTION_OUT),
        (lambda: nnx.LinearGeneral((2, 3), (4, 5), axis=(-2, -1), rngs=rngs()), (2, 3), dense_general(2, 2)),
        (lambda: nnx.Conv(4, 5, (3,), padding="VALID", rngs=rngs()), (3, 4), CONV),
        (lambda: nnx.Conv(4, 5, (3, 2), padding="VALID", rngs=rngs()), (3, 2, 4), CONV),
    ],
    ids=["Linear", "LinearGeneral-out2", "LinearGeneral-in2", "LinearGeneral-2-2", "Conv1", "Conv2"],
)
def test_nnx_layer(make, x_shape, axes):
    layer = make()
    close(axes.matrix(layer.kernel[...]), operator(layer, x_shape))


# Embeddings: product of a one-hot row and the table


def test_embeddings():
    ids = jnp.arange(6)
    module = nn.Embed(6, 3)
    params = module.init(KEY, ids)
    close(EMBED.matrix(params["params"]["embedding"]), module.apply(params, ids))
    layer = nnx.Embed(6, 3, rngs=rngs())
    close(EMBED.matrix(layer.embedding[...]), layer(ids))


# Attention: each projection, inside the attention layer


def projection(name, module, *args):
    """Returns the output of one projection within a Linen attention layer."""
    _, state = module.apply(*args, capture_intermediates=True, mutable=["intermediates"])
    return state["intermediates"][name]["__call__"][0]


@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_linen_attention_in(name):
    module = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=6, out_features=5)
    params = random_params(module, (1, 4))
    project = lambda x: projection(name, module, {"params": params}, x[None])[0]
    close(ATTENTION_IN.matrix(params[name]["kernel"]), operator(project, (4,)))


def test_linen_attention_out():
    # With one key the attention weights are 1: the layer is the value projection followed by the out projection.
    module = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=6, out_features=5)
    params = random_params(module, (1, 4))
    layer = lambda x: module.apply({"params": params}, x[None])[0]
    value, out = (params[n]["kernel"] for n in ("value", "out"))
    close(ATTENTION_IN.matrix(value) @ ATTENTION_OUT.matrix(out), operator(layer, (4,)))


def test_nnx_attention():
    layer = nnx.MultiHeadAttention(2, 4, qkv_features=6, out_features=5, decode=False, rngs=rngs())
    for name in ("query", "key", "value"):
        part = getattr(layer, name)
        close(ATTENTION_IN.matrix(part.kernel[...]), operator(part, (4,)))
    close(ATTENTION_OUT.matrix(layer.out.kernel[...]), operator(layer.out, (2, 3)))
    close(
        ATTENTION_IN.matrix(layer.value.kernel[...]) @ ATTENTION_OUT.matrix(layer.out.kernel[...]),
        operator(lambda x: layer(x[None])[0], (4,)),
    )


# Transposed convolutions: one output position that all taps reach. The transposed kernel
# is spatially flipped, which permutes rows.


@pytest.mark.parametrize("transpose_kernel", [False, True])
@pytest.mark.parametrize("framework", ["linen", "nnx"])
def test_conv_transpose(framework, transpose_kernel):
    window, n_in, n_out = (3, 2), 4, 5
    options = {"padding": "VALID", "transpose_kernel": transpose_kernel}
    if framework == "linen":
        layer, kernel = linen(nn.ConvTranspose(n_out, window, **options), (*window, n_in))
    else:
        layer = nnx.ConvTranspose(n_in, n_out, window, rngs=rngs(), **options)
        kernel = layer.kernel[...]
    axes = CONV_TRANSPOSE_KERNEL if transpose_kernel else CONV
    middle = lambda x: layer(x)[window[0] - 1, window[1] - 1]
    true = operator(middle, (*window, n_in)).reshape(*window, n_in, n_out)
    read = np.asarray(axes.matrix(kernel)).reshape(true.shape)
    close(read[::-1, ::-1] if transpose_kernel else read, true)
    sigma = np.linalg.svd(true.reshape(-1, n_out), compute_uv=False)[0]
    np.testing.assert_allclose(jw.spectral_norm(kernel, axes=axes), sigma, rtol=1e-5)


# Grouped and depthwise convolutions: block-diagonal operators


@pytest.mark.parametrize(("n_in", "n_out", "groups"), [(4, 6, 2), (4, 4, 4), (3, 6, 3)])
@pytest.mark.parametrize("framework", ["linen", "nnx"])
def test_grouped_conv(framework, n_in, n_out, groups):
    window = (2, 3)
    options = {"padding": "VALID", "feature_group_count": groups}
    if framework == "linen":
        layer, kernel = linen(nn.Conv(n_out, window, **options), (*window, n_in))
    else:
        layer = nnx.Conv(n_in, n_out, window, rngs=rngs(), **options)
        kernel = layer.kernel[...]
    true = operator(layer, (*window, n_in)).reshape(*window, groups, n_in // groups, groups, n_out // groups)
    blocks = depthwise(groups).matrix(kernel)
    assert blocks.shape == (groups, 6 * n_in // groups, n_out // groups)
    for i in range(groups):
        close(blocks[i], true[:, :, i, :, i].reshape(-1, n_out // groups))
        for j in set(range(groups)) - {i}:
            assert not true[:, :, i, :, j].any()
    np.testing.assert_allclose(
        np.max(jw.spectral_norm(kernel, axes=depthwise(groups))),
        np.linalg.svd(true.reshape(6 * n_in, n_out), compute_uv=False)[0],
        rtol=1e-5,
    )


# Stacks: nn.scan, nn.vmap, nnx.scan, nnx.vmap


def test_linen_scan():
    module = scanned()
    params = random_params(module, (3,))
    matrices = DENSE.stacked().matrix(params["d"]["kernel"])
    assert matrices.shape == (5, 3, 3)
    true = operator(lambda x: module.apply({"params": params}, x)[0], (3,))
    close(np.linalg.multi_dot(list(np.asarray(matrices))), true)


def test_linen_vmap():
    module = nn.vmap(nn.Dense, variable_axes={"params": 1}, split_rngs={"params": True}, axis_size=4)(5)
    layer, kernel = linen(module, (4, 3))
    true = operator(layer, (4, 3)).reshape(4, 3, 4, 5)
    close(Axes(input=0, output=2, batch=1).matrix(kernel), np.stack([true[i, :, i] for i in range(4)]))


def test_nnx_vmap_and_scan():
    @nnx.vmap(in_axes=0, out_axes=0)
    def make(key):
        return nnx.Linear(3, 3, rngs=nnx.Rngs(key))

    stack = make(jax.random.split(KEY, 4))
    matrices = np.asarray(DENSE.stacked().matrix(stack.kernel[...]))

    graph, state = nnx.split(stack)
    module = lambda: nnx.merge(graph, jax.tree.map(lambda a: a, state))  # new Variables for the current trace
    apart = nnx.vmap(lambda layer, x: layer(x), in_axes=(0, 0))
    true = operator(lambda x: apart(module(), x), (4, 3)).reshape(4, 3, 4, 3)
    close(matrices, np.stack([true[i, :, i] for i in range(4)]))

    in_turn = nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    close(np.linalg.multi_dot(list(matrices)), operator(lambda x: in_turn(x, module()), (3,)))


def test_stack_of_convolutions_and_attention():
    w = jax.random.normal(KEY, (5, 2, 3, 4))
    close(CONV.stacked().matrix(w), np.stack([CONV.matrix(v) for v in w]))
    close(ATTENTION_IN.stacked().matrix(w), np.stack([ATTENTION_IN.matrix(v) for v in w]))
    close(ATTENTION_OUT.stacked().matrix(w), np.stack([ATTENTION_OUT.matrix(v) for v in w]))
    close(CONV.stacked(1).matrix(jnp.moveaxis(w, 0, 1)), np.stack([CONV.matrix(v) for v in w]))
    close(depthwise(2).stacked().matrix(w), np.stack([depthwise(2).matrix(v) for v in w]))
    twice = jnp.stack([w, 2 * w])
    close(DENSE.stacked(0).stacked(1).matrix(twice[..., 0, :, :]), np.asarray(twice)[..., 0, :, :])
