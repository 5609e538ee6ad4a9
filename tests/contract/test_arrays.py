"""Every case of `cases.py` on arrays: dtypes, vmap, values and gradients at the edges of float32 and float16."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, KINDS
from contract.table import EPS, close, each_kind, every_case, weight


def value_and_gradient(case, w, linear, square):
    """Returns w', and the value and gradient of mean(linear·w' + (square·w')²)."""

    def loss(w):
        new = case.call(w)
        wide = new.astype(jnp.float32)
        return jnp.sum(linear * wide + (square * wide) ** 2) / w.size, new

    (value, new), gradient = jax.value_and_grad(loss, has_aux=True)(w)
    return new, value, gradient


def edges(w):
    """{name: (weight at an edge of float32, linear, square)}, with loss factors that stay finite there."""
    weights = {
        "ordinary": w,
        "zero": jnp.zeros_like(w),
        "constant": jnp.full_like(w, 0.5),
        "huge": 1e30 * jnp.sign(w),
        "tiny": 1e-30 * w,
    }
    return {name: (edge, *terms(edge, name == "tiny")) for name, edge in weights.items()}


def terms(w, linear=False):
    """The factors of the linear and the square term; one of them is 0."""
    square = 0.0 if linear else 1 / np.abs(np.asarray(w, np.float32)).max(initial=1e-6)
    return np.float32(linear), np.float32(square)


@pytest.fixture(autouse=True)
def strict_promotion():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


def test_one_case_stands_for_each_kind():
    assert sorted(c.kind for c in CASES if c.kind) == sorted(KINDS)


@every_case
def test_a_stack_of_weights_at_the_edges_is_finite_and_vmap_is_a_loop(case):
    """In a single program, to minimize compile time."""
    arguments = [jnp.stack(column) for column in zip(*edges(weight(case)).values(), strict=True)]

    @jax.jit
    def run(ws, *terms):
        return jax.vmap(functools.partial(value_and_gradient, case))(ws, *terms), case.call(ws[0])

    (new, values, gradients), alone = run(*arguments)
    chex.assert_trees_all_equal_shapes_and_dtypes(new, gradients, arguments[0])
    chex.assert_tree_all_finite((new, values, gradients))
    close(new[0], alone, 1e-5)


@every_case
@pytest.mark.parametrize("dtype", EPS)
def test_shape_and_dtype_are_kept(case, dtype):
    w = jax.ShapeDtypeStruct(case.shape, dtype)
    new, _, gradient = jax.eval_shape(lambda w: value_and_gradient(case, w, 1.0, 0.0), w)
    assert (w.shape, w.dtype) == (new.shape, new.dtype) == (gradient.shape, gradient.dtype)


@each_kind
def test_16_bits_agree_with_32_and_stay_finite(case):
    """In a single program: at 16 bits, at 32, and the gradient at the largest numbers of float16."""
    w = weight(case, jnp.bfloat16).astype(jnp.float16)
    huge = 6e4 * jnp.sign(w)

    @jax.jit
    def run(w, huge, *terms):
        return [case.call(w.astype(dtype)) for dtype in EPS], value_and_gradient(case, huge, *terms)

    new, at_the_edge = run(w, huge, *terms(huge))
    for (dtype, eps), value in zip(EPS.items(), new, strict=True):
        assert value.dtype == dtype and value.shape == w.shape
        close(value, new[0], 2 * eps)  # the first is of 32 bits
    chex.assert_tree_all_finite(at_the_edge)
