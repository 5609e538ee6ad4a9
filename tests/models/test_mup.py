"""muP on trees: the scales of every weight of a model, and updates independent of width."""

import functools

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict
from flax_modules import KEY, scanned

import jaxweights as jw

WIDTHS = [64, 256, 1024]


class Model(nn.Module):
    """One layer of every kind."""

    width: int

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(50, self.width, name="embed")(tokens)
        x = nn.LayerNorm(name="norm")(x)
        x = nn.MultiHeadDotProductAttention(self.width // 8, name="attention")(x)
        x, _ = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)(name="blocks")(
            x, None
        )
        return nn.Dense(10, name="head")(x)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        h = nn.relu(nn.Dense(4 * x.shape[-1], name="up")(nn.LayerNorm(name="norm")(x)))
        return x + nn.Dense(x.shape[-1], name="down")(h), None


def shapes(width):
    return jax.eval_shape(Model(width).init, KEY, jnp.zeros((1, 4), jnp.int32))["params"]


def ones(width):
    return jax.tree.map(lambda s: jnp.ones(s.shape), shapes(width))


def expected(path, r):
    """Returns the scales (init, Adam, SGD) at r times the base width."""
    if path == "head/bias":
        return 1, 1, 1
    if path.endswith(("bias", "scale", "embedding")):
        return 1, 1, r
    if path == "head/kernel":
        return r**-0.5, 1 / r, 1 / r
    return 1, 1 / r, 1


def test_every_weight_of_a_transformer():
    narrow, wide, r = shapes(16), ones(64), 4
    assert wide["blocks"]["up"]["kernel"].shape == (3, 64, 256)
    new = jw.mup_init(wide, narrow)
    updates = {}
    for adaptive in (True, False):
        tx = jw.scale_by_mup(narrow, adaptive=adaptive)
        updates[adaptive], _ = tx.update(wide, tx.init(wide), wide)
    flat = [flatten_dict(tree, sep="/") for tree in (new, updates[True], updates[False])]
    assert len(flat[0]) == 19
    for path in flat[0]:
        assert tuple(float(tree[path].max()) for tree in flat) == pytest.approx(expected(path, r)), path


def test_the_base_changes_nothing():
    wide = ones(16)
    new = jw.mup_init(wide, wide)
    assert all(a is b for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(wide), strict=True))


def test_axes_by_hand():
    """Without a bias, (features, heads, head_dim) cannot be inferred."""
    wide, narrow = ({"q": {"kernel": jnp.ones((n, n // 4, 4))}} for n in (32, 8))
    tx = jw.scale_by_mup(narrow, layout={"q/kernel": jw.axes.ATTENTION_IN})
    assert (tx.update(wide, tx.init(wide), wide)[0]["q"]["kernel"] == 1 / 4).all()


def test_other_trees_masks_and_dtypes():
    def linear(n):
        return nnx.state(nnx.Linear(n, n, rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16))

    def mlp(n):
        return eqx.filter(eqx.nn.MLP(4, 2, n, 2, key=KEY), eqx.is_array)

    wide, tx = linear(32), jw.scale_by_mup(linear(8))
    updates, _ = jax.jit(tx.update)(wide, tx.init(wide), wide)
    assert updates["kernel"][...].dtype == jnp.bfloat16
    np.testing.assert_array_equal(updates["kernel"][...], wide["kernel"][...] / 4)

    axes = {f"layers/{i}/weight": jw.Axes(input=1, output=0) for i in range(3)}
    wide, tx = mlp(32), jw.scale_by_mup(mlp(8), layout=axes)
    updates, _ = tx.update(wide, tx.init(wide), wide)
    ratios = [np.asarray(u.weight / w.weight).mean() for u, w in zip(updates.layers, wide.layers, strict=True)]
    np.testing.assert_allclose(ratios, [1, 1 / 4, 1 / 4], rtol=1e-6)

    wide, narrow = (
        {"kernel": jnp.ones((8, 8)), "frozen": jnp.ones(8)},
        {"kernel": jnp.ones((2, 2)), "frozen": jnp.ones(2)},
    )
    tx = optax.masked(optax.chain(optax.trace(0.9), jw.scale_by_mup(narrow)), {"kernel": True, "frozen": False})
    updates, _ = tx.update(wide, tx.init(wide), wide)
    assert (updates["kernel"] == 1 / 4).all() and (updates["frozen"] == 1).all()


def test_stacks_of_another_depth_are_refused():
    def make(width, length):
        return jax.eval_shape(scanned(length=length).init, KEY, jnp.zeros((1, width)))["params"]

    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape), make(8, 3))
    with pytest.raises(ValueError, match=r"d/.*the base as many layers"):
        jw.mup_init({"d": {"kernel": zeros["d"]["kernel"], "bias": zeros["d"]["bias"]}}, make(4, 2))


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def moved(key, width, tx, adaptive):
    """How far 5 steps move the output of each layer of a linear network with a zero output layer."""
    keys = jax.random.split(key, 5)
    shapes = [(20, width), (width, width), (width, width), (width, 3)]
    weights = {
        f"{i}/kernel": jw.initializers.lecun_normal(k, s) for i, (k, s) in enumerate(zip(keys, shapes, strict=False))
    }
    weights["3/kernel"] = jnp.zeros((width, 3))
    narrow = {f"{i}/kernel": jnp.zeros([WIDTHS[0] if n == width else n for n in s]) for i, s in enumerate(shapes)}
    if adaptive is not None:
        weights, tx = jw.mup_init(weights, narrow), optax.chain(tx, jw.scale_by_mup(narrow, adaptive=adaptive))
    x = jax.random.normal(keys[4], (50, 20))

    def layers(weights):
        h = [x]
        for i in range(4):
            h.append(h[-1] @ weights[f"{i}/kernel"])
        return h[1:]

    def step(carry, _):
        weights, state = carry
        grads = jax.grad(lambda w: jnp.mean((layers(w)[-1] - 1) ** 2))(weights)
        updates, state = tx.update(grads, state, weights)
        return (optax.apply_updates(weights, updates), state), None

    (new, _), _ = jax.lax.scan(step, (weights, tx.init(weights)), length=5)
    return [jnp.sqrt(jnp.mean((a - b) ** 2)) for a, b in zip(layers(new), layers(weights), strict=True)]


def slopes(tx, adaptive):
    """Slope of log movement against log width, per layer."""
    return np.polyfit(np.log(WIDTHS), np.log([moved(KEY, n, tx, adaptive) for n in WIDTHS]), 1)[0]


def test_a_step_moves_the_activations_as_much_at_every_width():
    assert np.abs(slopes(optax.adam(0.01), True)).max() < 0.2
    assert np.abs(slopes(optax.sgd(0.1), False)).max() < 0.2
    assert slopes(optax.adam(0.01), None)[1:].min() > 0.5  # the standard parametrization
