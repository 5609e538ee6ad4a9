"""Packages that write and read the formats, for comparison; and files and weights to compare."""

import importlib
import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxweights as jw
from jaxweights.files import safetensors
from jaxweights.files.writing import Piece


def oracle(name):
    """The package of this name, or a skip that says so."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module(name)
        except ImportError as e:
            pytest.skip(f"needs the package {name.partition('.')[0]}: {e}")


def write(folder, tensors, config=None):
    """A file of plain tensors, with a config.json beside it if there is a config."""
    safetensors.write(folder / "m.safetensors", [Piece.of(tensors)], {})
    if config is not None:
        (folder / "config.json").write_text(json.dumps({"model_type": "x", "quantization_config": config}))
    return folder / "m.safetensors"


def halves(bits, block=32, **options):
    """Integers with scales in float16, which most files have."""
    return jw.formats.integers(bits, block=block, scale="float16", **options)


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@jax.jit
def dense(tree):
    """The tree with stored weights as float32 arrays, by one compiled program."""
    is_stored = lambda a: hasattr(type(a), "todense")
    return jax.tree.map(lambda a: a.todense().astype(jnp.float32) if is_stored(a) else a, tree, is_leaf=is_stored)


def leaves(tree):
    return jax.tree.leaves(tree, is_leaf=lambda a: hasattr(type(a), "todense"))


def bits_of(a):
    a = np.asarray(a)
    return a.shape, str(a.dtype), a.tobytes()


def assert_same(one, other):
    """Checks that two trees are the same, bit for bit, with what is static."""
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(other), strict=True):
        assert bits_of(a) == bits_of(b), jax.tree_util.keystr(path)
