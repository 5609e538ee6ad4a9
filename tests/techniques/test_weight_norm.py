"""Weight normalization: w / ‖w‖ per output unit, against float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from x64 import enable_x64

import jaxweights as jw
from jaxweights.core.axes import ATTENTION_IN, ATTENTION_OUT, CONV, DENSE, WHOLE, depthwise

READINGS = [
    ((5,), None, (0,)),
    ((), None, ()),
    ((4, 3), None, (0,)),
    ((3, 2, 4, 5), CONV, (0, 1, 2)),
    ((4, 2, 3), ATTENTION_IN, (0,)),
    ((2, 3, 4), ATTENTION_OUT, (0, 1)),
    ((6, 4, 3), DENSE.stacked(), (1,)),
    ((3, 3, 1, 4), depthwise(4), (0, 1, 2)),
    ((4, 3), WHOLE, (0, 1)),
    ((3, 2, 4, 5), WHOLE, (0, 1, 2, 3)),
    ((6, 4, 3), WHOLE.stacked(), (1, 2)),
]


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def units(shape, over):
    return tuple(s for a, s in enumerate(shape) if a not in over)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_formula(dtype):
    weights = [jnp.asarray(normal(*shape), dtype) for shape, _, _ in READINGS]
    scales = [jnp.asarray(normal(*units(shape, over), seed=1), dtype) for shape, _, over in READINGS]

    @jax.jit
    def run(weights, scales):
        cases = list(zip(weights, scales, READINGS, strict=True))
        both = lambda w, scale, axes: (jw.weight_normalize(w, axes=axes), jw.weight_normalize(w, scale, axes=axes))
        return [both(w, scale, axes) for w, scale, (_, axes, _) in cases]

    tolerance = 4 * float(jnp.finfo(dtype).eps)
    for w, scale, found, reading in zip(weights, scales, run(weights, scales), READINGS, strict=True):
        shape, axes, over = reading
        exact = np.float64(w)
        unit = exact / np.sqrt(np.sum(exact**2, over, keepdims=True))
        for out, expected in zip(found, (unit, unit * np.expand_dims(np.float64(scale), over)), strict=True):
            assert out.dtype == dtype
            np.testing.assert_allclose(np.float64(out), expected, rtol=tolerance, err_msg=f"{shape} by {axes}")


def test_a_zero_kernel_rests_and_a_zero_scale_moves():
    """Steps of gradient descent on ⟨w', g⟩ + ‖w'‖²/2 from w' = 0: only a kernel that has a direction leaves it."""
    g, kernel = jnp.float32(normal(5, 3)), jnp.float32(normal(5, 3, seed=1))

    def descend(t, kernel):
        def step(carry, _):
            w, scale = carry
            loss = lambda w, scale: jnp.sum(t.apply(w, {"scale": scale}) * (g + t.apply(w, {"scale": scale}) / 2))
            grads = jax.grad(loss, (0, 1))(w, scale)
            return (w - 0.1 * grads[0], scale - 0.1 * grads[1]), t.apply(w, {"scale": scale})

        return jax.lax.scan(step, (kernel, t.init(kernel, jax.random.key(0))["scale"]), length=200)

    descend = jax.jit(descend, static_argnums=0)
    (w, scale), path = descend(jw.WeightNorm(), jnp.zeros((5, 3)))
    assert not w.any() and not scale.any() and not path.any()
    (w, scale), path = descend(jw.WeightNorm(scale=0.0), kernel)
    assert not path[0].any()
    unit = np.float64(kernel) / np.linalg.norm(np.float64(kernel), axis=0)
    np.testing.assert_allclose(path[1], -0.1 * unit * np.sum(unit * np.float64(g), 0), rtol=1e-4)
    np.testing.assert_allclose(path[-1], -g, atol=1e-3)  # the minimum, in another direction than that of the start


def test_gradient():
    with enable_x64(True):
        weights = [jnp.asarray(normal(*shape)) for shape, _, _ in READINGS[3::2]]
        scales = [jnp.asarray(normal(*units(shape, over), seed=1)) for shape, _, over in READINGS[3::2]]

        @jax.jit
        def run(weights, scales):
            cases = list(zip(weights, scales, READINGS[3::2], strict=True))
            unit = [jw.weight_normalize(w, axes=axes) for w, _, (_, axes, _) in cases]
            return unit, [jw.weight_normalize(w, g, axes=axes) for w, g, (_, axes, _) in cases]

        check_grads(run, (weights, scales), order=1, rtol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "size"), [(jnp.float32, 1e30), (jnp.float32, 1e-25), (jnp.bfloat16, 1e30), (jnp.float16, 1e4)]
)
def test_huge_and_tiny_weights(dtype, size):
    """w/‖w‖ does not depend on the size of w, and its gradient is inversely proportional to it."""
    unit = np.float64([[1, 2], [2, -3], [-2, 6]])
    w, first_row = jnp.asarray(unit * size, dtype), jnp.zeros((3, 2), dtype).at[0].set(1)

    @jax.jit
    def run(w):
        out, pull = jax.vjp(jw.weight_normalize, w)
        return out, pull(first_row)[0]

    out, found = run(w)
    np.testing.assert_allclose(np.float64(out), unit / [3, 7], rtol=2 * float(jnp.finfo(dtype).eps) + 1e-6)
    length = np.float64([3, 7])
    gradient = (np.eye(3)[:, :1] - unit[:1] / length**2 * unit) / length
    np.testing.assert_allclose(np.float64(found) * size, gradient, atol=0.02 if dtype != jnp.float32 else 1e-6)


def test_zero_units():
    w = jnp.array([[0.0, 3.0], [0.0, 4.0]])
    for scale in (None, jnp.array([2.0, 2.0])):
        out, pull = jax.vjp(lambda w, scale=scale: jw.weight_normalize(w, scale), w)
        np.testing.assert_allclose(out, np.array([[0, 0.6], [0, 0.8]]) * (1 if scale is None else 2), rtol=1e-6)
        assert jnp.isfinite(pull(jnp.ones_like(w))[0]).all()


def test_nan_and_infinity_stay_in_their_unit():
    out = jw.weight_normalize(jnp.array([[jnp.nan, jnp.inf, 3.0], [1.0, 1.0, 4.0]]))
    assert jnp.isnan(out[:, :2]).any(0).all()
    np.testing.assert_allclose(out[:, 2], [0.6, 0.8], rtol=1e-6)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0,)])
def test_nothing(shape):
    assert jw.weight_normalize(jnp.zeros(shape)).shape == shape


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_transform_starts_as_the_identity(dtype):
    t = jw.WeightNorm(axes=ATTENTION_IN)
    w = jnp.asarray(normal(16, 4, 8), dtype)
    state = t.init(w, jax.random.key(0))
    np.testing.assert_array_equal(t.apply(w, state), w)
    exact = np.float64(w)
    np.testing.assert_allclose(state["scale"], np.linalg.norm(exact, axis=0), rtol=1e-6)
    longer = t.apply(w, {"scale": 3 * state["scale"]})
    np.testing.assert_allclose(np.float64(longer), 3 * exact, rtol=2 * float(jnp.finfo(dtype).eps))


TORCH = {
    "linear": ((6, 4), 0, jw.Axes(input=-1, output=-2)),
    "linear as a whole": ((6, 4), None, WHOLE),
    "conv": ((5, 3, 2, 4), 0, jw.Axes(input=1, output=0)),
    "conv as a whole": ((5, 3, 2, 4), None, WHOLE),
}


@pytest.mark.parametrize(("shape", "dim", "axes"), TORCH.values(), ids=TORCH)
def test_value_and_gradients_are_those_of_torch(shape, dim, axes):
    """In float64, in torch's layout, (out, in, *window), with a scale that differs from the norm."""
    torch = pytest.importorskip("torch", reason="torch is not installed: pip install 'jaxweights[peers]'")
    w, cotangent = normal(*shape), normal(*shape, seed=1)
    module = torch.nn.Module()
    module.weight = torch.nn.Parameter(torch.tensor(w))
    torch.nn.utils.parametrizations.weight_norm(module, dim=dim)
    g, v = module.parametrizations.weight.original0, module.parametrizations.weight.original1
    t = jw.WeightNorm(axes)
    norms = g.detach().numpy().copy().squeeze()
    scale = norms * normal(*norms.shape, seed=2)
    with torch.no_grad():
        g.copy_(torch.tensor(scale).reshape(g.shape))
    module.weight.backward(torch.tensor(cotangent))

    @jax.jit
    def run(w, scale, cotangent):
        new, pull = jax.vjp(lambda w, scale: t.apply(w, {"scale": scale}), w, scale)
        return new, *pull(cotangent), t.init(w, jax.random.key(0))["scale"]

    with enable_x64(True):
        new, grad_w, grad_scale, start = run(w, jnp.asarray(scale), cotangent)
    np.testing.assert_allclose(start, norms, rtol=1e-14)
    np.testing.assert_allclose(new, module.weight.detach().numpy(), rtol=1e-13)
    np.testing.assert_allclose(grad_w, v.grad.numpy(), rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(grad_scale, g.grad.numpy().squeeze(), rtol=1e-12)


def test_errors():
    with pytest.raises(ValueError, match=r"scale must have shape \(2,\)"):
        jw.weight_normalize(jnp.ones((3, 2)), jnp.ones(3))
    with pytest.raises(TypeError, match="floating"):
        jw.weight_normalize(jnp.ones((3, 2), jnp.int32))
