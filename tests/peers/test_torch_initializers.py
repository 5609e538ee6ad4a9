"""Initializers against torch's, exactly or by mean and variance."""

import math
from functools import partial

import jax
import numpy as np
import pytest

import jaxweights as jw
from jaxweights.core.axes import depthwise

init = jw.initializers
KEY = jax.random.key(11)
torch = pytest.importorskip("torch", reason="torch is an oracle here: pip install 'jaxweights[peers]'")
KERNEL = (3, 3, 40, 120)


def torch_weight(fill, shape=KERNEL, **options):
    """A weight initialized by torch, in our layout."""
    *window, n_in, n_out = shape
    torch.manual_seed(0)
    w = fill(torch.empty(n_out, n_in, *window), **options).numpy()
    return w.transpose(*range(2, w.ndim), 1, 0)


def test_all_of_torch_is_there():
    names = {n.removesuffix("_") for n in dir(torch.nn.init) if n.endswith("_") and not n.startswith("_")}
    renamed = {"trunc_normal": "truncated_normal", "eye": "identity"}
    names = {renamed.get(n, n.replace("kaiming", "he")) for n in names}
    assert names <= set(init.__all__)


SAME_SPREAD = {
    "xavier_normal": (partial(jw.xavier_normal, gain=2.0), torch.nn.init.xavier_normal_, {"gain": 2.0}),
    "xavier_uniform": (partial(jw.xavier_uniform, gain=2.0), torch.nn.init.xavier_uniform_, {"gain": 2.0}),
    "he_normal": (jw.he_normal, torch.nn.init.kaiming_normal_, {"nonlinearity": "relu"}),
    "he_normal fan_out": (partial(jw.he_normal, mode="fan_out"), torch.nn.init.kaiming_normal_, {"mode": "fan_out"}),
    "he_uniform leaky": (partial(jw.he_uniform, negative_slope=0.5), torch.nn.init.kaiming_uniform_, {"a": 0.5}),
    "normal": (partial(init.normal, mean=1.0, std=2.0), torch.nn.init.normal_, {"mean": 1.0, "std": 2.0}),
    "uniform": (partial(init.uniform, low=-1.0, high=2.0), torch.nn.init.uniform_, {"a": -1.0, "b": 2.0}),
    "truncated_normal": (
        partial(init.truncated_normal, mean=1.0, std=2.0, low=-1.0, high=0.5),
        torch.nn.init.trunc_normal_,
        {"mean": 1.0, "std": 2.0, "a": -1.0, "b": 2.0},
    ),
}


@pytest.mark.parametrize("name", SAME_SPREAD)
def test_torch_has_the_same_mean_and_spread(name):
    ours, theirs, options = SAME_SPREAD[name]
    a, b = np.float64(jax.jit(lambda: ours(KEY, KERNEL))()), np.float64(torch_weight(theirs, **options))
    error = math.sqrt(
        2 / a.size
    )  # standard error of a difference, in units of std; kurtosis <= 3 bounds that of the variance
    assert abs(a.mean() - b.mean()) < 6 * error * b.std()
    assert abs(a.var() / b.var() - 1) < 6 * error * math.sqrt(2)


def test_torch_is_orthogonal_along_the_shorter_side_too():
    for ours in jax.jit(lambda: [init.orthogonal(KEY, shape) for shape in ((40, 120), (120, 40))])():
        ours, theirs = np.asarray(ours), torch_weight(torch.nn.init.orthogonal_, ours.shape)
        short = lambda w: w if w.shape[0] <= w.shape[1] else w.T
        np.testing.assert_allclose(short(ours) @ short(ours).T, short(theirs) @ short(theirs).T, atol=1e-5)


@pytest.mark.parametrize(("shape", "groups"), [((3, 3, 4, 6), 1), ((5, 3, 6), 3), ((3, 3, 3, 1, 4), 4)])
def test_torch_has_the_same_dirac(shape, groups):
    ours = init.dirac(KEY, shape, axes=depthwise(groups) if groups > 1 else None)
    np.testing.assert_array_equal(ours, torch_weight(torch.nn.init.dirac_, shape, groups=groups))


def test_torch_has_the_same_identity():
    np.testing.assert_array_equal(init.identity(KEY, (5, 7)), torch_weight(torch.nn.init.eye_, (5, 7)))


def test_torch_counts_the_zeros_of_the_columns_of_its_layout():
    """torch zeroes a fraction of the outputs of each input, not of the inputs of each unit: see `sparse`."""
    theirs = torch_weight(torch.nn.init.sparse_, (40, 120), sparsity=0.25)
    assert (np.sum(theirs == 0, axis=1) == 30).all() and len(set(np.sum(theirs == 0, axis=0))) > 1
    ours = np.asarray(init.sparse(KEY, (40, 120), sparsity=0.25))
    assert (np.sum(ours == 0, axis=0) == 10).all()


def test_torch_has_the_same_gain_by_name():
    convolutions = [f"conv{n}d" for n in (1, 2, 3)] + [f"conv_transpose{n}d" for n in (1, 2, 3)]
    for name in ("linear", *convolutions, "sigmoid", "tanh", "relu", "leaky_relu", "selu"):
        assert init.gain(name) == pytest.approx(torch.nn.init.calculate_gain(name)), name
    assert init.gain("leaky_relu", 0.2) == pytest.approx(torch.nn.init.calculate_gain("leaky_relu", 0.2))


def test_torch_has_the_same_gain_of_a_leaky_relu():
    ours = init.gain(lambda x: jax.nn.leaky_relu(x, 0.3))
    assert ours == pytest.approx(torch.nn.init.calculate_gain("leaky_relu", 0.3), rel=1e-6)
