"""LSQ: gradients of learned scales against the paper, torch and float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from trained_formats import KEY, normal

import jaxweights as jw


def lsq(v, s, low, high):
    """Formulas of the paper in float64: ŵ, ∂ŵ/∂v, ∂ŵ/∂s, all of one scale per column."""
    x = v / s
    inside = (x > low) & (x < high)
    value = np.round(np.clip(x, low, high))
    return value * s, inside.astype(float), np.where(inside, value - x, np.clip(x, low, high))


@pytest.mark.parametrize("low", [-3, -4])
def test_the_gradient_of_lsq_is_that_of_the_paper(low):
    w, cotangent, high, n = normal(40, 6), normal(40, 6, seed=1), 3, 40
    t = jw.LSQ(jw.formats.Format(jw.formats.Integers(3, low, high)))
    start = t.init(w, KEY)
    np.testing.assert_allclose(start["scale"], 2 * np.abs(np.float64(w)).mean(0) / np.sqrt(high), rtol=1e-6)
    state = {"scale": start["scale"] * np.float32(0.4)}  # so that some are clipped
    new, transpose = jax.vjp(t.apply, w, state)
    by_weight, by_state = transpose(cotangent)
    expected, to_weight, to_scale = lsq(np.float64(w), np.float64(state["scale"]), low, high)
    assert 0.05 < 1 - to_weight.mean() < 0.6
    np.testing.assert_allclose(new, expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(by_weight, cotangent * to_weight)
    of_scale = (np.float64(cotangent) * to_scale).sum(0) / np.sqrt(n * high)
    np.testing.assert_allclose(by_state["scale"], of_scale, rtol=1e-4, atol=1e-5)


def test_lsq_is_learnable_fake_quantization_of_torch():
    """With offsets: torch has an integer zero point z, β = −z·s, so ∂/∂s at fixed z is ∂/∂s − z·∂/∂β.

    Torch takes what is rounded to an end to be inside the range. No gradient comes from there.
    """
    torch = pytest.importorskip("torch")
    w, cotangent, n = normal(40, 6), normal(40, 6, seed=1), 40
    t = jw.LSQ(jw.formats.integers(4, symmetric=False))
    start = t.init(w, KEY)
    state = {"scale": start["scale"] * np.float32(0.5), "offset": start["offset"] * np.float32(0.6)}
    zero = np.clip(np.round(-np.float64(state["offset"]) / np.float64(state["scale"])), -8, 7)
    position = np.float64(w) / np.float64(state["scale"]) + zero
    cotangent = jnp.where((np.abs(position - 7.25) < 0.26) | (np.abs(position + 8.25) < 0.26), 0, cotangent)
    assert (position > 7.6).any() and (position < -8.6).any()
    new, transpose = jax.vjp(t.apply, w, state)
    by_weight, by_state = transpose(cotangent)
    leaf = lambda a: torch.tensor(np.array(a, np.float32), requires_grad=True)
    v, s, z = leaf(w), leaf(state["scale"]), leaf(zero)
    out = torch._fake_quantize_learnable_per_channel_affine(v, s, z, 1, -8, 7, 1.0)
    out.backward(torch.tensor(np.array(cotangent)))
    rate = np.sqrt(n * 7)
    np.testing.assert_allclose(new, out.detach().numpy(), atol=1e-6)
    np.testing.assert_allclose(by_weight, v.grad.numpy(), atol=1e-6)
    by_offset = np.float64(by_state["offset"]) * rate
    np.testing.assert_allclose(-by_offset * np.float64(state["scale"]), z.grad.numpy(), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(
        np.float64(by_state["scale"]) * rate - zero * by_offset, s.grad.numpy(), rtol=1e-3, atol=1e-3
    )


def test_the_scales_of_lsq_find_a_smaller_error():
    """By their gradients alone, from a start that is too wide and from a negative one."""
    w, t = normal(64, 8), jw.LSQ(3)

    @jax.jit
    def run(start):
        def step(state, _):
            grad = jax.grad(lambda s: jnp.sum((t.apply(w, s) - w) ** 2))(state)
            return jax.tree.map(lambda s, g: s - 0.02 * g, state, grad), None

        return jax.lax.scan(step, start, length=200)[0]

    error = lambda state: np.square(np.float64(t.apply(w, state) - w)).sum(0)
    scales = np.linspace(0.2, 2, 400)[:, None, None]
    x = np.float64(w)[None]
    best = np.square(np.clip(np.round(x / scales), -3, 3) * scales - x).sum(1).min(0)
    for factor in (2.0, -2.0):
        start = jax.tree.map(lambda a, factor=factor: factor * a, t.init(w, KEY))
        end = run(start)
        assert (error(start) > 1.5 * best).all() and (error(end) < 1.2 * best).all()


def test_lsq_starts_at_zero_weights_with_a_scale():
    for format in (3, "mxfp4", jw.formats.integers(4, symmetric=False)):
        state = jw.LSQ(format).init(jnp.zeros((32, 4)), KEY)
        assert (np.asarray(state["scale"]) > 0).all() and np.isfinite(state["scale"]).all()
        assert not np.asarray(jw.LSQ(format).apply(jnp.zeros((32, 4)), state)).any()
