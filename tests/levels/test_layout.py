"""`layout=` at every level: the program's axes, and by default the weights that meet data in a product."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxweights as jw


class Tokens(nn.Module):
    """A lookup table, a class token, positions, projections under unusual names, and a kernel (out, in)."""

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(11, 8, name="table")(tokens)
        start = self.param("cls_token", nn.initializers.normal(), (1, 1, 8))
        x = jnp.concatenate([jnp.broadcast_to(start, (len(x), 1, 8)), x], 1)
        x = x + self.param("pos_embedding", nn.initializers.normal(), (1, x.shape[1], 8))
        q, k = (nn.DenseGeneral((2, 4), use_bias=False, name=name)(x) for name in ("q_proj", "k_proj"))
        x = jnp.einsum("bthd,bshd->bts", q, k) @ x
        return x @ self.param("head", nn.initializers.normal(), (3, 8)).T


MODEL, X = Tokens(), jnp.arange(10).reshape(2, 5)
PARAMS = MODEL.init(jax.random.key(0), X)["params"]
LAYOUT = jw.linen.layout(MODEL, {"params": PARAMS}, X)
PRODUCTS = {"q_proj/kernel", "k_proj/kernel", "head"}


def operator_norms(params):
    """σ of the three layers, as they map an input vector to all of their outputs."""
    matrices = {path: params[path]["kernel"].reshape(8, 8) for path in ("q_proj", "k_proj")} | {"head": params["head"]}
    return {path: np.linalg.svd(np.asarray(m, np.float64), compute_uv=False)[0] for path, m in matrices.items()}


def test_a_tree_takes_the_axes_and_the_weights_of_the_program():
    normalize = jw.on_tree(jw.SpectralNorm(), layout=LAYOUT)
    assert set(normalize.selected(PARAMS)) == PRODUCTS
    new = normalize.apply(PARAMS, normalize.init(PARAMS, jax.random.key(1)))
    np.testing.assert_allclose(list(operator_norms(new).values()), 1, atol=1e-3)
    chex.assert_trees_all_equal(new["table"], PARAMS["table"])


def test_an_optax_chain_takes_them():
    tx = optax.chain(optax.sgd(0.1), jw.project(jw.SpectralNorm(), layout=LAYOUT))
    updates, _ = tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    new = optax.apply_updates(PARAMS, updates)
    np.testing.assert_allclose(list(operator_norms(new).values()), 1, atol=1e-3)
    chex.assert_trees_all_close(new["table"], jax.tree.map(lambda w: 0.9 * w, PARAMS["table"]))
    decay = jw.add_weight_decay(1.0, layout=LAYOUT)
    decayed, _ = decay.update(jax.tree.map(jnp.zeros_like, PARAMS), decay.init(PARAMS), PARAMS)
    chex.assert_trees_all_equal(decayed["head"], PARAMS["head"])
    assert not decayed["pos_embedding"].any() and not decayed["table"]["embedding"].any()
    sparse = jw.confine(optax.sgd(0.1), jw.Prune(0.5), layout=LAYOUT)
    assert set(sparse.init(PARAMS).transform.fixed) == PRODUCTS


def test_a_linen_module_takes_them():
    model = jw.linen.Transformed(MODEL, jw.SpectralNorm(), layout=LAYOUT)
    variables = model.init(jax.random.key(0), X)
    plain = jw.linen.fold(model, variables)["params"]
    np.testing.assert_allclose(list(operator_norms(plain).values()), 1, atol=1e-3)
    chex.assert_trees_all_equal(plain["cls_token"], variables["params"]["cls_token"])
    np.testing.assert_allclose(model.apply(variables, X), MODEL.apply({"params": plain}, X), atol=1e-5)


def test_an_nnx_module_takes_them():
    class Scores(nnx.Module):
        def __init__(self, rngs):
            self.start = nnx.Param(jax.random.normal(rngs.params(), (1, 8)))
            self.project = nnx.Param(jax.random.normal(rngs.params(), (3, 8, 2, 4)))

        def __call__(self, x):
            return jnp.einsum("td,sdnh->stnh", x + self.start, self.project)

    model = Scores(nnx.Rngs(0))
    layout = jw.nnx.layout(model, jax.ShapeDtypeStruct((5, 8), jnp.float32))
    assert set(layout) == {"project"}
    new = jw.nnx.fold(jw.nnx.transformed(model, jw.SpectralNorm(), layout=layout))
    matrix = np.moveaxis(np.asarray(new.project[...], np.float64), 1, 0).reshape(8, -1)
    np.testing.assert_allclose(np.linalg.svd(matrix, compute_uv=False)[0], 1, atol=1e-3)
    np.testing.assert_array_equal(new.start[...], model.start[...])


def test_initialization_takes_them():
    # The head maps 8 inputs to 3 outputs: He's variance is 2/8, where (in, out) would make it 2/3.
    big = jax.tree.map(lambda w: jnp.tile(w, (1, 400)), {"head": PARAMS["head"]})
    read = jw.layout(lambda p, x: x @ p["head"].T, big, jnp.ones((1, 3200)))
    new = jw.reinitialize(big, jax.random.key(0), {"head": jw.he_normal}, layout=read)
    np.testing.assert_allclose(new["head"].std(), np.sqrt(2 / 3200), rtol=0.03)
    # The head's inputs grow with the width and its outputs do not: muP divides its initial weights by √(r_in).
    narrow = {"head": jax.ShapeDtypeStruct((3, 800), jnp.float32)}
    np.testing.assert_allclose(jw.mup_init(big, narrow, layout=read)["head"], big["head"] / 2, rtol=1e-6)


def test_convolutions_take_their_geometry():
    model = nn.Sequential([nn.Conv(4, (3, 3), strides=2), nn.relu, nn.Conv(5, (3, 3), padding="VALID")])
    x = jnp.ones((2, 12, 10, 3))
    params = model.init(jax.random.key(0), x)["params"]
    layout = jw.linen.layout(model, {"params": params}, x)
    tree = jw.on_tree(jw.Chain(jw.ClipWeights(9.0), jw.ConvSpectralNorm(n_steps=30)), layout=layout)
    new = tree.apply(params, tree.init(params, jax.random.key(0)))
    conv = jax.lax.conv_general_dilated
    numbers = ("NHWC", "HWIO", "NHWC")
    for name, shape, strides, padding in (
        ("layers_0", (1, 12, 10, 3), (2, 2), "SAME"),
        ("layers_2", (1, 6, 5, 4), (1, 1), "VALID"),
    ):
        kernel = new[name]["kernel"]
        apply = lambda x, k=kernel, s=strides, p=padding: conv(x, k, s, p, dimension_numbers=numbers)
        jacobian = jax.jacobian(apply)(jnp.zeros(shape))
        matrix = np.asarray(jacobian, np.float64).reshape(-1, np.prod(shape))
        np.testing.assert_allclose(np.linalg.svd(matrix, compute_uv=False)[0], 1, atol=1e-2)


def test_part_of_a_layout():
    def f(params, x):
        return x @ params["a"]["k"] + params["b"]

    read = lambda: jw.layout(f, {"a": {"k": jnp.ones((2, 3))}, "b": jnp.ones(3)}, jnp.ones(2))
    assert dict(read().within("a")) == {"k": jw.Axes(0, 1)}
    assert hash(read()) == hash(read()) and read() == read()
    with pytest.raises(KeyError):
        read().within("c")
