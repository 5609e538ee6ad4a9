"""Visits of products: their order, and weights used in several ways."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxweights.programs.contractions.found import Found
from jaxweights.programs.contractions.visit import visit_contractions

KEY = jax.random.key(0)


def count(product):
    """Number of samples seen by each layer."""
    lead = [n for a, n in enumerate(product.w.shape) if a in product.outputs(product.y).batch]
    return jnp.ones(lead, jnp.int32), product.y


def test_what_is_found_keeps_its_order():
    params, x = {k: jnp.ones((4, 4)) for k in "abc"}, jnp.ones((2, 4))
    run = lambda params, x: visit_contractions(lambda p, x: x @ p["c"] @ p["a"] @ p["b"], params, x, visit=count)[1]
    for found in (run(params, x), jax.jit(run)(params, x), jax.eval_shape(run, params, x)):
        assert list(found) == ["c", "a", "b"]


def test_found_is_a_pytree_and_adds():
    found = Found({"b": (1, 2), "a": 3})
    found.add({"a": 4, "c": 5})
    assert jax.tree.map(lambda a: a + 1, found) == {"b": (2, 3), "a": 8, "c": 6}
    assert list(jax.tree.map(lambda a: a, found)) == ["b", "a", "c"]


def test_a_stack_that_is_scanned_in_two_orders_counts_both():
    """A stack of 3 x 2 layers, with the outer axis first, then with the inner axis first."""
    kernels, x = jax.random.normal(KEY, (3, 2, 4, 4)) / 2, jnp.ones((5, 4))

    def model(params, x):
        inner = lambda x, w: (x @ w, None)
        outer = lambda x, w: jax.lax.scan(inner, x, w)
        x, _ = jax.lax.scan(outer, x, params)
        return jax.lax.scan(outer, x, jnp.swapaxes(params, 0, 1))[0]

    visit = lambda product: (jnp.sum(product.x, 0), product.y)
    y, found = jax.jit(lambda params: visit_contractions(model, params, x, visit=visit))(kernels)
    expected, hidden = np.zeros((3, 2, 4)), np.float64(x)
    for i, j in [*np.ndindex(3, 2), *((i, j) for j in range(2) for i in range(3))]:
        expected[i, j] += hidden.sum(0)
        hidden = hidden @ np.float64(kernels[i, j])
    np.testing.assert_allclose(y, hidden, rtol=1e-4)
    (sums,) = found.values()
    np.testing.assert_allclose(sums, expected, rtol=1e-4, atol=1e-4)
