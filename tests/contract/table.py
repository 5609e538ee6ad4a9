"""Shared by the contract tests: parametrized cases, weights, tolerances, shardings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, TRANSFORMS
from jax.sharding import NamedSharding, PartitionSpec


def over(cases, slow=lambda case: False):
    params = [pytest.param(c, id=c.name, marks=[pytest.mark.slow] if slow(c) else []) for c in cases]
    return pytest.mark.parametrize("case", params)


every_case, every_transform = over(CASES), over(TRANSFORMS)
"""For quick checks: all cases."""


each_kind = over(CASES, slow=lambda case: case.kind is None)
"""For longer checks: one case of each kind; the others are slow tests."""


each_kind_of_transform = over(TRANSFORMS, slow=lambda case: case.kind is None)


EPS = {jnp.float32: 2e-6, jnp.bfloat16: 2e-2, jnp.float16: 2e-3}


def weight(case, dtype=jnp.float32, seed=0):
    return jax.random.normal(jax.random.key(seed), case.shape).astype(dtype)


def close(a, b, rtol, size=None):
    """Asserts equality up to `rtol` of each value and of the largest value, or of `size`."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * (size or np.abs(b).max(initial=1e-30)))


def same_state(case, lifted, params, a, b, rtol):
    """Asserts that two states are equal. States of estimates may differ by rounding, so compares their effect."""
    if case.idempotent:
        jax.tree.map(lambda a, b: close(a, b, rtol), a, b)
    else:
        jax.tree.map(lambda a, b: close(a, b, rtol), lifted.apply(params, a), lifted.apply(params, b))


def sharding(mesh, shape):
    """Model-parallel sharding: the last two axes over the mesh where it divides them."""
    names = [None] * (len(shape) - 2) + ["x", "y"][-len(shape) :]
    spec = [n if n and d % mesh.shape[n] == 0 else None for n, d in zip(names, shape, strict=True)]
    return NamedSharding(mesh, PartitionSpec(*spec))
