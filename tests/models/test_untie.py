"""Trees without their tied leaves: a model with tied head and layers in four frameworks, optimizers and checkpoints."""

import equinox as eqx
import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx, serialization

import jaxweights as jw

WORDS, WIDTH, DEPTH, RATE, MOMENTUM, DECAY = 7, 4, 3, 0.1, 0.9, 0.01
TOKENS = np.array([0, 3, 3, 6, 1])
TARGET = np.random.default_rng(0).normal(size=(len(TOKENS), WORDS))
DRAWN = np.random.default_rng(1)
START = [DRAWN.normal(size=size) for size in ((WORDS, WIDTH), (WIDTH, WIDTH), (WIDTH,))]


def oracle(steps):
    """SGD with momentum and weight decay on one table, one kernel and one bias, by the chain rule in float64.

    h = table[tokens], DEPTH times h = tanh(h kernel + bias), loss = |h tableᵀ - target|² / 2.
    """
    weights = [w.copy() for w in START]
    speed = [np.zeros_like(w) for w in START]
    for _ in range(steps):
        table, kernel, bias = weights
        hs = [table[TOKENS]]
        for _ in range(DEPTH):
            hs.append(np.tanh(hs[-1] @ kernel + bias))
        error = hs[-1] @ table.T - TARGET
        grads = [error.T @ hs[-1], np.zeros_like(kernel), np.zeros_like(bias)]
        back = error @ table
        for before, after in zip(hs[-2::-1], hs[:0:-1], strict=True):
            back = back * (1 - after**2)
            grads[1] += before.T @ back
            grads[2] += back.sum(0)
            back = back @ kernel.T
        np.add.at(grads[0], TOKENS, back)
        for w, g, v in zip(weights, grads, speed, strict=True):
            v[...] = MOMENTUM * v + g + DECAY * w
            w -= RATE * v
    return weights


class Linen(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        h = nn.Embed(WORDS, WIDTH, name="embed")(tokens)
        for i in range(DEPTH):
            h = jnp.tanh(nn.Dense(WIDTH, name=f"layer_{i}")(h))
        return nn.Dense(WORDS, use_bias=False, name="head")(h)


class NNX(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(WORDS, WIDTH, rngs=rngs)
        for i in range(DEPTH):
            setattr(self, f"layer_{i}", nnx.Linear(WIDTH, WIDTH, rngs=rngs))
        self.head = nnx.Linear(WIDTH, WORDS, use_bias=False, rngs=rngs)

    def __call__(self, tokens):
        h = self.embed(tokens)
        for i in range(DEPTH):
            h = jnp.tanh(getattr(self, f"layer_{i}")(h))
        return self.head(h)


class Equinox(eqx.Module):
    embed: eqx.nn.Embedding
    layers: list
    head: eqx.nn.Linear

    def __init__(self, key):
        self.embed = eqx.nn.Embedding(WORDS, WIDTH, key=key)
        self.layers = [{"linear": eqx.nn.Linear(WIDTH, WIDTH, key=key), "act": jnp.tanh} for _ in range(DEPTH)]
        self.head = eqx.nn.Linear(WIDTH, WORDS, use_bias=False, key=key)

    def __call__(self, token):
        h = self.embed(token)
        for layer in self.layers:
            h = layer["act"](layer["linear"](h))
        return self.head(h)


LAYERS = {f"layer_{i}": "layer_0" for i in range(1, DEPTH)}
TIES = {"head/kernel": "embed/embedding", **LAYERS}


def params():
    """The parameters of the Linen model."""
    shapes = jax.eval_shape(Linen().init, jax.random.key(0), TOKENS)["params"]
    return placed(jax.tree.map(lambda s: jnp.full(s.shape, 7.0), shapes), START)


def forward(params):
    h = params["embed"]["embedding"][TOKENS]
    for i in range(DEPTH):
        h = jnp.tanh(h @ params[f"layer_{i}"]["kernel"] + params[f"layer_{i}"]["bias"])
    return h @ params["head"]["kernel"]


def of_plain():
    return params(), TIES, forward


def of_linen():
    return params(), TIES, lambda params: Linen().apply({"params": params}, TOKENS)


def of_frozen_linen():
    return flax.core.freeze(params()), TIES, lambda params: Linen().apply({"params": params}, TOKENS)


def of_nnx():
    graph, state = nnx.split(NNX(nnx.Rngs(0)), nnx.Param)
    return state, TIES, lambda state: nnx.merge(graph, state)(TOKENS)


def of_equinox():
    """Layers that compute W x, with functions among the leaves."""
    ties = {"head/weight": "embed/weight", **{f"layers/{i}": "layers/0" for i in range(1, DEPTH)}}
    return Equinox(jax.random.key(0)), ties, lambda model: jax.vmap(model)(TOKENS)


def placed(tree, weights):
    """The tree with the table, the kernel and the bias in all their places, by the names of the places."""
    table, kernel, bias = weights

    def value(path, leaf):
        name = jax.tree_util.keystr(path)
        of_name = table.T if "head" in name else table if "embed" in name else bias if "bias" in name else kernel
        turned = of_name.T if "weight" in name and "embed" not in name else of_name
        return jnp.asarray(turned, jnp.float32) if eqx.is_array(leaf) else leaf

    return jax.tree_util.tree_map_with_path(value, tree)


@pytest.mark.parametrize("framework", [of_plain, of_linen, of_frozen_linen, of_nnx, of_equinox])
def test_training_is_that_of_one_table_and_one_layer(framework):
    """Three donated steps with momentum and weight decay, each of which sees a tied weight once."""
    start, ties, apply = framework()
    free, whole = jw.untie(start, ties)
    arrays, functions = eqx.partition(placed(free, START), eqx.is_array)
    tx = optax.chain(optax.add_decayed_weights(DECAY), optax.sgd(RATE, MOMENTUM))
    state = tx.init(arrays)
    assert sum(a.size for a in jax.tree.leaves(state)) == sum(w.size for w in START)

    def step(arrays, state):
        def loss(arrays):
            return ((apply(whole(eqx.combine(arrays, functions))) - TARGET) ** 2).sum() / 2

        updates, state = tx.update(jax.grad(loss)(arrays), state, arrays)
        return optax.apply_updates(arrays, updates), state

    step = jax.jit(step, donate_argnums=(0, 1))
    for _ in range(3):
        arrays, state = step(arrays, state)
    exported = whole(eqx.combine(arrays, functions))
    assert jax.tree.structure(exported) == jax.tree.structure(start)
    for got, expected in zip(jax.tree.leaves(exported), jax.tree.leaves(placed(start, oracle(3))), strict=True):
        if eqx.is_array(got):
            np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def orbax(tree, like, folder):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "saved", tree)
        checkpointer.wait_until_finished()
        return checkpointer.restore(folder / "saved", like)


def msgpack(tree, like, folder):
    data = serialization.to_bytes(tree)
    (folder / "saved").write_bytes(data)
    return serialization.from_bytes(like, data)


def safetensors(tree, like, folder):
    jw.files.save(folder / "saved.safetensors", tree)
    return jw.files.load(folder / "saved.safetensors")


@pytest.mark.parametrize("saved", [orbax, msgpack, safetensors])
def test_a_checkpoint_has_a_tied_weight_once(saved, tmp_path):
    table = jax.random.normal(jax.random.key(0), (500, 40))  # of 80,000 bytes that do not compress
    tree = {"embed": table, "head": jnp.zeros((40, 500)), "bias": jnp.arange(500.0)}
    free, _ = jw.untie(tree, {"head": "embed"})
    like, whole = jw.untie(jax.eval_shape(lambda: tree), {"head": "embed"})
    restored = whole(saved(free, like, tmp_path))
    assert 75_000 < sum(f.stat().st_size for f in tmp_path.rglob("*") if f.is_file()) < 120_000
    np.testing.assert_array_equal(restored["head"], np.asarray(table).T)
    np.testing.assert_array_equal(restored["embed"], table)
    np.testing.assert_array_equal(restored["bias"], tree["bias"])


def test_a_table_compressed_after_training_is_stored_once():
    free, whole = jw.untie(params(), TIES)
    stored = {**free, "embed": {"embedding": jw.quantize(free["embed"]["embedding"], 8, axes=jw.Axes(1, 0))}}
    run = lambda tree: Linen().apply({"params": whole(tree)}, TOKENS)
    np.testing.assert_allclose(jax.jit(jw.with_stored(run))(stored), run(jw.densify(stored)), rtol=1e-4, atol=1e-5)
    exported = whole(stored)
    assert isinstance(exported["head"]["kernel"], jw.QuantizedArray)
    logits = jax.jit(jw.with_stored(lambda tree: Linen().apply({"params": tree}, TOKENS)))(exported)
    np.testing.assert_allclose(logits, run(jw.densify(stored)), rtol=1e-4, atol=1e-5)


def test_a_subtree_is_tied_with_the_weights_that_match_it_alone():
    tree = {"layer_1": {"w": jnp.zeros(2)}, "layer_10": {"w": jnp.ones(2)}, "layer_0": {"w": jnp.full(2, 3.0)}}
    free, whole = jw.untie(tree, {"layer_1": "layer_0"})
    assert jax.tree.structure(free) == jax.tree.structure({**tree, "layer_1": {"w": None}})
    np.testing.assert_array_equal(whole(free)["layer_1"]["w"], 3)
    np.testing.assert_array_equal(whole(free)["layer_10"]["w"], 1)
