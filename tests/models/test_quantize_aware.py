"""Batch norms fold within a loss, before weights are quantized: gradients reach kernels, scales and offsets."""

import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxweights as jw

EXAMPLES = Path(__file__).parents[2] / "examples"
RNG = np.random.default_rng(0)
FAKE = jw.on_tree(jw.FakeQuantize("int4"), where="first/kernel")
EPS = 1e-3


def apply(params, stats, x):
    y = x @ params["first"]["kernel"] + params["first"]["bias"]
    if stats:
        mean, var = stats["norm"]["mean"], stats["norm"]["var"]
        y = (y - mean) / jnp.sqrt(var + EPS) * params["norm"]["scale"] + params["norm"]["bias"]
    return jnp.tanh(y) @ params["head"]["kernel"]


def model():
    draw = lambda *shape: jnp.float32(RNG.normal(size=shape))
    params = {
        "first": {"kernel": draw(5, 4), "bias": draw(4)},
        "norm": {"scale": 1 + 0.3 * draw(4), "bias": draw(4)},
        "head": {"kernel": draw(4, 3)},
    }
    return params, {"norm": {"mean": draw(4), "var": jnp.exp(draw(4))}}, draw(16, 5)


def test_gradients_are_those_of_finite_differences_and_the_chain_rule():
    params, stats, x = model()
    folds = jw.norm_folds(apply, params, stats, x)

    @jax.jit
    def loss(params, stats):
        folded = jw.fold_batch_norms(params, stats, folds)
        rounded = FAKE.apply(folded, FAKE.init(folded, jax.random.key(0)))
        return jnp.mean(apply(rounded, None, x) ** 2), rounded

    grads, rounded = jax.grad(loss, has_aux=True)(params, stats)
    stored = jw.dequantize(jw.quantize(jw.fold_batch_norms(params, stats, folds)["first"]["kernel"], 4))
    np.testing.assert_array_equal(rounded["first"]["kernel"], stored)

    # In float64: differences of the loss in the folded arrays, at the rounded kernel; the rest by hand.
    f64 = lambda a: np.asarray(a, np.float64)
    kernel, bias, head = f64(stored), f64(rounded["first"]["bias"]), f64(params["head"]["kernel"])

    def numbers(kernel, bias):
        return np.mean((np.tanh(f64(x) @ kernel + bias) @ head) ** 2)

    def differences(f, a, step=1e-5):
        g = np.zeros_like(a)
        for i in np.ndindex(a.shape):
            one = np.zeros_like(a)
            one[i] = step
            g[i] = (f(a + one) - f(a - one)) / (2 * step)
        return g

    of_kernel = differences(lambda a: numbers(a, bias), kernel)
    of_bias = differences(lambda a: numbers(kernel, a), bias)
    w, b, scale = f64(params["first"]["kernel"]), f64(params["first"]["bias"]), f64(params["norm"]["scale"])
    mean, deviation = f64(stats["norm"]["mean"]), np.sqrt(f64(stats["norm"]["var"]) + EPS)
    expected = {
        "first": {"kernel": of_kernel * scale / deviation, "bias": of_bias * scale / deviation},
        "norm": {"scale": ((of_kernel * w).sum(0) + of_bias * (b - mean)) / deviation, "bias": of_bias},
    }
    for path in expected:
        for name, g in expected[path].items():
            assert np.abs(g).max() > 1e-3
            np.testing.assert_allclose(grads[path][name], g, rtol=2e-4, atol=1e-6)


@pytest.mark.slow
def test_the_example_trains_for_what_is_stored(monkeypatch, capsys):
    monkeypatch.syspath_prepend(EXAMPLES)
    found = runpy.run_path(str(EXAMPLES / "quantize_aware.py"))["main"](["--quick"])
    assert "trained for it" in capsys.readouterr().out
    assert found["float32"]["as trained"] > 0.9
    two = found["int2"]
    assert two["rounded"] < two["trained for it"]
    assert two["trained for it"] > found["float32"]["as trained"] - 0.1
    assert two["kB"] < found["float32"]["kB"] / 10
