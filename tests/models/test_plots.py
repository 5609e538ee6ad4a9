"""Plots show their input data."""

import builtins

import jax.numpy as jnp
import matplotlib
import numpy as np
import pytest

matplotlib.use("Agg")
from matplotlib import pyplot as plt

import jaxweights as jw

PARAMS = {"a": {"kernel": jnp.eye(8), "bias": jnp.ones(8)}, "b": {"kernel": jnp.ones((4, 2))}}


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def test_bars_are_densities():
    for params in (PARAMS, jw.summarize(PARAMS, "**/kernel")):
        panel = jw.plots.plot_density(params)
        assert [t.get_text() for t in panel.get_yticklabels()] == ["a/kernel", "b/kernel"]
        assert [p.get_width() for p in panel.patches[2:]] == [12.5, 100]


def test_a_mask_is_drawn_as_the_matrix():
    w = np.float32(np.arange(24).reshape(4, 6) % 3 == 0)
    given = plt.figure().subplots()
    for mask in (jnp.asarray(w), w > 0, jw.sparse.pack_blocks(jnp.asarray(w), block=(2, 2))):
        panel = jw.plots.plot_mask(mask, panel=given)
        assert panel is given
        np.testing.assert_array_equal(panel.images[-1].get_array(), w)
    stack = jw.plots.plot_mask(jnp.stack([w, 0 * w]), axes=jw.Axes(batch=0))
    np.testing.assert_array_equal(stack.images[0].get_array(), w)


def test_without_matplotlib_it_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        jw.plots.plot_density(PARAMS)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        jw.plots.plot_mask(jnp.eye(2))
