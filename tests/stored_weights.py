"""Shared by the tests of stored weights: weights that fit every form, comparison, and what a program computes."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr

import jaxweights as jw
from jaxweights.core.axes import Reading
from jaxweights.core.layer import Layer


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def thin(w, axes=None):
    """`w` with two of every four rows."""
    shape = w.shape
    r = Reading.of(axes, shape)
    _, axes = Layer.of(axes, shape).with_batch([shape[a] for a in sorted(r.batch)])
    matrix = axes.matrix(w)
    return axes.weight(matrix * (jnp.arange(matrix.shape[-2]) % 4 > 1)[:, None], shape)


STORES = {
    "quantized": lambda w, axes=None: jw.quantize(w, 8, axes=axes),
    "packed": lambda w, axes=None: jw.sparse.pack(thin(w, axes), axes=axes),
    "blocks": lambda w, axes=None: jw.sparse.pack_blocks(thin(w, axes), block=(4, 4), axes=axes),
    "clustered": lambda w, axes=None: jw.store_clusters(*jw.cluster(w, 16), axes=axes, has_zeros=False),
    "bcoo": lambda w, axes=None: jw.sparse.to_bcoo(thin(w, axes), axes=axes),
    "csr": lambda w, axes=None: jw.sparse.to_csr(thin(w, axes), axes=axes),
}
OURS = ["quantized", "packed", "blocks", "clustered"]


def same(found, expected, tolerance=2e-5):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype), path
        a, b = np.float64(a), np.float64(b)
        limit = tolerance * np.abs(b).max(initial=1, where=np.isfinite(b))
        np.testing.assert_allclose(a, b, rtol=0, atol=limit, err_msg=jax.tree_util.keystr(path))


def arrays_in(program):
    """All arrays that a program computes, those of programs within it included."""
    for eqn in program.eqns:
        yield from (v.aval for v in eqn.outvars)
        for p in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda p: isinstance(p, Jaxpr | ClosedJaxpr)):
            if isinstance(p, Jaxpr | ClosedJaxpr):
                yield from arrays_in(p)


def floats_of_size(f, size, *args):
    """The floating-point arrays of at least this size that f(*args) computes."""
    found = arrays_in(jax.make_jaxpr(f)(*args).jaxpr)
    return [a for a in found if jnp.issubdtype(a.dtype, jnp.floating) and math.prod(a.shape) >= size]
