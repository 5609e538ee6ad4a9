"""Units are scaled between layers: the model stays the same, and ranges agree; nothing else is touched."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxweights as jw

KEY = jax.random.key(0)
relu = jax.nn.relu


def spread(tree):
    """The tree with random numbers whose ranges differ from one index to the next along every axis."""
    rng = np.random.default_rng(0)

    def draw(a):
        w = rng.normal(size=a.shape)
        for axis in range(a.ndim):
            w *= np.exp(rng.normal(size=[n if i == axis else 1 for i, n in enumerate(a.shape)]))
        return jnp.float32(w)

    return jax.tree.map(draw, tree)


def differences(f, params, new, *args):
    """Largest change of an output relative to the largest output, and whether each leaf has changed."""
    y, z = f(params, *args), f(new, *args)
    return float(jnp.abs(y - z).max() / jnp.abs(y).max()), jax.tree.map(lambda a, b: bool((a != b).any()), params, new)


PARAMS = spread({"a": jnp.ones((4, 6)), "b": jnp.ones(6), "c": jnp.ones((6, 3)), "gain": jnp.ones(6)})
X = jax.random.normal(KEY, (8, 4))


def hidden(p, x):
    return x @ p["a"] + p["b"]


def test_factors_are_those_of_the_formula():
    new = jw.equalize(lambda p, x: relu(hidden(p, x)) @ p["c"], PARAMS, X)
    a, b, c = (np.asarray(PARAMS[k], np.float64) for k in "abc")
    s = np.sqrt(np.abs(a).max(0) / np.abs(c).max(1))
    for name, expected in {"a": a / s, "b": b / s, "c": c * s[:, None]}.items():
        np.testing.assert_allclose(new[name], expected, rtol=1e-5)


HOMOGENEOUS = {
    "nothing": lambda p, h, x: h,
    "relu": lambda p, h, x: relu(h),
    "leaky relu": lambda p, h, x: jax.nn.leaky_relu(h),
    "parametric relu": lambda p, h, x: jnp.where(h > 0, h, h * p["gain"]),
    "clipped from below": lambda p, h, x: jnp.clip(h, 0, None),
    "magnitude": lambda p, h, x: -jnp.abs(h),
    "dropout, scaled by data": lambda p, h, x: jnp.where(x[:, :1] > 0, h / (1 + x[:, :1] ** 2), 0),
    "cast": lambda p, h, x: h.astype(jnp.bfloat16).astype(jnp.float32),
    "residual": lambda p, h, x: relu(h) + 2 * h,
    "checkpoint": lambda p, h, x: jax.checkpoint(relu)(h),
    "attention": lambda p, h, x: jax.nn.softmax(x @ x.T) @ h,
    "the larger of two": lambda p, h, x: jnp.maximum(h, 0.5 * h),
}
OTHERS = {
    "relu6": lambda p, h, x: jax.nn.relu6(h),
    "gelu": lambda p, h, x: jax.nn.gelu(h),
    "silu": lambda p, h, x: jax.nn.silu(h),
    "square": lambda p, h, x: h * h,
    "square of the sign": lambda p, h, x: h**2,
    "softmax": lambda p, h, x: jax.nn.softmax(h),
    "layer norm": lambda p, h, x: jw.layer_norm(h),
    "a number added": lambda p, h, x: h + 1,
    "a number less": lambda p, h, x: relu(1 - h),
    "data added": lambda p, h, x: h + x[:, :1],
    "an inverse": lambda p, h, x: 1 / h,
    "compared with a number": lambda p, h, x: jnp.where(h > 1, h, 0),
    "an array in the place of 0": lambda p, h, x: jnp.where(h > 0, h, p["gain"]),
    "units in reverse": lambda p, h, x: h + h[:, ::-1],
    "some of the units": lambda p, h, x: jnp.concatenate([h[:, :3], h[:, :3]], 1),
    "largest unit": lambda p, h, x: h / h.max(1, keepdims=True),
    "bias used twice": lambda p, h, x: h * p["b"],
    "kernel used twice": lambda p, h, x: h + jnp.sum(p["a"]),
    "next kernel used twice": lambda p, h, x: h * p["c"][:, 0],
    "clamp": lambda p, h, x: jnp.clip(h, -1, 1),
    "cumulative": lambda p, h, x: jnp.cumsum(h, 1),
    "loop": lambda p, h, x: jax.lax.fori_loop(0, 2, lambda _, h: h * h, h),
}


@pytest.mark.parametrize("name", HOMOGENEOUS)
def test_what_is_homogeneous_is_passed(name):
    between = HOMOGENEOUS[name]

    def f(p, x):
        return between(p, hidden(p, x), x) @ p["c"]

    error, changed = differences(f, PARAMS, jw.equalize(f, PARAMS, X), X)
    assert error < (0.02 if name == "cast" else 1e-5)
    assert changed == {"a": True, "b": True, "c": True, "gain": False}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_not_homogeneous_is_named(name):
    between = OTHERS[name]
    with pytest.raises(ValueError, match=r"no units that can be scaled: .*(on the way|of the units|otherwise too)"):
        jw.equalize(lambda p, x: between(p, hidden(p, x), x) @ p["c"], PARAMS, X)


def test_a_kernel_that_reads_other_data_too_is_left():
    with pytest.raises(ValueError, match="reads other data too"):
        jw.equalize(lambda p, x: relu(hidden(p, x)) @ p["c"] + jnp.ones((1, 6)) @ p["c"], PARAMS, X)


def test_units_that_are_returned_are_left():
    with pytest.raises(ValueError, match="returned"):
        jw.equalize(lambda p, x: (hidden(p, x) @ p["c"], hidden(p, x)), PARAMS, X)


class ConvNet(nn.Module):
    """Depthwise and grouped convolutions, a residual sum, pooling, images made flat, several output axes."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3), name="stem")(x))
        y = nn.leaky_relu(nn.Conv(16, (3, 3), feature_group_count=8, name="depthwise")(x))
        x = nn.relu(x + nn.Conv(8, (1, 1), feature_group_count=4, name="grouped")(y))
        x = nn.avg_pool(nn.max_pool(x, (2, 2), (2, 2)), (2, 2), (1, 1))
        gate = nn.sigmoid(nn.Dense(8, name="squeeze")(x.mean((1, 2))))
        flat = nn.Dense(5, name="flat")(x.reshape(len(x), -1))
        x = nn.DenseGeneral((2, 4), name="heads")((x * gate[:, None, None]).mean((1, 2)))
        return nn.DenseGeneral(5, axis=(-2, -1), name="out")(x) + flat


@pytest.fixture(scope="module")
def conv_net():
    model, x = ConvNet(), jax.random.normal(KEY, (8, 8, 8, 3))
    shapes = jax.eval_shape(model.init, KEY, x)["params"]
    return jax.jit(lambda params, x: model.apply({"params": params}, x)), spread(shapes), x


def ranges(w, axis):
    return np.abs(w).max(tuple(a for a in range(w.ndim) if a != axis % w.ndim))


def test_a_convolutional_net_stays_the_same_with_equal_ranges(conv_net):
    f, params, x = conv_net
    new = jw.equalize(f, params, x)
    error, changed = differences(f, params, new, x)
    assert error < 1e-5
    both = {"kernel": True, "bias": True}
    read = {"kernel": True, "bias": False}
    assert changed == dict.fromkeys(("stem", "depthwise", "grouped", "heads"), both) | dict.fromkeys(
        ("squeeze", "flat", "out"), read
    )
    kernel = {name: layer["kernel"] for name, layer in new.items()}
    # The depthwise kernel has two outputs for each input, the grouped one four groups of four inputs.
    made = np.maximum(ranges(kernel["stem"], -1), ranges(kernel["grouped"], -1))
    read = [ranges(kernel["depthwise"], -1).reshape(8, 2).max(1), ranges(kernel["heads"], 0)]
    read += [ranges(kernel["squeeze"], 0), ranges(kernel["flat"].reshape(-1, 8, 5), 1)]
    np.testing.assert_allclose(made, np.max(read, 0), rtol=0.01)
    grouped = np.abs(kernel["grouped"][0, 0]).reshape(4, 4, 2).max(2).T.reshape(-1)
    np.testing.assert_allclose(ranges(kernel["depthwise"], -1), grouped, rtol=0.01)


def test_one_scale_for_a_whole_kernel_costs_less_afterwards(conv_net):
    f, params, x = conv_net
    form = jw.formats.integers(8, per_tensor=True)

    def error(params):
        rounded = jax.tree.map(lambda w: jw.dequantize(jw.quantize(w, form)) if w.ndim >= 2 else w, params)
        return differences(f, params, rounded, x)[0]

    assert error(jw.equalize(f, params, x)) < error(params) / 2


def test_under_jit(conv_net):
    f, params, x = conv_net
    once = jax.jit(lambda params: jw.equalize(f, params, x))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), once, jw.equalize(f, params, x))


def test_models_of_other_libraries_and_stacks():
    eqx = pytest.importorskip("equinox", reason="equinox is not installed: pip install 'jaxweights[peers]'")
    net = eqx.nn.MLP(4, 3, 6, 2, key=KEY)
    arrays, rest = eqx.partition(net, eqx.is_array)
    net = eqx.combine(spread(arrays), rest)

    def f(net, x):
        return jax.vmap(net)(x)

    new = jw.equalize(f, net, X)
    assert float(jnp.abs(f(net, X) - f(new, X)).max() / jnp.abs(f(net, X)).max()) < 1e-5
    assert (new.layers[0].weight != net.layers[0].weight).any()

    graph, state = nnx.split(
        nnx.Sequential(nnx.Linear(4, 6, rngs=nnx.Rngs(0)), relu, nnx.Linear(6, 3, rngs=nnx.Rngs(1)))
    )
    state = spread(state)
    g = lambda state, x: nnx.merge(graph, state)(x)
    error, changed = differences(g, state, jw.equalize(g, state, X), X)
    assert error < 1e-5
    assert sum(jax.tree.leaves(changed)) == 3

    stack = spread({"a": jnp.ones((3, 4, 6)), "b": jnp.ones((3, 6)), "c": jnp.ones((3, 6, 4))})

    def looped(stack, x):
        return jax.lax.scan(lambda x, p: (relu(x @ p["a"] + p["b"]) @ p["c"], None), x, stack)[0]

    new = jw.equalize(looped, stack, X)
    error, changed = differences(looped, stack, new, X)
    assert error < 1e-5
    assert all(changed.values())
    for i in range(3):
        np.testing.assert_allclose(ranges(new["a"][i], 1), ranges(new["c"][i], 0), rtol=0.01)


class Block(nn.Module):
    """A layer of a transformer."""

    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm(name="norm1")(x)
        x = x + nn.MultiHeadDotProductAttention(2, name="attention")(y, y)
        y = nn.RMSNorm(name="norm2")(x)
        return x + nn.Dense(8, name="down")(nn.gelu(nn.Dense(16, name="up")(y)))


def test_smoothing_is_that_of_the_formula_and_changes_nothing():
    model = Block()
    batches = list(jax.random.normal(KEY, (2, 4, 5, 8)) * jnp.array([1, 1, 30, 1, 1, 1, 1, 1]))
    params = spread(jax.eval_shape(model.init, KEY, batches[0])["params"])
    params["norm1"]["scale"] = params["norm1"]["scale"].at[3].set(0)

    def f(params, x):
        return model.apply({"params": params}, x)

    new = jw.smooth(f, params, batches, 0.75)
    error, changed = differences(f, params, new, batches[0])
    assert error < 1e-5
    assert changed["up"] == {"kernel": True, "bias": False}
    assert not any(changed["down"].values())
    assert [changed["attention"][name]["kernel"] for name in ("query", "key", "value")] == [True] * 3
    assert not changed["attention"]["query"]["bias"]

    def inputs(params, x):
        return nn.LayerNorm().apply({"params": params["norm1"]}, x)

    largest = np.max([np.abs(inputs(params, x)).max((0, 1)) for x in batches], 0)
    kernels = [np.abs(params["attention"][name]["kernel"]).max((1, 2)) for name in ("query", "key", "value")]
    s = np.asarray(largest, np.float64) ** 0.75 / np.max(kernels, 0) ** 0.25
    np.testing.assert_allclose(new["norm1"]["scale"], params["norm1"]["scale"] / s, rtol=1e-4)
    np.testing.assert_allclose(new["norm1"]["bias"], params["norm1"]["bias"] / s, rtol=1e-4)
    np.testing.assert_allclose(
        new["attention"]["query"]["kernel"], params["attention"]["query"]["kernel"] * s[:, None, None], rtol=1e-4
    )


def test_eight_bits_on_both_sides_cost_less_after_smoothing():
    rng = np.random.default_rng(0)
    x = jnp.float32(rng.normal(size=(64, 32)) * np.where(np.arange(32) % 16 == 3, 60, 1))
    params = {"scale": jnp.ones(32), "kernel": jnp.float32(rng.normal(size=(32, 16)))}

    def inputs(p, x):
        return jw.rms_norm(x) * p["scale"]

    def f(p, x):
        return inputs(p, x) @ p["kernel"]

    def both_rounded(p):
        a, w = inputs(p, x), jw.dequantize(jw.quantize(p["kernel"], 8))
        step = jnp.abs(a).max(1, keepdims=True) / 127
        return jnp.linalg.norm(jnp.round(a / step) * step @ w - f(p, x))

    assert both_rounded(jw.smooth(f, params, [x])) < both_rounded(params) / 2
