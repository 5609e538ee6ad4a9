"""Initializers against JAX's, draw by draw."""

import functools

import jax
import numpy as np
from jax.nn import initializers as peer

import jaxweights as jw
from jaxweights.core.axes import Axes

init = jw.initializers
KEY = jax.random.key(11)
SHAPE = (3, 3, 8, 12)
partial = functools.partial

SAME_DRAWS = {
    "zeros": (init.zeros, peer.zeros),
    "ones": (init.ones, peer.ones),
    "constant": (partial(init.constant, value=0.3), peer.constant(0.3)),
    "normal": (partial(init.normal, std=0.02), peer.normal(0.02)),
    "uniform": (partial(init.uniform, high=0.02), peer.uniform(0.02)),
    "truncated_normal": (
        partial(init.truncated_normal, std=0.02, low=-1.0, high=3.0),
        peer.truncated_normal(0.02, lower=-1.0, upper=3.0),
    ),
    "xavier_normal": (partial(jw.xavier_normal, truncated=True), peer.xavier_normal()),
    "xavier_uniform": (jw.xavier_uniform, peer.xavier_uniform()),
    "he_normal": (partial(jw.he_normal, truncated=True), peer.he_normal()),
    "he_uniform": (jw.he_uniform, peer.he_uniform()),
    "lecun_normal": (partial(jw.initializers.lecun_normal, truncated=True), peer.lecun_normal()),
    "lecun_uniform": (jw.initializers.lecun_uniform, peer.lecun_uniform()),
    "orthogonal": (partial(init.orthogonal, gain=2.0), peer.orthogonal(2.0)),
    "delta_orthogonal": (init.delta_orthogonal, peer.delta_orthogonal()),
    **{
        f"variance_scaling {mode} {distribution}": (
            partial(init.variance_scaling, scale=3.0, mode=mode, distribution=distribution),
            peer.variance_scaling(3.0, mode, distribution),
        )
        for mode in ("fan_in", "fan_out", "fan_avg", "fan_geo_avg")
        for distribution in ("normal", "truncated_normal", "uniform")
    },
    "axes": (
        partial(jw.he_uniform, axes=Axes(input=2, output=(1, 3), batch=0)),
        peer.he_uniform(in_axis=2, out_axis=(1, 3), batch_axis=0),
    ),
}


def test_all_of_jax_is_there():
    """Glorot is Xavier and Kaiming is He."""
    public = [n for n in dir(peer) if not n.startswith("_") and n != "Initializer"]
    names = {n.replace("glorot", "xavier").replace("kaiming", "he") for n in public}
    assert names <= set(init.__all__)


def test_jax_draws_the_same():
    draw = lambda which: jax.jit(lambda: {name: pair[which](KEY, SHAPE) for name, pair in SAME_DRAWS.items()})()
    theirs = draw(1)
    for name, w in draw(0).items():
        np.testing.assert_allclose(w, theirs[name], rtol=1e-5, atol=1e-7, err_msg=name)
