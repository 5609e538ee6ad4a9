"""Hyper-parameters may be numbers, arrays, tracers or schedules."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from bad_input.vocabulary import KEY, W, step, tree

import jaxweights as jw

SCHEDULED = (
    *(jw.ClipWeights, jw.ClipNorm, jw.projections.ClipRange, jw.projections.ClipSingularValues),
    *(
        jw.projections.Simplex,
        jw.projections.L1Ball,
        jw.projections.L1Sphere,
        jw.projections.Orthogonalize,
        jw.Sparsify,
        jw.Prune,
    ),
)
NUMBERS = {
    "clip_weights": jw.clip_weights,
    "clip_norm": jw.clip_norm,
    "clip_range": lambda w, n: jw.projections.clip_range(w, -n, n),
    "bound_norm": lambda w, n: jw.projections.bound_norm(w, n, n, rate=n),
    "project_simplex": jw.projections.project_simplex,
    "project_l1_ball": jw.projections.project_l1_ball,
    "project_l1_sphere": jw.projections.project_l1_sphere,
    "bound_sum": lambda w, n: jw.projections.bound_sum(w, -n, n),
    "clip_singular_values": jw.projections.clip_singular_values,
    "orthogonalize": lambda w, n: jw.projections.orthogonalize(w[:, :3], gain=n),
    "sparsify": jw.sparsify,
    "magnitude_mask": jw.magnitude_mask,
    "wanda_mask": lambda w, n: jw.wanda_mask(w, w[:, 0], n),
    "sparsegpt": lambda w, n: jw.sparsegpt(w, w @ w.T, n, damping=n)[0],
    "weight_decay": lambda w, n: jw.weight_decay(w, w, n),
    "weight_standardize": lambda w, n: jw.weight_standardize(w, eps=n),
    "batch_norm": lambda w, n: jw.batch_norm(w, eps=n),
    "layer_norm": lambda w, n: jw.layer_norm(w, eps=n),
    "rms_norm": lambda w, n: jw.rms_norm(w, eps=n),
    "group_norm": lambda w, n: jw.group_norm(w, n_groups=2, eps=n),
    "fold_batch_norm": lambda w, n: jw.fold_batch_norm(w, mean=w[0], var=w[0], eps=n)[1],
    "running_stats": lambda w, n: jw.running_stats((w[0], w[0]), (w[1], w[1], w[1]), n)[0],
    **{t.__name__: lambda w, n, t=t: applied(t(n), w) for t in SCHEDULED},
}


def applied(transform, w):
    lifted = jw.on_tree(transform)
    state = lifted.update(tree(w), lifted.init(tree(w), KEY))
    return lifted.apply(tree(w), state)["encoder"]["kernel"]


def check_numbers(name, atol=0.0, options=None):
    """0.25 gives the same result as a Python float, as an array, and traced."""
    numbers = (0.25, np.float32(0.25), np.array(0.25, np.float32), jnp.array(0.25))
    run = lambda w, traced: [NUMBERS[name](w, number) for number in (*numbers, traced)]
    expected, *found = jax.jit(run, compiler_options=options)(W, 0.25)
    for number, new in zip(("numpy scalar", "numpy", "array", "traced"), found, strict=True):
        np.testing.assert_allclose(new, expected, rtol=1e-6, atol=atol, err_msg=number)


@pytest.mark.parametrize("name", NUMBERS)
def test_hyper_parameters_may_be_arrays_traced_or_not(name):
    # Fast compilation rounds the two forms of 1/√(var + eps) differently, so entries at the mean are not exactly 0.
    check_numbers(name, atol=2e-7 if name in ("layer_norm", "group_norm") else 0.0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["layer_norm", "group_norm"])
def test_an_eps_may_be_an_array_traced_or_not(name, optimizing):
    check_numbers(name, options=optimizing)


@pytest.mark.parametrize("name", [t.__name__ for t in SCHEDULED])
def test_hyper_parameters_may_be_schedules(name):
    schedules = {
        "float": lambda step: 0.25,
        "numpy": lambda step: np.float32(0.25),
        "array": lambda step: 0 * step + 0.25,
        "optax": optax.constant_schedule(0.25),
    }
    run = jax.jit(lambda w: [NUMBERS[name](w, number) for number in (0.25, *schedules.values())])
    expected, *found = run(W)
    for schedule, new in zip(schedules, found, strict=True):
        np.testing.assert_allclose(new, expected, rtol=1e-6, err_msg=schedule)


def test_injected_hyper_parameters_pass():
    tx = optax.inject_hyperparams(jw.add_weight_decay)(rate=optax.constant_schedule(0.25))
    updates, _ = jax.jit(lambda w: step(tx, tree(w), tree(w)))(W)
    np.testing.assert_allclose(updates["encoder"]["kernel"], 1.25 * W)


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.uint8, jnp.int16, jnp.uint32])
def test_indices_of_every_integer_dtype_pass(dtype):
    codebook = jnp.arange(200.0)
    np.testing.assert_array_equal(jw.share(codebook, jnp.array([0, 100], dtype)), [0, 100])


@pytest.mark.parametrize("seed", [0, 7, 2**64 + 7])
def test_hash_seeds_of_every_size_pass(seed):
    np.testing.assert_array_equal(jw.hash_index((50,), 5, seed), jw.hash_index((50,), 5, seed % 2**64))
