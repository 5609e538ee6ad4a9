"""Axes: the matrix read from a kernel is the linear operator of the layer that owns it."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict

import jaxweights as jw
from jaxweights.axes import (
    ATTENTION_IN,
    ATTENTION_OUT,
    CONV,
    CONV_TRANSPOSE_KERNEL,
    DENSE,
    EMBED,
    Axes,
    Reading,
    dense_general,
    depthwise,
    fans,
    infer_axes,
)

KEY = jax.random.key(0)


def operator(layer, in_shape):
    """The matrix (rows, columns) of a linear function, from its Jacobian at zero."""
    jacobian = np.asarray(jax.jit(jax.jacobian(layer))(jnp.zeros(in_shape)))
    return jacobian.reshape(-1, int(np.prod(in_shape))).T


def random_params(module, x_shape):
    """Random parameters of a Linen module, in the shapes of its own `init`."""
    rng = np.random.default_rng(0)
    draw = lambda s: jnp.asarray(rng.normal(size=s.shape), s.dtype)
    return jax.tree.map(draw, jax.eval_shape(module.init, KEY, jnp.zeros(x_shape)))["params"]


def linen(module, x_shape):
    params = random_params(module, x_shape)
    return lambda x: module.apply({"params": params}, x), params["kernel"]


def rngs():
    return nnx.Rngs(0)


def close(matrix, expected):
    np.testing.assert_allclose(np.asarray(matrix), expected, rtol=1e-5, atol=1e-6)


# Layers that are one matrix: Linen


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
        # ConvLocal lays its rows out as (in, window).
        close(matrices[i].reshape(2, 2, 3).swapaxes(0, 1), true[i : i + 2, :, i])


# Layers that are one matrix: NNX


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


# Embeddings: a one-hot row times the table


def test_embeddings():
    ids = jnp.arange(6)
    module = nn.Embed(6, 3)
    params = module.init(KEY, ids)
    close(EMBED.matrix(params["params"]["embedding"]), module.apply(params, ids))
    layer = nnx.Embed(6, 3, rngs=rngs())
    close(EMBED.matrix(layer.embedding[...]), layer(ids))


# Attention: its projections, each inside the attention layer itself


def projection(name, module, *args):
    """What one projection of a Linen attention layer returns when the layer is called."""
    _, state = module.apply(*args, capture_intermediates=True, mutable=["intermediates"])
    return state["intermediates"][name]["__call__"][0]


@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_linen_attention_in(name):
    module = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=6, out_features=5)
    params = random_params(module, (1, 4))
    project = lambda x: projection(name, module, {"params": params}, x[None])[0]
    close(ATTENTION_IN.matrix(params[name]["kernel"]), operator(project, (4,)))


def test_linen_attention_out():
    # With one key the attention weights are 1: the layer is the value projection, then the out-projection.
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
# is flipped in space, which permutes rows.


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


class Layer(nn.Module):
    kind: str = "dense"

    @nn.compact
    def __call__(self, x, _=None):
        if self.kind == "dense":
            x = nn.Dense(x.shape[-1], name="d")(x)
        elif self.kind == "conv":
            x = nn.Conv(x.shape[-1], (2,), name="d")(x)
        elif self.kind == "general":
            x = nn.DenseGeneral((3, 2), name="d")(x).reshape(*x.shape[:-1], 6)
        else:
            x = nn.MultiHeadDotProductAttention(2, name="a")(x)
        return x, None


def scanned(kind="dense", length=5, axis=0):
    return nn.scan(Layer, variable_axes={"params": axis}, split_rngs={"params": True}, length=length)(kind)


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
    module = lambda: nnx.merge(graph, jax.tree.map(lambda a: a, state))  # new Variables, of the trace at hand
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


# Inference from the other weights


def shapes(tree):
    """{path: shape} of a nested dict."""
    return {"/".join(path): tuple(np.shape(a)) for path, a in flatten_dict(tree).items()}


def nnx_shapes(module):
    return shapes(nnx.to_pure_dict(nnx.state(module, nnx.Param)))


def readings(found, tree):
    return {path: Reading.of(axes, tree[path]) for path, axes in found.items()}


@pytest.mark.parametrize("use_bias", [True, False])
def test_infer_attention(use_bias):
    module = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=6, use_bias=use_bias)
    tree = shapes(random_params(module, (1, 4)))
    assert infer_axes(tree) == {f"{n}/kernel": ATTENTION_IN for n in ("query", "key", "value")} | {
        "out/kernel": ATTENTION_OUT
    }


def test_infer_nnx_attention():
    layer = nnx.MultiHeadAttention(2, 4, qkv_features=6, decode=False, rngs=rngs())
    found = infer_axes(nnx_shapes(layer))
    assert found == {f"{n}/kernel": ATTENTION_IN for n in ("query", "key", "value")} | {"out/kernel": ATTENTION_OUT}


@pytest.mark.parametrize(
    ("kind", "width", "expected"),
    [
        ("dense", 3, Axes(input=1, output=2, batch=0)),
        ("conv", 4, Axes(input=2, output=3, batch=0)),
        ("general", 6, Axes(input=1, output=(2, 3), batch=0)),
    ],
)
def test_infer_linen_scan(kind, width, expected):
    tree = shapes(random_params(scanned(kind), (1, width)))
    kernel = tree["d/kernel"]
    assert readings(infer_axes(tree), tree) == {"d/kernel": Reading.of(expected, kernel)}


def test_infer_linen_scan_of_attention():
    tree = shapes(random_params(scanned("attention"), (1, 4)))
    batched = lambda axes, path: Reading.of(axes.stacked(), tree[path])
    expected = {f"a/{n}/kernel": batched(ATTENTION_IN, f"a/{n}/kernel") for n in ("query", "key", "value")}
    expected["a/out/kernel"] = batched(ATTENTION_OUT, "a/out/kernel")
    assert readings(infer_axes(tree), tree) == expected


def test_infer_nnx_vmap():
    stack = nnx.vmap(lambda key: nnx.Linear(3, 7, rngs=nnx.Rngs(key)))(jax.random.split(KEY, 4))
    tree = nnx_shapes(stack)
    assert readings(infer_axes(tree), tree) == {"kernel": Reading.of(DENSE.stacked(), (4, 3, 7))}


@pytest.mark.parametrize(
    ("features", "axis", "x_shape"),
    [((4, 5), -1, (3,)), ((4, 5), (-2, -1), (2, 3)), ((2, 4, 5), -1, (3,))],
)
def test_infer_dense_general(features, axis, x_shape):
    tree = shapes(random_params(nn.DenseGeneral(features, axis=axis), x_shape))
    expected = dense_general(len(x_shape), len(features))
    assert infer_axes(tree) == {"kernel": expected}


@pytest.mark.parametrize(
    "tree",
    [
        {"kernel": (3, 4), "bias": (4,)},
        {"conv/kernel": (3, 3, 4, 5), "conv/bias": (5,)},
        {"conv/kernel": (3, 3, 4, 5)},
        {"stack/kernel": (4, 3, 5)},  # without a bias nothing tells a stack from a convolution
        {"query/kernel": (4, 2, 3), "key/kernel": (4, 2, 3)},  # not the four of attention
        {"out/kernel": (2, 3, 4), "out/bias": (4,)},
        {"x/embedding": (4, 2, 3), "x/bias": (2, 3)},  # not a kernel
        {"kernel": (4, 4, 5), "bias": (4, 5)},  # a stack, or a DenseGeneral
        {"kernel": (5, 8, 8, 3), "bias": (5, 8, 3)},  # a stack of DenseGeneral, or a stack of stacks
        {"kernel": (3, 4, 5), "bias": (2, 5)},  # fits nothing
        {"kernel": (3, 4, 5), "bias": (3, 4, 5)},
    ],
    ids=str,
)
def test_infer_nothing(tree):
    assert infer_axes(tree) == {}


# Fans


@pytest.mark.parametrize(
    ("shape", "axes", "expected"),
    [
        ((256, 512), None, (256, 512)),
        ((7,), None, (7, 1)),
        ((), None, (1, 1)),
        ((3, 3, 64, 128), None, (576, 1152)),
        ((3, 3, 1, 64), None, (9, 576)),
        ((3, 3, 1, 64), depthwise(64), (9, 9)),
        ((3, 3, 8, 32), depthwise(4), (72, 72)),
        ((512, 8, 64), ATTENTION_IN, (512, 512)),
        ((8, 64, 512), ATTENTION_OUT, (512, 512)),
        ((12, 256, 512), Axes(batch=0), (256, 512)),
        ((12, 3, 3, 64, 128), CONV.stacked(), (576, 1152)),
        ((3, 3, 128, 64), CONV_TRANSPOSE_KERNEL, (576, 1152)),
        ((2, 3, 4, 5), dense_general(2, 2), (6, 20)),
        ((0, 4), None, (0, 4)),
    ],
)
def test_fans(shape, axes, expected):
    assert fans(shape, axes) == expected


# Readings


def test_axes_none_reads_vectors_and_scalars_as_one_unit():
    assert Reading.of(None, (5,)) == Reading(input=(0,), output=(), batch=(), window=())
    assert Reading.of(None, ()) == Reading(input=(), output=(), batch=(), window=())


def test_split_groups_reads_groups_as_batch():
    w = jnp.arange(2 * 3 * 8.0).reshape(2, 3, 8)
    split, reading = Reading.of(depthwise(4), w.shape).split_groups(w)
    assert split.shape == (2, 3, 4, 2)
    assert reading == Reading(input=(1,), output=(3,), batch=(2,), window=(0,))
    # Output units 2i and 2i + 1 belong to group i, whatever stands before or after the output axis.
    np.testing.assert_array_equal(split[..., 1, :], w[..., 2:4])
    moved, reading = Reading.of(Axes(input=1, output=0, groups=4), (8, 3, 2)).split_groups(jnp.moveaxis(w, 2, 0))
    assert reading == Reading(input=(2,), output=(1,), batch=(0,), window=(3,))
    np.testing.assert_array_equal(moved[1], jnp.moveaxis(w, 2, 0)[2:4])


def test_size_zero_axes():
    assert Axes().matrix(jnp.ones((0, 4))).shape == (0, 4)
    assert CONV.matrix(jnp.ones((3, 0, 4, 5))).shape == (0, 5)
    assert DENSE.stacked().matrix(jnp.ones((0, 4, 5))).shape == (0, 4, 5)


def test_equal_axes_hash_alike():
    assert Axes(input=[0], output=(1, 2)) == Axes(input=0, output=[1, 2])
    assert len({Axes(input=[0], output=(1, 2)), Axes(input=0, output=[1, 2])}) == 1


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Axes(input="0"), TypeError, "input must be"),
        (lambda: Axes(output=1.0), TypeError, "output must be"),
        (lambda: Axes(batch=True), TypeError, "batch must be"),
        (lambda: Axes(groups=0), ValueError, "groups must be"),
        (lambda: Axes(input=2).matrix(jnp.ones((2, 3))), ValueError, "input axis 2"),
        (lambda: Axes(input=1, output=-1).matrix(jnp.ones((2, 3))), ValueError, "axis 1 .* both"),
        (lambda: Axes(input=0, output=1, window=()).matrix(jnp.ones((2, 3, 4))), ValueError, "axis 2 .* without"),
        (lambda: Axes().matrix(jnp.ones(3)), ValueError, "axis -2"),
        (lambda: depthwise(3).matrix(jnp.ones((2, 4))), ValueError, "groups=3 does not divide"),
        (lambda: Axes(0, (1, 2), groups=2).matrix(jnp.ones((2, 4, 4))), ValueError, "one output axis"),
        (lambda: fans((2, 3), (0, 1)), TypeError, "jaxweights.Axes"),
        (lambda: DENSE.stacked(-1), ValueError, "axis must be"),
        (lambda: DENSE.stacked(1).matrix(jnp.ones((3, 5, 4))), ValueError, "axis 1 .* both batch and input"),
        (lambda: Axes(0, 1).stacked(), ValueError, "negative"),
    ],
)
def test_errors(make, error, message):
    with pytest.raises(error, match=message):
        make()
