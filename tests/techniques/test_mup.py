"""muP scales of a weight: exponents of the paper's Table 3."""

import math

import pytest

import jaxweights as jw
from jaxweights.core.axes import ATTENTION_IN, ATTENTION_OUT, Axes

mup = jw.initializers.mup
VECTOR = Axes(input=(), output=0)
# name: (width -> shape, axes, width exponents of (init, Adam, SGD)) by Table 3, relative to an initialization with
# variance 1/n_in: the output's variance of 1/fan_in² is an extra factor of 1/fan_in.
ROLES = {
    "input": (lambda n: (30, n), None, (0, 0, 1)),
    "convolution of an image": (lambda n: (3, 3, 1, n), None, (0, 0, 1)),
    "embedding": (lambda n: (5000, n), None, (0, 0, 1)),
    "bias": (lambda n: (n,), VECTOR, (0, 0, 1)),
    "bias of the output": (lambda n: (10,), VECTOR, (0, 0, 0)),
    "hidden": (lambda n: (n, 4 * n), None, (0, -1, 0)),
    "hidden convolution": (lambda n: (3, 3, n, n), None, (0, -1, 0)),
    "hidden stack": (lambda n: (12, n, n), Axes(batch=0), (0, -1, 0)),
    "query, more heads": (lambda n: (n, n // 8, 8), ATTENTION_IN, (0, -1, 0)),
    "query, wider heads": (lambda n: (n, 8, n // 8), ATTENTION_IN, (0, -1, 0)),
    "out of attention": (lambda n: (n // 8, 8, n), ATTENTION_OUT, (0, -1, 0)),
    "output": (lambda n: (n, 10), None, (-1 / 2, -1, -1)),
    "constant": (lambda n: (30, 10), None, (0, 0, 0)),
}


@pytest.mark.parametrize("name", ROLES)
@pytest.mark.parametrize("width", [64, 512, 2048])
def test_exponents(name, width):
    shape, axes, exponents = ROLES[name]
    base = 256
    scales = mup(shape(width), shape(base), axes=axes)
    assert scales == pytest.approx([(width / base) ** e for e in exponents])


def test_the_update_of_a_hidden_layer_between_widths_that_grow_apart():
    """Gradients have rank 1 and entries of size 1/n_out, so r_out/r_in preserves the effect of a step on the output."""
    scales = mup((400, 900), (100, 100))
    assert (scales.adam, scales.sgd) == (1 / 4, 9 / 4)


def test_scales_are_multiplicative():
    shapes = [(n, 10) for n in (64, 128, 512)]
    a, b, c = mup(shapes[1], shapes[0]), mup(shapes[2], shapes[1]), mup(shapes[2], shapes[0])
    assert all(math.isclose(x * y, z) for x, y, z in zip(a, b, c, strict=True))
