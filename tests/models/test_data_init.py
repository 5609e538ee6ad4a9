"""Data-dependent initialization, against layer outputs captured by Flax and the formulas in float64."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import unflatten_dict
from flax_modules import KEY, Layer, random_params, scanned

import jaxweights as jw


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def outputs(model, params, x):
    """{module: output, including bias} for the layers of a Linen model, captured by Flax."""
    layers = (nn.Dense, nn.Conv, nn.ConvTranspose, nn.DenseGeneral)
    wanted = lambda module, _: isinstance(module, layers)
    run = jax.jit(lambda p: model.apply({"params": p}, x, capture_intermediates=wanted)[1]["intermediates"])
    return {jax.tree_util.keystr(path[:-2], simple=True): y for path, y in jax.tree.leaves_with_path(run(params))}


def check_standard(y, axes=1, mean=True):
    """Checks variance 1, and mean 0 if `mean`, over all but the last `axes` axes."""
    y = np.asarray(y, np.float64)
    over = tuple(range(y.ndim - axes))
    if mean:
        np.testing.assert_allclose(y.mean(over), 0, atol=2e-5)
    np.testing.assert_allclose(y.std(over), 1, rtol=2e-5)


class ConvNet(nn.Module):
    use_bias: bool = True

    @nn.compact
    def __call__(self, x):
        b = {"use_bias": self.use_bias}
        x = nn.relu(nn.Conv(12, (3, 3), **b)(x))
        x = nn.relu(nn.Conv(6, (3, 3), strides=2, feature_group_count=3, **b)(x))
        x = nn.relu(nn.Conv(6, (2, 2), feature_group_count=6, **b)(x))
        x = nn.relu(nn.ConvTranspose(5, (3, 3), **b)(x))
        return nn.Dense(4, **b)(x.reshape(len(x), -1))


class Mlp(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(16)(x))
        x = nn.relu(nn.Dense(8)(x))
        return nn.Dense(4)(x)


@pytest.mark.parametrize("use_bias", [True, False])
def test_every_unit_of_every_layer_is_standard(use_bias):
    model, x = ConvNet(use_bias), normal(32, 8, 8, 3)
    params = random_params(model, x.shape)
    new = jw.data_dependent_init(lambda p, x: model.apply({"params": p}, x), params, x)
    assert jax.tree.map(jnp.shape, new) == jax.tree.map(jnp.shape, params)
    found = outputs(model, new, x)
    assert len(found) == 5
    for y in found.values():
        check_standard(y, mean=use_bias)


def test_it_is_the_initialization_of_weight_normalization():
    """t = v·x/‖v‖, g = 1/σ[t], b = −μ[t]/σ[t], layer by layer. `WeightNorm` starts from the result."""

    x, model = 3 + 2 * normal(64, 5), jw.linen.Transformed(Mlp(), jw.WeightNorm())
    params = random_params(Mlp(), x.shape)
    new = jw.data_dependent_init(lambda p, x: Mlp().apply({"params": p}, x), params, x)
    scale = jw.on_tree(jw.WeightNorm()).init(new, KEY).learned
    h = np.float64(x)
    for i in range(3):
        v = np.float64(params[f"Dense_{i}"]["kernel"])
        t = h @ (v / np.linalg.norm(v, axis=0))
        g, b = 1 / t.std(0), -t.mean(0) / t.std(0)
        np.testing.assert_allclose(scale[f"Dense_{i}/kernel"]["scale"], g, rtol=1e-4)
        np.testing.assert_allclose(new[f"Dense_{i}"]["bias"], b, rtol=1e-4, atol=1e-4)
        h = np.maximum(g * t + b, 0)
    y = model.apply({"params": {**new, "weight_transform": unflatten_dict(scale, sep="/")}}, x)
    np.testing.assert_allclose(np.maximum(y, 0), h, rtol=1e-3, atol=1e-4)
    check_standard(y)


def test_layers_as_a_whole():
    """As in LSUV: variance 1 over all units of a layer; orthogonal weights stay orthogonal."""
    model, x = Mlp(), normal(64, 5)
    rules = {"**/kernel": jw.initializers.orthogonal, "**/bias": jw.initializers.zeros}
    params = jax.jit(lambda p: jw.reinitialize(p, KEY, rules))(random_params(model, x.shape))
    new = jw.data_dependent_init(lambda p, x: model.apply({"params": p}, x), params, x, per_unit=False)
    for y in outputs(model, new, x).values():
        assert np.std(y) == pytest.approx(1, rel=1e-5)
    for name, entry in params.items():
        ratio = new[name]["kernel"] / entry["kernel"]
        np.testing.assert_allclose(ratio, ratio.ravel()[0], rtol=1e-5)
        np.testing.assert_array_equal(new[name]["bias"], 0)


@pytest.mark.parametrize("per_unit", [True, False])
@pytest.mark.parametrize(("kind", "axis"), [("dense", 0), ("dense", -1), ("general", 0)])
def test_a_stack_is_scaled_layer_by_layer(kind, axis, per_unit):
    model, x = scanned(kind, length=3, axis=axis), normal(2, 40, 6)
    params = random_params(model, x.shape)
    if not per_unit:
        params = jax.tree_util.tree_map_with_path(lambda p, a: a * (p[-1].key != "bias"), params)
    new = jw.data_dependent_init(lambda p, x: model.apply({"params": p}, x), params, x, per_unit=per_unit)
    for i in range(3):
        x, _ = Layer(kind).apply({"params": jax.tree.map(lambda a, i=i: jnp.take(a, i, axis), new)}, x)
        check_standard(x, axes=1 if per_unit else 0, mean=per_unit)


def test_attention():
    model, x = nn.MultiHeadDotProductAttention(2), normal(8, 10, 6)
    new = jw.data_dependent_init(lambda p, x: model.apply({"params": p}, x), random_params(model, x.shape), x)
    found = outputs(model, new, x)
    assert len(found) == 4
    for name, y in found.items():
        check_standard(y, axes=1 if "out" in name else 2)


def test_nnx_and_equinox_are_trees_too():
    x = normal(50, 5)
    model = nnx.Sequential(nnx.Linear(5, 7, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(7, 3, rngs=nnx.Rngs(1)))
    graph, params = nnx.split(model)
    nnx.update(model, jw.data_dependent_init(lambda p, x: nnx.merge(graph, p)(x), params, x))
    check_standard(model.layers[0](x))
    check_standard(model(x))

    arrays, static = eqx.partition(eqx.nn.MLP(5, 3, 7, 1, key=KEY), eqx.is_array)
    run = lambda p, x: jax.vmap(eqx.combine(p, static))(x)
    check_standard(run(jw.data_dependent_init(run, arrays, x), x))


def test_what_does_not_vary_keeps_its_weights():
    """Dead units, and a unit whose output is constant up to rounding."""
    x = normal(1000, 3)
    x[:, 0] = 0.1
    kernel = np.float32([[1.1, 0, 2], [0, 0, 1], [0, 0, 3]])
    params = {"kernel": jnp.asarray(kernel), "bias": jnp.ones(3)}
    new = jw.data_dependent_init(lambda p, x: x @ p["kernel"] + p["bias"], params, x)
    np.testing.assert_array_equal(new["kernel"][:, :2], kernel[:, :2])
    np.testing.assert_allclose(new["bias"][:2], [-0.11, 0], rtol=1e-5)
    check_standard((x @ new["kernel"] + new["bias"])[:, 2:])


def test_bfloat16_and_jit():
    x = jnp.asarray(normal(200, 5), jnp.bfloat16)
    params = {"kernel": jnp.asarray(normal(5, 4), jnp.bfloat16), "bias": jnp.zeros(4, jnp.bfloat16)}
    run = lambda p, x: x @ p["kernel"] + p["bias"]
    new = jax.jit(lambda p: jw.data_dependent_init(run, p, x))(params)
    assert all(a.dtype == jnp.bfloat16 for a in new.values())
    np.testing.assert_allclose(np.std(np.float32(run(new, x)), axis=0), 1, rtol=0.01)


def test_only_the_selected_layers_and_their_biases_change():
    model, x = ConvNet(), normal(4, 8, 8, 3)
    params = random_params(model, x.shape)
    run = lambda p, *x: model.apply({"params": p}, *x)
    new = jw.data_dependent_init(run, params, (x,), "Dense_0/kernel")
    assert {n for n in params if not np.array_equal(params[n]["kernel"], new[n]["kernel"])} == {"Dense_0"}
    assert {n for n in params if not np.array_equal(params[n]["bias"], new[n]["bias"])} == {"Dense_0"}
    check_standard(run(new, x))


def test_errors():
    x = normal(4, 3)
    params = {"kernel": jnp.ones((3, 3)), "bias": jnp.ones(3)}
    once = lambda p, x: x @ p["kernel"]
    with pytest.raises(ValueError, match="'kernel' is used 2 times: leave it out of `where`"):
        jw.data_dependent_init(lambda p, x: once(p, once(p, x)), params, x)
    with pytest.raises(ValueError, match=r"'bias' \(2,\) does not have the units of 'kernel' \(3, 3\)"):
        jw.data_dependent_init(once, {**params, "bias": jnp.ones(2)}, x)
    # A stack along the middle axis: its bias (out, layers) could be read as (layers, out).
    model = scanned(length=3, axis=1)
    with pytest.raises(ValueError, match="does not have the units"):
        jw.data_dependent_init(lambda p, x: model.apply({"params": p}, x), random_params(model, x.shape), x)


def test_the_layout_says_which_layers():
    x = normal(50, 3)
    params = {"kernel": jnp.asarray(normal(3, 4)), "experts": jnp.asarray(normal(2, 4, 5)), "shift": jnp.ones((1, 3))}
    first = lambda p, x: (x + p["shift"]) @ p["kernel"]
    both = lambda p, x: first(p, x) @ p["experts"][0]
    with pytest.raises(ValueError, match=r"no product of data with all of 'experts' .each product has a part of it"):
        jw.data_dependent_init(both, params, x, layout=jw.layout(both, params, x))
    new = jw.data_dependent_init(first, params, x, layout=jw.layout(first, params, x))
    np.testing.assert_allclose(np.std(first(new, x), 0), 1, rtol=1e-4)
    np.testing.assert_array_equal(new["shift"], params["shift"])
