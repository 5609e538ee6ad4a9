"""Transformed NNX modules, their graph definitions and state pickle, from one process to another."""

import copy
import os
import pickle
import subprocess
import sys

import cloudpickle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxweights as jw
from jaxweights.levels.paths import STATE

X = jax.random.normal(jax.random.key(1), (4, 6))


class Counter(nnx.Module):
    """Modules of its kind pickle on every version of Flax; layers of old ones hold local functions."""

    def __init__(self, rngs):
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), (6, 6)))
        self.layers = nnx.data([{"kernel": nnx.Param(jax.random.normal(rngs.params(), (6, 3)))}])
        self.calls = 0

    def __call__(self, x):
        self.calls += 1
        return x @ self.kernel[...] @ self.layers[0]["kernel"][...]


class Meta(type(nnx.Module)):
    """A metaclass of the user."""

    def __call__(cls, *args, **kwargs):
        module = super().__call__(*args, **kwargs)
        module.made_by = cls.__name__
        return module


class WithMeta(Counter, metaclass=Meta):
    pass


def limit(step):
    return 1.0 + 0.5 * step


TRANSFORM = jw.Chain(jw.ClipWeights(limit), jw.WeightNorm())


def model_of(kind):
    model = jw.nnx.transformed(kind(nnx.Rngs(0)), TRANSFORM)
    model.eval()
    return model


def test_modules_and_their_parts_load_in_another_process(tmp_path):
    models = [model_of(Counter), model_of(WithMeta)]
    y = [np.asarray(model(X)) for model in models]
    for name, pickler in (("plain", pickle), ("cloud", cloudpickle)):
        (tmp_path / name).write_bytes(pickler.dumps([(m, nnx.split(m)) for m in models]))
    np.save(tmp_path / "x.npy", X)
    program = """
import pickle, sys
from pathlib import Path
import numpy as np
from flax import nnx
import jaxweights as jw

folder = Path(sys.argv[1])
x, outputs = np.load(folder / "x.npy"), []
for name in ("plain", "cloud"):
    for model, (graphdef, state) in pickle.loads((folder / name).read_bytes()):
        again = nnx.merge(graphdef, state)
        assert type(model) is type(again)
        outputs.append([model(x), again(x)])
        if name == "plain":
            assert type(jw.nnx.transformed(jw.nnx.fold(model), jw.ClipWeights(1.0))) is type(model)
            assert (pickle.loads(pickle.dumps(model))(x) == outputs[-1][0]).all()
np.save(folder / "y.npy", outputs)
"""
    environment = os.environ | {"PYTHONPATH": ":".join(sys.path)}
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, env=environment)
    loaded = np.load(tmp_path / "y.npy").reshape(2, 2, 2, *X.shape[:1], 3)  # pickler, model, whole or in parts
    np.testing.assert_allclose(loaded, np.broadcast_to(np.stack(y)[:, None], loaded.shape), rtol=1e-5, atol=1e-6)


def test_copies_have_the_class_and_nothing_in_common():
    model = model_of(Counter)
    y = model(X)
    for copied in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model), nnx.clone(model)):
        assert type(copied) is type(model) and isinstance(copied, Counter)
        np.testing.assert_array_equal(copied(X), y)
        copied.kernel[...] = jnp.ones((6, 6))
        copied.weight_transform.fixed["kernel"]["0.step"][...] = jnp.asarray(7)
        np.testing.assert_array_equal(model(X), y)
    assert copy.deepcopy(type(model)) is type(model) is pickle.loads(pickle.dumps(type(model)))


def test_equal_graph_definitions_after_loading_trace_once():
    traces = []

    @nnx.jit
    def call(model, x):
        traces.append(1)
        return model(x)

    model = model_of(Counter)
    for each in (model, pickle.loads(pickle.dumps(model)), nnx.merge(*pickle.loads(pickle.dumps(nnx.split(model))))):
        call(each, X)
    assert len(traces) == 1


def test_layers_of_flax_pickle_if_they_do_without():
    """With random keys in them (dropout)."""
    layers = nnx.Sequential(nnx.Linear(6, 6, rngs=nnx.Rngs(0)), nnx.Dropout(0.5, rngs=nnx.Rngs(1)))
    try:
        pickle.dumps(layers)
    except (AttributeError, pickle.PicklingError):
        pytest.skip("the layers of this Flax do not pickle")
    model = jw.nnx.transformed(layers, TRANSFORM)
    loaded = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(loaded(X), model(X))
    assert set(nnx.to_pure_dict(nnx.state(loaded))[STATE]["fixed"]["layers"]) == {0}
