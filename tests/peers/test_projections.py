"""Every optax projection and Keras constraint has an equivalent here, per output unit by `axes`."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxweights as jw

V = np.random.default_rng(0).normal(size=7).astype(np.float32)
A = np.random.default_rng(1).normal(size=7).astype(np.float32)
K = np.random.default_rng(2).normal(size=(3, 3, 4, 5)).astype(np.float32)
EPS = 1e-7  # Keras adds it to the norms it divides by

OPTAX = {
    "box": (lambda p: p.projection_box(V, -0.5, 0.25), lambda: jw.projections.clip_range(V, -0.5, 0.25)),
    "hypercube": (lambda p: p.projection_hypercube(V, 0.5), lambda: jw.projections.clip_range(V, 0.0, 0.5)),
    "non_negative": (lambda p: p.projection_non_negative(V), lambda: jw.projections.clip_range(V, 0.0)),
    "linf_ball": (lambda p: p.projection_linf_ball(V, 0.5), lambda: jw.clip_weights(V, 0.5)),
    "l2_ball": (lambda p: p.projection_l2_ball(V, 0.5), lambda: jw.clip_norm(V, 0.5)),
    "l2_sphere": (lambda p: p.projection_l2_sphere(V, 9.0), lambda: jw.projections.bound_norm(V, 9.0, 9.0)),
    "l1_ball": (lambda p: p.projection_l1_ball(V, 0.5), lambda: jw.projections.project_l1_ball(V, 0.5)),
    "l1_sphere": (lambda p: p.projection_l1_sphere(V, 9.0), lambda: jw.projections.project_l1_sphere(V, 9.0)),
    "simplex": (lambda p: p.projection_simplex(V, 2.0), lambda: jw.projections.project_simplex(V, 2.0)),
    "hyperplane": (
        lambda p: p.projection_hyperplane(V, A, 0.5),
        lambda: jw.projections.bound_sum(V, 0.5, 0.5, normal=A),
    ),
    "halfspace": (
        lambda p: p.projection_halfspace(V, A, -0.5),
        lambda: jw.projections.bound_sum(V, high=-0.5, normal=A),
    ),
    "vector": (lambda p: p.projection_vector(V, A), lambda: V - jw.projections.bound_sum(V, 0.0, 0.0, normal=A)),
}


def test_optax():
    there = [name for name in OPTAX if hasattr(optax.projections, f"projection_{name}")]
    theirs = jax.jit(lambda: {name: OPTAX[name][0](optax.projections) for name in there})()
    ours = jax.jit(lambda: {name: OPTAX[name][1]() for name in there})()
    for name in there:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_every_projection_of_optax_is_in_the_table():
    there = {n.removeprefix("projection_") for n in dir(optax.projections) if n.startswith("projection_")}
    assert there <= set(OPTAX)


def norm(w, axis):
    return np.sqrt(np.sum(np.square(np.float64(w)), axis, keepdims=True))


@pytest.mark.parametrize("axis", [0, (0, 1, 2)], ids=["dense", "convolution"])
def test_keras(axis):
    """The formulas of keras.constraints with their `axis`, which matches our default for (..., in, out) kernels."""
    w = K if axis == (0, 1, 2) else K[0, 0]
    n = norm(w, axis)
    middle = float(np.median(n))
    for ours, expected in (
        (jw.clip_norm(w, middle), w * np.clip(n, 0, middle) / (EPS + n)),  # MaxNorm
        (jw.projections.bound_norm(w, 1.0, 1.0), w / (EPS + n)),  # UnitNorm
        (jw.projections.clip_range(w, 0.0), w * (w >= 0)),  # NonNeg
        (  # MinMaxNorm
            jw.projections.bound_norm(w, middle, 2 * middle, rate=0.5),
            w * (0.5 * np.clip(n, middle, 2 * middle) + 0.5 * n) / (EPS + n),
        ),
    ):
        np.testing.assert_allclose(ours, expected, rtol=2e-6, atol=1e-7)


def test_optax_takes_a_tree_as_one_vector_and_we_project_each_unit():
    params = {"kernel": jnp.asarray(K), "head_kernel": jnp.asarray(K[0, 0])}
    tx = jw.project(jw.ClipNorm(1.0))
    still = {n: jnp.zeros_like(w) for n, w in params.items()}
    new = jax.jit(lambda p: optax.apply_updates(p, tx.update(still, tx.init(p), p)[0]))(params)
    assert norm(K, (0, 1, 2)).min() > 1
    np.testing.assert_allclose(norm(new["kernel"], (0, 1, 2)), 1, rtol=1e-6)
    np.testing.assert_allclose(norm(new["head_kernel"], 0), np.minimum(1, norm(params["head_kernel"], 0)), rtol=1e-6)
    together = optax.projections.projection_l2_ball(params, 1.0)
    assert norm(np.concatenate([np.ravel(w) for w in together.values()]), 0) == pytest.approx(1, rel=1e-5)
