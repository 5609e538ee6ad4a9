"""Orthogonal, delta-orthogonal, identity, Dirac and sparse initializers: the properties of their matrices."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxweights as jw
from jaxweights.core.axes import ATTENTION_IN, ATTENTION_OUT, Axes, depthwise

init = jw.initializers
KEY = jax.random.key(3)
STACK = Axes(batch=0)

# shape, axes, and the (batch of) matrices, by hand
READINGS = [
    ((30, 20), None, lambda w: w),
    ((20, 30), None, lambda w: w),
    ((2, 3, 6, 20), None, lambda w: w.reshape(36, 20)),
    ((24, 4, 8), ATTENTION_IN, lambda w: w.reshape(24, 32)),
    ((4, 8, 24), ATTENTION_OUT, lambda w: w.reshape(32, 24)),
    ((5, 16, 12), STACK, lambda w: w),
    ((16, 12, 5), Axes(input=1, output=0, batch=2), lambda w: w.transpose(2, 1, 0)),
    ((3, 3, 4, 12), depthwise(3), lambda w: w.reshape(36, 3, 4).swapaxes(0, 1)),
    ((40,), None, lambda w: w[:, None]),
]


def drawn(f, cases):
    """f(shape, axes) of each case, in one program."""
    return jax.jit(lambda: [f(shape, axes) for shape, axes, *_ in cases])()


def test_orthogonal():
    weights = drawn(lambda shape, axes: init.orthogonal(KEY, shape, axes=axes, gain=3.0), READINGS)
    for w, (shape, _, matrices) in zip(weights, READINGS, strict=True):
        m = matrices(np.float64(w)) / 3
        m = m if m.shape[-2] >= m.shape[-1] else m.swapaxes(-1, -2)
        gram = m.swapaxes(-1, -2) @ m
        goal = np.broadcast_to(np.eye(gram.shape[-1]), gram.shape)
        np.testing.assert_allclose(gram, goal, atol=1e-5, err_msg=f"{shape}")
        if m.ndim == 3:
            assert np.abs(m[0] - m[1]).max() > 0.1, shape  # drawn independently


def test_orthogonal_is_uniform():
    """Matches the Haar measure: moments of an entry and of the trace, and equal numbers of rotations and reflections.

    QR alone, without the signs of R's diagonal, gives only reflections and a mean trace of −0.8.
    """
    n, count = 4, 62500
    q = np.float64(jax.jit(lambda key: init.orthogonal(key, (count, n, n), axes=STACK))(KEY))
    within = lambda samples, mean, variance: abs(samples.mean() - mean) < 6 * math.sqrt(variance / count)
    # E[q⁴] = 3/(n(n + 2)) and E[q⁸] = 105/(n(n + 2)(n + 4)(n + 6)) for an entry q; the trace has mean 0, variance 1.
    fourth, eighth = 3 / (n * (n + 2)), 105 / (n * (n + 2) * (n + 4) * (n + 6))
    for i, j in [(0, 0), (1, 2), (3, 3)]:
        assert within(q[:, i, j], 0, 1 / n)
        assert within(q[:, i, j] ** 2, 1 / n, fourth - 1 / n**2)
        assert within(q[:, i, j] ** 4, fourth, eighth - fourth**2)
    trace = np.trace(q, axis1=1, axis2=2)
    assert within(trace, 0, 1)
    assert within(trace**2, 1, (trace**2).var())
    assert within(np.sign(np.linalg.det(q)), 0, 1)


def convolve(w, x, groups, padding):
    """Convolution with zero padding, "SAME", or periodic padding, "CIRCULAR"."""
    spatial = "XYZ"[: w.ndim - 2]
    if padding == "CIRCULAR":
        pads = [(0, 0), *(((k - 1) // 2, k // 2) for k in w.shape[:-2]), (0, 0)]
        x, padding = jnp.pad(x, pads, mode="wrap"), "VALID"
    numbers = (f"N{spatial}C", f"{spatial}IO", f"N{spatial}C")
    return jax.lax.conv_general_dilated(
        x, w, (1,) * len(spatial), padding, dimension_numbers=numbers, feature_group_count=groups
    )


def convolved(f, cases, paddings):
    """Random images, and their convolutions with the kernel f(shape, axes) for each padding, in one program."""

    def run(shape, groups):
        x = jax.random.normal(KEY, (3, *(6,) * (len(shape) - 2), shape[-2] * groups))
        w = f(shape, depthwise(groups) if groups > 1 else None)
        return x, [convolve(w, x, groups, padding) for padding in paddings]

    return jax.jit(lambda: [run(*case) for case in cases])()


CONVOLUTIONS = [((3, 3, 4, 7), 1), ((4, 2, 5, 5), 1), ((5, 3, 6), 1), ((3, 3, 2, 6), 2), ((3, 3, 1, 4), 4)]


def test_delta_orthogonal_preserves_norms():
    kernel = lambda shape, axes: init.delta_orthogonal(KEY, shape, axes=axes, gain=2.0)
    norm = lambda a: np.linalg.norm(np.float64(a).reshape(3, -1), axis=1)
    for case, (x, (y,)) in zip(CONVOLUTIONS, convolved(kernel, CONVOLUTIONS, ["CIRCULAR"]), strict=True):
        np.testing.assert_allclose(norm(y), 2 * norm(x), rtol=1e-5, err_msg=f"{case}")


def test_dirac_passes_its_input_on():
    cases = [*CONVOLUTIONS, ((3, 3, 7, 4), 1), ((3, 3, 6, 4), 2), ((2, 2, 2, 3, 3), 1)]
    found = convolved(lambda shape, axes: init.dirac(KEY, shape, axes=axes), cases, ["SAME", "CIRCULAR"])
    for (shape, groups), (x, ys) in zip(cases, found, strict=True):
        n_in, each = shape[-2], shape[-1] // groups
        kept = min(n_in, each)
        for y in map(np.asarray, ys):
            for g in range(groups):
                passed, rest = np.split(y[..., g * each : (g + 1) * each], [kept], axis=-1)
                np.testing.assert_array_equal(passed, x[..., g * n_in : g * n_in + kept], err_msg=f"{shape}, {groups}")
                assert (rest == 0).all(), (shape, groups)


def test_identity():
    dense = [r for r in READINGS if r[0][:2] not in ((2, 3), (3, 3))]
    weights = drawn(lambda shape, axes: init.identity(KEY, shape, axes=axes, gain=0.5), dense)
    for w, (shape, _, matrices) in zip(weights, dense, strict=True):
        m = matrices(np.asarray(w))
        goal = np.broadcast_to(0.5 * np.eye(*m.shape[-2:]), m.shape)
        np.testing.assert_array_equal(m, goal, err_msg=f"{shape}")
    for shape, axes, _ in READINGS:
        if shape[:2] in ((2, 3), (3, 3)):
            with pytest.raises(ValueError, match="use dirac for a convolution"):
                init.identity(KEY, shape, axes=axes)


def test_sparse_has_as_many_zeros_in_every_unit():
    weights = drawn(lambda shape, axes: init.sparse(KEY, shape, axes=axes, sparsity=0.7), READINGS[::3])
    for w, (shape, _, matrices) in zip(weights, READINGS[::3], strict=True):
        m = matrices(np.asarray(w))
        assert (np.sum(m == 0, axis=-2) == math.floor(0.7 * m.shape[-2] + 0.5)).all(), shape


def test_sparse_draws_the_places_and_the_values():
    n_in, n_out, sparsity, std = 20, 50_000, 0.75, 0.5
    w = np.float64(jax.jit(lambda key: init.sparse(key, (n_in, n_out), sparsity=sparsity, std=std))(KEY))
    zero = w == 0
    # An entry is 0 with probability 3/4, and two are with probability 15·14/(20·19).
    for i in range(n_in):
        assert abs(zero[i].mean() - 0.75) < 6 * math.sqrt(0.75 * 0.25 / n_out)
    both = 15 * 14 / (20 * 19)
    for i, j in [(0, 1), (3, 17)]:
        assert abs((zero[i] & zero[j]).mean() - both) < 6 * math.sqrt(both * (1 - both) / n_out)
    z = w[~zero] / std
    for k, moment, spread in [(1, 0, 1), (2, 1, 2), (4, 3, 96)]:
        assert abs((z**k).mean() - moment) < 6 * math.sqrt(spread / z.size)


@pytest.mark.parametrize("sparsity", [0.0, 1.0])
def test_sparse_at_its_ends(sparsity):
    assert (init.sparse(KEY, (8, 5), sparsity=sparsity) == 0).mean() == sparsity


@pytest.mark.parametrize("f", [init.orthogonal, init.identity, functools.partial(init.sparse, sparsity=0.5)])
def test_empty_weights(f):
    cases = [((0, 3), None), ((3, 0), None), ((2, 0, 0), STACK)]
    weights = drawn(lambda shape, axes: f(KEY, shape, axes=axes), cases)
    assert [w.shape for w in weights] == [shape for shape, _ in cases]


def test_constants():
    assert (init.zeros(KEY, (2, 3)) == 0).all()
    assert (init.ones(KEY, (2, 3)) == 1).all()
    assert (init.constant(KEY, (), value=-1.5) == -1.5).all()
