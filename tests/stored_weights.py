"""Shared by the tests of stored weights: weights that fit every form, comparison, and what a program computes."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
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


def slow_unless(quick, *values):
    return pytest.param(*values, marks=() if quick else pytest.mark.slow)


READINGS = {
    "dense": ((24, 6), None),
    "output first": ((6, 24), jw.Axes(input=1, output=0)),
    "stack behind": ((24, 6, 2), jw.Axes(input=0, output=1, batch=2)),
    "heads": ((24, 2, 3), jw.axes.ATTENTION_IN),
    "out-projection of heads": ((2, 12, 6), jw.axes.ATTENTION_OUT),
    "depthwise stack": ((2, 3, 3, 4, 6), jw.axes.depthwise(3).stacked()),
}
"""{name: (shape, axes)} of weights with 24 inputs."""


def clusters(shape, k, *, units=(), zeros=False, seed=0):
    """(codebook, index) with every value in use, and zeros if they are asked for."""
    rng = np.random.default_rng(seed)
    index = rng.permutation(np.arange(np.prod(shape)) % (k + zeros)).reshape(shape) - zeros
    return rng.normal(size=(*units, k)).astype(np.float32), index


def dense_of(codebook, index, unit=0):
    """The weight in NumPy; `unit` numbers the codebook of each entry."""
    books = codebook.reshape(-1, codebook.shape[-1])
    return np.where(index < 0, 0, books[np.broadcast_to(unit, index.shape), index])


def error(y, x, dense):
    """The largest error of x @ w in units of |x| @ |w|: a float32 sum of K products errs by K·2^-24 at most."""
    x, dense = np.asarray(x, np.float64), np.asarray(dense, np.float64)
    return np.max(np.abs(np.asarray(y, np.float64) - x @ dense) / (np.abs(x) @ np.abs(dense) + 1e-30), initial=0)
