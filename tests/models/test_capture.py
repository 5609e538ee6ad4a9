"""Capture of layer inputs, against the layers' outputs, float64 NumPy sums, and a loop over layers."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax_modules import KEY, Layer, random_params, scanned
from jax.sharding import NamedSharding, PartitionSpec

import jaxweights as jw
from jaxweights.core.axes import Reading
from jaxweights.programs.contractions.visit import visit_contractions


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def matrix_of_outputs(y, stats, w):
    """Σyyᵀ over all but the output axes, in the weight's order of outputs, in float64."""
    y = np.asarray(y, np.float64)
    r = Reading.of(stats.axes, w.shape)
    groups, columns = stats.axes.groups, np.prod([w.shape[a] for a in r.output], dtype=int) // stats.axes.groups
    y = y.reshape(-1, groups, columns)
    return np.einsum("sgi,sgj->gij", y, y)


def close(a, b, rtol=1e-5):
    b = np.asarray(b, np.float64)
    np.testing.assert_allclose(np.asarray(a, np.float64), b, rtol=rtol, atol=rtol * np.abs(b).max(initial=1e-30))


CONV = dict(features=24, use_bias=False)
LAYERS = {
    "dense": (nn.Dense(6, use_bias=False), (2, 3, 5)),
    "dense of a vector": (nn.Dense(6, use_bias=False), (5,)),
    "several axes": (nn.DenseGeneral((3, 4), axis=(1, 2), use_bias=False), (5, 3, 4)),
    "axes in another order": (nn.DenseGeneral(12, axis=(-1, 1), use_bias=False), (5, 3, 2, 4)),
    "einsum": (nn.Einsum((5, 2, 3), "...d,dhk->...hk", use_bias=False), (2, 4, 5)),
    "einsum, weight transposed": (nn.Einsum((6, 5), "...d,fd->...f", use_bias=False), (2, 4, 5)),
    "conv": (nn.Conv(kernel_size=(3, 2), **CONV), (2, 5, 6, 3)),
    "conv of a sequence": (nn.Conv(kernel_size=(4,), padding="CAUSAL", **CONV), (2, 9, 3)),
    "conv valid, strides": (nn.Conv(kernel_size=(3, 2), strides=(2, 3), padding="VALID", **CONV), (2, 7, 8, 3)),
    "conv circular": (nn.Conv(kernel_size=(3, 3), padding="CIRCULAR", features=27, use_bias=False), (2, 4, 5, 3)),
    "conv dilated": (nn.Conv(kernel_size=(2, 2), kernel_dilation=(2, 3), **CONV), (2, 7, 8, 3)),
    "conv of a dilated input": (nn.Conv(kernel_size=(2, 2), input_dilation=(2, 1), padding=1, **CONV), (2, 4, 5, 3)),
    "conv in groups": (nn.Conv(kernel_size=(2, 2), feature_group_count=2, **CONV), (2, 5, 6, 6)),
    "depthwise": (nn.Conv(kernel_size=(2, 2), feature_group_count=6, **CONV), (2, 5, 6, 6)),
    "transposed conv": (nn.ConvTranspose(24, (2, 3), strides=(2, 2), use_bias=False), (2, 4, 5, 3)),
    "transposed conv, kernel too": (nn.ConvTranspose(24, (2, 3), transpose_kernel=True, use_bias=False), (2, 4, 5, 3)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_the_second_moment_explains_the_outputs(name):
    """Checks Wᵀ(Σxxᵀ)W = Σyyᵀ with the layer's own y. With at least as many outputs as inputs, it determines Σxxᵀ."""
    layer, shape = LAYERS[name]
    x, params = normal(*shape), random_params(layer, shape)
    (stats,) = jw.linen.capture(layer, {"params": params}, [x]).values()
    (w,) = jax.tree.leaves(params)
    m = np.float64(stats.axes.matrix(w)).reshape(stats.axes.groups, *stats.axes.matrix(w).shape[-2:])
    assert m.shape[2] >= m.shape[1]
    y = layer.apply({"params": params}, x)
    products = np.float64(stats.products).reshape(m.shape[0], m.shape[1], m.shape[1])
    close(np.swapaxes(m, 1, 2) @ products @ m, matrix_of_outputs(y, stats, w))
    assert np.all(stats.count == y.size // (m.shape[0] * m.shape[2]))
    close(np.diagonal(products, axis1=1, axis2=2).reshape(stats.squares.shape), stats.squares)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_statistics_of_a_dense_layer(dtype):
    x = jnp.asarray(100 * normal(3, 50, 7), dtype)
    layer = nn.Dense(4, dtype=dtype)
    (s,) = jw.linen.capture(layer, {"params": random_params(layer, x.shape)}, [x]).values()
    rows = np.float64(x).reshape(-1, 7)
    assert s.count == 150 and s.axes == jw.Axes((0,), (1,))
    assert all(a.dtype == jnp.float32 for a in (s.norm, s.mean_abs, s.second_moment))
    close(s.norm, np.linalg.norm(rows, axis=0), 1e-6)
    close(s.mean_abs, np.abs(rows).mean(0), 1e-6)
    close(s.second_moment, rows.T @ rows / 150, 1e-6)


def test_batches_add_up_to_one_big_batch():
    layer, x = nn.Dense(4), normal(100, 7)
    variables = {"params": random_params(layer, x.shape)}
    of = lambda *batches: jw.linen.capture(layer, variables, batches)["kernel"]
    whole, parts = of(x), of(x[:10], x[10:11], x[11:])
    for s in (parts, of(x[:30]) + of(x[30:])):
        jax.tree.map(lambda a, b: close(a, b, 1e-6), s, whole)
    without = jw.linen.capture(layer, variables, iter([x]), second_moment=False)["kernel"]
    assert without.products is None
    close(without.norm, whole.norm)


# Models


@pytest.mark.parametrize(("kind", "axis"), [("dense", 0), ("dense", -1), ("conv", 1), ("attention", 0)])
def test_each_layer_of_a_scanned_stack_has_statistics(kind, axis):
    model, x = scanned(kind, length=3, axis=axis), normal(2, 4, 6)
    params = random_params(model, x.shape)
    stats = jw.linen.capture(model, {"params": params}, [x, x])
    layer, hidden = Layer(kind), x
    for i in range(3):
        own = jax.tree.map(lambda a, i=i: jnp.take(a, i, axis), params)
        expected = jw.linen.capture(layer, {"params": own}, [hidden, hidden])
        hidden = layer.apply({"params": own}, hidden)[0]
        assert sorted(expected) == sorted(stats)
        for path, s in expected.items():
            jax.tree.map(lambda a, b, i=i: close(a[i], b, 1e-4), stats[path].products, s.products)
            assert stats[path].count[i] == s.count


def test_scans_in_scans_keep_the_order_of_the_axes():
    """A stack of 2 x 3 layers; the inner axis comes first in the weight."""
    kernels, x = normal(3, 2, 4, 4) / 2, normal(5, 4)

    def model(params, x):
        inner = lambda x, w: (x @ w, None)
        outer = lambda x, w: jax.lax.scan(inner, x, w)
        return jax.lax.scan(outer, x, jnp.swapaxes(params["kernel"], 0, 1))[0]

    stats = jw.capture(model, {"kernel": kernels}, [x])["kernel"]
    assert stats.axes == jw.Axes((2,), (3,), (0, 1)) and stats.count.shape == (3, 2)
    hidden = np.float64(x)
    for j in range(2):
        for i in range(3):
            close(stats.products[i, j], hidden.T @ hidden, 1e-4)
            hidden = hidden @ kernels[i, j]


class Shared(nn.Module):
    """One layer used twice, a layer under remat, and one under vmap, alone and with shared weights."""

    @nn.compact
    def __call__(self, x):
        layer = nn.Dense(6, name="twice")
        x = layer(nn.relu(layer(x)))
        x = nn.remat(nn.Dense)(6, name="again")(x)
        apart = dict(variable_axes={"params": 0}, split_rngs={"params": True})
        x = nn.vmap(nn.Dense, **apart)(6, name="apart")(x)
        together = dict(variable_axes={"params": None}, split_rngs={"params": False})
        return nn.vmap(nn.Dense, **together)(6, name="together")(x)


def test_shared_mapped_and_rematerialized_layers():
    model, x = Shared(), normal(3, 5, 6)
    params = random_params(model, x.shape)
    stats = jw.linen.capture(model, {"params": params}, [x])
    assert list(stats) == ["twice/kernel", "again/kernel", "apart/kernel", "together/kernel"]
    dense = lambda x, name: np.einsum("...i,...ij->...j", x, params[name]["kernel"]) + params[name]["bias"]
    moment = lambda x, spec="bsi,bsj->ij": np.einsum(spec, x, x)
    first = np.maximum(dense(np.float64(x), "twice"), 0)
    close(stats["twice/kernel"].products, moment(x) + moment(first))
    assert stats["twice/kernel"].count == 30
    second = dense(first, "twice")
    close(stats["again/kernel"].products, moment(second))
    third = dense(second, "again")
    close(stats["apart/kernel"].products, moment(third, "bsi,bsj->bij"))
    assert stats["apart/kernel"].axes.batch == (0,)
    fourth = third @ params["apart"]["kernel"] + params["apart"]["bias"][:, None]
    close(stats["together/kernel"].products, moment(fourth))


@pytest.mark.parametrize("level", ["linen", "nnx"])
def test_a_recurrent_layer_counts_every_step(level):
    x = normal(2, 5, 3)
    if level == "linen":
        model = nn.RNN(nn.SimpleCell(4))
        stats = jw.linen.capture(model, {"params": random_params(model, x.shape)}, [x])
    else:
        stats = jw.nnx.capture(nnx.RNN(nnx.SimpleCell(3, 4, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(1)), [x])
    assert len(stats) == 2
    assert all(s.count == 10 for s in stats.values())
    rows = np.float64(x).reshape(10, 3)
    for path in [p for p in stats if stats[p].norm.shape == (3,)]:
        close(stats[path].products, rows.T @ rows)


def test_a_branch_that_is_not_taken_counts_nothing():
    params = {"a": normal(4, 4), "b": normal(4, 4), "c": normal(4, 4)}

    def model(params, x, which):
        branches = [lambda x: x @ params["a"], lambda x: x @ params["b"] @ params["c"]]
        return jax.lax.switch(which, branches, x)

    x = normal(6, 4)
    stats = jw.capture(model, params, [(x, 0), (x, 1), (2 * x, 1)])
    assert [int(stats[p].count) for p in "abc"] == [6, 12, 12]
    close(stats["b"].products, 5 * x.T @ x)
    hidden = x @ params["b"]
    close(stats["c"].products, 5 * hidden.T @ hidden)


@pytest.mark.parametrize("transform", [jw.FakeQuantize(4), jw.Chain(jw.WeightNorm(), jw.Prune(0.5))])
def test_transformed_weights_are_still_those_weights(transform):
    model, x = nn.Sequential([nn.Dense(8), nn.tanh, nn.Dense(3)]), normal(9, 5)
    wrapped = jw.linen.Transformed(model, transform)
    variables = jax.jit(wrapped.init)(KEY, x)
    stats = jw.linen.capture(wrapped, variables, [x], "**/kernel")
    expected = jw.linen.capture(model, jw.linen.fold(wrapped, variables), [x])
    for path in expected:
        close(stats[path].products, expected[path].products)


def test_embeddings_are_left_out_and_tied_ones_are_read_as_they_are_used():
    class Tied(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            table = nn.Embed(10, 4)
            return table.attend(nn.Dense(4)(table(tokens)))

    tokens = np.arange(6)
    variables = Tied().init(KEY, tokens)
    stats = jw.linen.capture(Tied(), variables, [tokens])
    assert stats["Embed_0/embedding"].axes == jw.Axes((1,), (0,))
    assert stats["Embed_0/embedding"].norm.shape == (4,)


# visit_contractions


def test_a_visit_may_change_the_product():
    """Scales every layer's output to unit variance in one pass, like data-dependent initialization."""
    model, x = scanned("dense", length=4), 30 * normal(50, 6)
    params = random_params(model, x.shape)

    def visit(product):
        scale = 1 / jnp.std(product.y)
        return scale, product.y * scale

    run = jax.jit(
        lambda params: visit_contractions(lambda p, x: model.apply({"params": p}, x)[0], params, x, visit=visit)
    )
    y, scales = run(params)
    scaled = {"d": {"kernel": params["d"]["kernel"] * scales["d/kernel"][:, None, None], "bias": params["d"]["bias"]}}
    close(model.apply({"params": scaled}, x)[0], y, 1e-4)
    hidden = np.float64(x)
    for i in range(4):
        product = hidden @ np.float64(scaled["d"]["kernel"][i])
        assert product.std() == pytest.approx(1, abs=1e-4)
        hidden = product + np.float64(params["d"]["bias"][i])


@pytest.mark.parametrize("name", LAYERS)
def test_outputs_are_numbered_as_the_columns_of_the_weight(name):
    layer, shape = LAYERS[name]
    x, params = normal(*shape), random_params(layer, shape)
    found = []

    def visit(product):
        found.append((product.axes, product.outputs(product.y), product.y))
        return 0.0, product.y

    visit_contractions(lambda p, x: layer.apply({"params": p}, x), params, x, visit=visit)
    (axes, outputs, y), (w,) = found[0], jax.tree.leaves(params)
    total = np.asarray(jnp.sum(outputs.array, outputs.samples)).reshape(axes.groups, -1)
    np.testing.assert_allclose(total.ravel(), np.float64(y).reshape(-1, total.size).sum(0), rtol=1e-4, atol=1e-3)
    assert total.size == axes.matrix(w).shape[-1] * axes.groups


def test_it_is_differentiable():
    params, x = {"a": normal(4, 4), "b": normal(4, 4)}, normal(6, 4)
    model = lambda params, x: jnp.tanh(x @ params["a"]) @ params["b"]
    visit = lambda product: (jnp.sum(product.y**2), product.y)
    energy = lambda params: sum(visit_contractions(model, params, x, visit=visit)[1].values())
    direct = lambda p: jnp.sum((x @ p["a"]) ** 2) + jnp.sum(model(p, x) ** 2)
    jax.tree.map(close, jax.grad(energy)(params), jax.grad(direct)(params))


# Devices


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_on_a_mesh(kind):
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(jax.sharding.AxisType[kind],) * 2)
    x, params = normal(16, 8, 12), {"a": normal(12, 16), "b": normal(16, 4)}
    model = lambda params, x: jnp.tanh(x) @ params["a"]
    expected = jw.capture(model, params, [x], "a")["a"]
    place = lambda a, *names: jax.device_put(a, NamedSharding(mesh, PartitionSpec(*names)))
    placed = {"a": place(params["a"], None, "y"), "b": place(params["b"], "y", None)}
    with jax.set_mesh(mesh):
        stats = jw.capture(model, placed, [place(x, "x", None, None)], "a")["a"]
    jax.tree.map(close, stats, expected)


# Arguments


def test_progress_shows_a_bar(capsys):
    x = normal(3, 4)
    jw.capture(lambda p, x: x @ p["w"], {"w": normal(4, 2)}, [x, x], progress=True)
    assert "capture" in capsys.readouterr().out


def test_without_inputs_the_means_are_zero():
    stats = jw.capture(lambda p, x: x @ p["w"], {"w": normal(4, 2)}, [normal(0, 4)])["w"]
    assert stats.count == 0
    np.testing.assert_array_equal(stats.mean_abs, np.zeros(4))
    np.testing.assert_array_equal(stats.second_moment, np.zeros((4, 4)))
