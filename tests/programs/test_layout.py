"""How programs read their weights: as the table says in words, and as gradients confirm."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from programs.constructs import CASES, EXPERTS, case, conv, normal

import jaxweights as jw
from benchmarks.readings import confirmed, gradients, ranks
from jaxweights.models.layout_table import in_words


@functools.cache
def of_all():
    """{case: gradients of its weights}, all in one compiled program."""
    given = {name: (c.params, c.args) for name, c in CASES.items() if c.positions}
    return jax.jit(lambda given: {name: gradients(CASES[name].f, p, *args) for name, (p, args) in given.items()})(given)


@pytest.mark.parametrize("name", CASES)
def test_a_program_tells_how_it_reads_its_weights(name):
    f, args, positions, weights = CASES[name]
    found = jw.layout(f, CASES[name].params, *args)
    expected = {path: words for path, (_, words) in weights.items() if words}
    read = {path: in_words(axes, weights[path][0]) for path, axes in found.items()}
    assert read == {path: words.replace("stack", "batch") for path, words in expected.items()}, found.skipped
    for path, words in expected.items() if positions else ():
        g = of_all()[name][path]
        assert confirmed(g, words, positions), ranks(g, words)


@pytest.mark.parametrize("name", CASES)
def test_every_weight_is_in_the_layout_or_skipped(name):
    found = jw.layout(CASES[name].f, CASES[name].params, *CASES[name].args)
    assert {w.path for w in found.weights} == set(CASES[name].params) == set(found) | set(found.skipped)
    assert not set(found) & set(found.skipped)


def test_gradients_refuse_other_readings():
    g = of_all()["heads"]["w"]
    roles = ("batch", "in", "out")
    readings = {" ".join(of) for of in itertools.product(roles, repeat=3) if {"in", "out"} <= set(of)}
    assert {words for words in readings if confirmed(g, words, positions=2)} == {"in out out"}


LINEAR = (
    *("(out, in)", "moveaxis", "inputs merged", "heads", "heads together", "BTD,SNDH->SBTNH", "batch axis last"),
    *("an expert each", "unstacked", "vmap, the same data", "vmap, data of its own", "scan over layers side by side"),
)
CASES_OF_SIGMA = CASES | {
    "scan over layers side by side": case(lambda p, x: lax.scan(lambda _, w: (None, x @ w), None, p["w"])[1], **EXPERTS)
}


@functools.cache
def jacobians():
    """{case: {entry of the batch: Jacobian of the function in its data, where the other entries are zero}}."""

    def of(name, w):
        f, (x,), _, parameters = CASES_OF_SIGMA[name]
        roles = parameters["w"][1].split()
        lead = [n if role in ("batch", "stack") else 1 for n, role in zip(w.shape, roles, strict=True)]
        alone = np.eye(np.prod(lead), dtype=np.float32).reshape(-1, *lead)
        return jax.vmap(lambda part: jax.jacobian(lambda x: f({"w": w * part}, x).ravel())(x))(alone)

    weights = {name: CASES_OF_SIGMA[name].params["w"] for name in LINEAR}
    return weights, jax.jit(lambda weights: {name: of(name, w) for name, w in weights.items()})(weights)


@pytest.mark.parametrize("name", LINEAR)
def test_the_largest_singular_value_is_that_of_the_function(name):
    """For each matrix of a stack: the Jacobian of the whole function in its data, with the other matrices at zero."""
    weights, all_jacobians = jacobians()
    w, j = weights[name], np.asarray(all_jacobians[name], np.float64)
    expected = np.linalg.norm(j.reshape(len(j), j.shape[1], -1), 2, axis=(1, 2))
    axes = jw.layout(CASES_OF_SIGMA[name].f, {"w": w}, *CASES_OF_SIGMA[name].args)["w"]
    np.testing.assert_allclose(np.ravel(jw.spectral_norm(w, axes=axes)), expected, rtol=1e-5)


def test_the_geometry_of_a_convolution_gives_the_norm_of_its_map():
    strided = lambda p, x: conv(x, p["w"], (2, 1), [(1, 1), (0, 2)], rhs_dilation=(1, 2))
    w, x = normal(3, 2, 3, 4), normal(1, 5, 6, 3)
    geometry = jw.layout(strided, {"w": w}, x).convolutions["w"]
    assert geometry.input_shape == (5, 6, 3)
    j = jax.jit(jax.jacobian(lambda x: strided({"w": w}, x).ravel()))(x)
    options = {"strides": geometry.strides, "padding": geometry.pads, "dilation": geometry.dilation}
    ours = jw.conv_spectral_norm(w, geometry.input_shape, **options)
    np.testing.assert_allclose(ours, np.linalg.norm(np.asarray(j, np.float64).reshape(len(j), -1), 2), rtol=1e-4)


NOT_IN_A_PRODUCT = {
    "a table": (lambda p, x, i: p["w"][i].sum() + x, (7, 4), "looked up"),
    "one row of a table": (lambda p, x, i: lax.dynamic_index_in_dim(p["w"], i[0], 0) + x, (7, 4), "looked up"),
    "a bias": (lambda p, x, i: x + p["w"], (4,), "added"),
    "embeddings of the first positions": (lambda p, x, i: x + p["w"][:2], (7, 4), "added"),
    "a scale": (lambda p, x, i: x * p["w"], (4,), "scales"),
    "a token": (lambda p, x, i: jnp.concatenate([p["w"], x]), (1, 4), "joined to data"),
    "the scale of a weight": (lambda p, x, i: x @ (p["v"] * p["w"]), (4,), "scales a weight"),
    "a weight that is not there": (lambda p, x, i: x, (4, 4), "not used"),
}


@pytest.mark.parametrize("name", NOT_IN_A_PRODUCT)
def test_what_meets_data_in_no_product_says_what_it_does(name):
    f, shape, why = NOT_IN_A_PRODUCT[name]
    params = {"w": normal(*shape), "v": normal(4, 4)}
    assert jw.layout(f, params, normal(2, 4), np.array([1, 3])).skipped["w"] == why


NOT_FOLLOWED = {
    "times itself": (lambda w, x: x @ (w @ w), "dot_general"),
    "orthogonalized": (lambda w, x: x @ jnp.linalg.qr(w)[0], "qr"),
    "sorted": (lambda w, x: x @ jnp.sort(w, 0), "sort"),
    "in other coordinates": (lambda w, x: jnp.fft.fft(x) @ jnp.fft.fft(w), "fft"),
    "written into": (lambda w, x: x @ w.at[0].set(0), "scatter"),
    "added to its transpose": (lambda w, x: x @ (w + w.T), "in two ways"),
    "from both sides": (lambda w, x: x @ w + x @ w.T, "in two ways"),
    "with an axis on two sides": (lambda w, x: jnp.tile(x, 2) @ w.reshape(8, 2), "axis 1 is input and output"),
    "cut across its axes": (lambda w, x: x @ w.reshape(8, 2)[:4], "slice"),
    "in a step of a Newton method": (lambda w, x: jnp.linalg.solve(w, x.T), "solve"),
}


@pytest.mark.parametrize("name", NOT_FOLLOWED)
def test_what_cannot_be_followed_says_why(name):
    f, why = NOT_FOLLOWED[name]
    found = jw.layout(lambda p, x: f(p["w"], x), {"w": normal(4, 4)}, normal(2, 4))
    assert not found and why in found.skipped["w"]


def test_a_stack_that_may_be_one_matrix_says_so():
    """Under the same name there is a vmap over samples and one over layers: which axis it is over, nothing tells."""
    params = {"a": normal(6, 4), "w": normal(3, 6, 5)}

    def f(p, x):
        h = jax.vmap(lambda x: jnp.tanh(p["a"] @ x))(x)
        return jax.vmap(lambda w: h @ w)(p["w"])

    why = {w.path: w.why for w in jw.layout(f, params, normal(2, 4)).weights}
    assert why == {"a": "product", "w": "product, perhaps a stack under vmap"}
    alone = jw.layout(lambda p, x: jax.vmap(lambda w: x @ w)(p["w"]), {"w": params["w"]}, normal(2, 6))
    assert [w.why for w in alone.weights] == ["product, a stack under vmap"]
