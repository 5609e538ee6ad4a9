"""One-shot methods on trees and models, against float64 NumPy, and a capture of the whole model for every layer."""

import dataclasses
import functools
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

import jaxweights as jw
from jaxweights.methods import Magnitude, Pack, SparseGPT, Wanda


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def wanda(w, x, sparsity=0.5):
    """The published recipe in float64: of each column, the weights of smallest |w|·‖x‖ are 0."""
    scores = np.abs(w) * np.linalg.norm(x, axis=0)[:, None]
    new = w.copy()
    for j, column in enumerate(scores.T):
        new[np.argsort(column, kind="stable")[: round(sparsity * len(w))], j] = 0
    return new


def sparsegpt_2_4(w, x):
    """SparseGPT at 2:4 as published, one input at a time in float64."""
    w, h = w.copy(), x.T @ x / len(x)
    u = np.linalg.cholesky(np.linalg.inv(h + 0.01 * np.mean(np.diag(h)) * np.eye(len(h)))).T
    for i in range(len(w)):
        if i % 4 == 0:
            ranks = np.argsort(np.argsort(np.abs(w[i : i + 4]) / np.diag(u)[i : i + 4, None], 0), 0)
        e = np.where(ranks[i % 4] < 2, w[i], 0) / u[i, i]
        w[i:] -= np.outer(u[i, i:], e)
        w[i] = np.where(ranks[i % 4] < 2, 0, w[i])
    return w


W1, W2 = normal(8, 12), normal(12, 4, seed=4)
X = [normal(30, 8, seed=2) * np.exp(normal(8, seed=3)), normal(20, 8, seed=4)]
PARAMS = {"layers_0": {"kernel": jnp.float32(W1)}, "layers_2": {"kernel": jnp.float32(W2)}}
BATCHES = [jnp.float32(x) for x in X]


def mlp(params, x):
    return nn.relu(x @ params["layers_0"]["kernel"]) @ params["layers_2"]["kernel"]


def relu(x):
    return np.maximum(x, 0)


# One call for a function, a Linen and an NNX model


def of_function(method, **options):
    new = jw.compress(mlp, PARAMS, BATCHES, method, **options)
    return new["layers_0"]["kernel"], new["layers_2"]["kernel"]


def of_linen(method, **options):
    model = nn.Sequential([nn.Dense(12, use_bias=False), nn.relu, nn.Dense(4, use_bias=False)])
    variables = {"params": PARAMS, "other": {"kept": jnp.ones(3)}}
    new = jw.linen.compress(model, variables, BATCHES, method, **options)
    assert new["other"] is variables["other"]
    return new["params"]["layers_0"]["kernel"], new["params"]["layers_2"]["kernel"]


def of_nnx(method, **options):
    rngs = nnx.Rngs(0)
    layers = [nnx.Linear(8, 12, use_bias=False, rngs=rngs), nnx.relu, nnx.Linear(12, 4, use_bias=False, rngs=rngs)]
    model = nnx.Sequential(*layers)
    model.layers[0].kernel[...], model.layers[2].kernel[...] = jnp.float32(W1), jnp.float32(W2)
    new = jw.nnx.compress(model, BATCHES, method, **options)
    np.testing.assert_array_equal(model.layers[0].kernel[...], np.float32(W1))
    graph, state = nnx.split(new)
    run = jw.with_stored(lambda state, x: nnx.merge(graph, state)(x))
    weights = nnx.to_pure_dict(nnx.state(new, nnx.Param))["layers"]
    up, down = weights[0]["kernel"], weights[2]["kernel"]
    params = jw.densify({"layers_0": {"kernel": up}, "layers_2": {"kernel": down}})
    np.testing.assert_allclose(run(state, BATCHES[0]), mlp(params, BATCHES[0]), rtol=1e-4, atol=1e-5)
    return up, down


@pytest.mark.parametrize("compress", [of_function, of_linen, of_nnx])
def test_each_layer_is_calibrated_on_the_layers_already_done_if_asked(compress):
    x = np.concatenate(X)
    for recipe, method, tolerance in [(wanda, Wanda(0.5), 0), (sparsegpt_2_4, SparseGPT((2, 4)), 2e-4)]:
        first = recipe(W1, x)
        for sequential, hidden in [(False, relu(x @ W1)), (True, relu(x @ first))]:
            new = compress(method, sequential=sequential)
            for got, expected in zip(new, (first, recipe(W2, hidden)), strict=True):
                np.testing.assert_array_equal(np.asarray(got) == 0, expected == 0)
                np.testing.assert_allclose(got, expected, rtol=max(tolerance, 1e-6), atol=tolerance)
        assert not np.allclose(recipe(W2, relu(x @ W1)), recipe(W2, relu(x @ first)), atol=0.05)


@pytest.mark.parametrize("sequential", [False, True])
def test_what_is_stored_already_stays(sequential):
    stored = jw.quantize(jnp.float32(W1), 3)
    params = PARAMS | {"layers_0": {"kernel": stored}}
    new = jw.compress(jw.with_stored(mlp), params, BATCHES, Wanda(0.5), sequential=sequential)
    assert new["layers_0"]["kernel"] is stored
    hidden = relu(np.concatenate(X) @ np.float64(stored.todense()))
    np.testing.assert_allclose(new["layers_2"]["kernel"], wanda(W2, hidden), rtol=1e-6)


@pytest.mark.parametrize("compress", [of_function, of_linen, of_nnx])
def test_weights_can_be_stored_in_the_same_call(compress):
    for sequential in (False, True):
        stored = compress((SparseGPT((2, 4)), Pack()), sequential=sequential)
        for packed, w in zip(stored, compress(SparseGPT((2, 4)), sequential=sequential), strict=True):
            assert isinstance(packed, jw.sparse.PackedArray)
            np.testing.assert_array_equal(packed.todense(), w)


# Deep models


class Block(nn.Module):
    """Attention and a perceptron; query, key and value see the same data."""

    @nn.compact
    def __call__(self, x, _=None):
        x = x + nn.MultiHeadDotProductAttention(2, name="attention")(nn.LayerNorm(name="n1")(x))
        return x + nn.Dense(8, name="down")(nn.gelu(nn.Dense(16, name="up")(nn.LayerNorm(name="n2")(x)))), None


class Loop(nn.Module):
    """Blocks, one after the other."""

    @nn.compact
    def __call__(self, x):
        for i in range(2):
            x, _ = Block(name=f"block_{i}")(x)
        return nn.Dense(4, name="head")(x)


class Scan(nn.Module):
    """The same as a loop over a stack."""

    @nn.compact
    def __call__(self, x):
        stack = nn.scan(nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        return nn.Dense(4, name="head")(stack(name="blocks")(x, None)[0])


def test_layers_of_a_stack_are_done_one_after_the_other():
    """Against a capture of the whole model for each part in turn. Batches differ in length."""
    batches = [jnp.float32(normal(3, length, 8, seed=length)) for length in (5, 7, 5)]
    params = Loop().init(jax.random.key(0), batches[0])["params"]
    blocks = [params[f"block_{i}"] for i in range(2)]
    stacked = {"blocks": jax.tree.map(lambda *a: jnp.stack(a), *blocks), "head": params["head"]}
    method = Wanda(0.5, reconstruct=True)
    once = jw.linen.compress(Loop(), {"params": params}, batches, method, sequential=True)["params"]
    scanned = jw.linen.compress(Scan(), {"params": stacked}, batches, method, sequential=True)["params"]

    parts = ("attention/[qkv]*/kernel", "attention/out/kernel", "up/kernel", "down/kernel")
    current = params
    for part in (*(f"block_{i}/{part}" for i in range(2) for part in parts), "head/kernel"):
        stats = jw.linen.capture(Loop(), {"params": current}, batches, part)
        current = jw.one_shot(current, method, stats)

    def check(path, got, expected):
        np.testing.assert_array_equal(got == 0, expected == 0, err_msg=str(path))
        np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-4, err_msg=str(path))

    jax.tree_util.tree_map_with_path(check, once, current)
    for i in range(2):
        of_layer = jax.tree.map(lambda a, i=i: a[i], scanned["blocks"])
        jax.tree_util.tree_map_with_path(check, of_layer, current[f"block_{i}"])
    check("head", scanned["head"]["kernel"], current["head"]["kernel"])

    stored = jw.linen.compress(Scan(), {"params": stacked}, batches, (SparseGPT((2, 4)), Pack()), sequential=True)
    plain = jw.linen.compress(Scan(), {"params": stacked}, batches, SparseGPT((2, 4)), sequential=True)
    jax.tree.map(np.testing.assert_array_equal, jw.densify(stored), plain)
    assert stored["params"]["blocks"]["up"]["kernel"].shape == (2, 8, 16)


def test_a_weight_used_twice_is_fitted_where_it_is_used_last():
    w, head, x = normal(6, 6), normal(6, 4, seed=1), normal(40, 6, seed=2)
    params = {"w": jnp.float32(w), "head": jnp.float32(head)}

    def f(params, x):
        return nn.relu(nn.relu(x @ params["w"]) @ params["w"]) @ params["head"]

    new = jw.compress(f, params, [jnp.float32(x)], Wanda(0.5), sequential=True)
    middle = relu(x @ w)  # by the old weight: the new one is known after its last use
    expected = wanda(w, np.concatenate([x, middle]))
    np.testing.assert_array_equal(new["w"] == 0, expected == 0)
    np.testing.assert_array_equal(new["head"] == 0, wanda(head, relu(middle @ expected)) == 0)


def test_a_loop_that_shares_a_weight_is_one_part():
    """A recurrent layer: its inputs are those of all steps."""
    u, v, x = 0.5 * normal(6, 6), normal(6, 4, seed=1), normal(5, 7, 6, seed=2)
    params = {"u": jnp.float32(u), "v": jnp.float32(v)}

    def f(params, x):
        last, _ = jax.lax.scan(lambda h, x: (jnp.tanh(h @ params["u"] + x), None), jnp.zeros(x.shape[1:]), x)
        return last @ params["v"]

    def states(u):
        h = [np.zeros((7, 6))]
        for step in x:
            h.append(np.tanh(h[-1] @ u + step))
        return h

    new = jw.compress(f, params, [jnp.float32(x)], Wanda(0.5), sequential=True)
    first = wanda(u, np.concatenate(states(u)[:-1]))
    np.testing.assert_array_equal(new["u"] == 0, first == 0)
    np.testing.assert_array_equal(new["v"] == 0, wanda(v, states(first)[-1]) == 0)


# Which weights


def test_axes_are_those_of_the_data_then_of_the_layout_then_of_the_names():
    w, x = normal(12, 8), normal(50, 8, seed=1) * np.exp(normal(8, seed=2))
    params = {"a": jnp.float32(w), "bias": jnp.ones(3)}
    stats = jw.capture(lambda params, x: x @ params["a"].T, params, [jnp.float32(x)])
    new = jw.one_shot(params, Wanda(0.5), stats)
    np.testing.assert_allclose(new["a"], wanda(w.T, x).T, rtol=1e-6)
    assert new["bias"] is params["bias"]
    rows = jw.one_shot(params, Magnitude((2, 4)), layout={"a": jw.Axes(1, 0)})["a"]
    np.testing.assert_array_equal((rows != 0).reshape(12, 2, 4).sum(2), 2)
    with pytest.warns(jw.AxesWarning, match="'a' .* are a guess"):
        columns = jw.one_shot(params, Magnitude((2, 4)))["a"]
    jw.one_shot({"unnamed": params["a"]}, Magnitude(0.5))  # the same whichever axis is the input
    np.testing.assert_array_equal((columns != 0).reshape(3, 4, 8).sum(1), 2)
    nothing_needed = jw.compress(lambda params, x: x @ params["a"].T, params, [jnp.float32(x)], Magnitude((2, 4)))
    np.testing.assert_array_equal(nothing_needed["a"], rows)


def test_rules_give_each_weight_its_method():
    params = {"table": jnp.float32(normal(10, 8, seed=9)), **PARAMS}
    rules = {"table": Magnitude(0.5), "layers_0/*": SparseGPT((2, 4)), "**/kernel": Wanda(0.25)}

    def f(params, tokens):
        return mlp(params, params["table"][tokens])

    tokens = jnp.arange(10)
    for sequential in (False, True):
        new = jw.compress(f, params, [tokens], rules, sequential=sequential)
        zeros = [np.mean(np.asarray(w) == 0) for w in jax.tree.leaves(new)]
        assert zeros == [0.5, 0.25, 0.5], sequential
    embedded = np.float64(params["table"])
    if_first = wanda(np.float64(W2), relu(embedded @ W1), 0.25)
    np.testing.assert_array_equal(jw.compress(f, params, [tokens], rules)["layers_2"]["kernel"] == 0, if_first == 0)


@pytest.mark.parametrize("sequential", [False, True])
def test_a_weight_that_is_not_multiplied_is_left_out_aloud(sequential):
    params = {**PARAMS, "twice": jnp.float32(normal(4, 4))}

    def f(params, x):  # read in two ways: no statistics
        return mlp(params, x) @ params["twice"] @ params["twice"].T

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        new = jw.compress(f, params, BATCHES, Wanda(0.5), sequential=sequential)
    assert any("twice" in str(w.message) for w in caught)
    assert new["twice"] is params["twice"] and np.mean(np.asarray(new["layers_2"]["kernel"]) == 0) == 0.5
    with pytest.raises(ValueError, match="'twice'"):
        jw.compress(f, params, BATCHES, Wanda(0.5), "twice", sequential=sequential)


# Cost


def test_one_weight_at_a_time_and_one_program_for_all_of_a_kind():
    traced, held = [], []

    @dataclasses.dataclass(frozen=True)
    class Halve(jw.methods.Method):
        """A method of one's own."""

        def fit(self, w, stats):
            traced.append(w.shape)
            return w * jnp.where(stats.norm[:, None] > 0, 0.5, 1)

    class Lazy(dict):
        """Statistics that are loaded when their turn comes."""

        def __getitem__(self, path):
            held.append(path)
            return super().__getitem__(path)

    params = {**{f"layer_{i}": jnp.full((4, 4), float(i)) for i in range(5)}, "head": jnp.ones((4, 2))}

    def f(params, x):
        for i in range(5):
            x = x @ params[f"layer_{i}"] + 1
        return x @ params["head"]

    stats = Lazy(jw.capture(f, params, [jnp.ones((3, 4))]))
    new = jw.one_shot(params, Halve(), stats, progress=True)
    assert sorted(traced) == [(4, 2), (4, 4)]
    assert sorted(held) == sorted(params)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b / 2), new, params)


def test_weights_stay_sharded():
    sharding = NamedSharding(jax.make_mesh((4,), ("x",)), PartitionSpec(None, "x"))
    sharded = jax.device_put(PARAMS, sharding)
    for sequential in (False, True):
        new, expected = (jw.compress(mlp, p, BATCHES, Wanda(0.5), sequential=sequential) for p in (sharded, PARAMS))
        jax.tree.map(np.testing.assert_array_equal, new, expected)
        assert all(w.sharding.is_equivalent_to(sharding, 2) for w in jax.tree.leaves(new))


def test_it_runs_under_jit():
    stats = jw.capture(mlp, PARAMS, BATCHES)
    new = jax.jit(functools.partial(jw.one_shot, method=Wanda(0.5)))(PARAMS, stats=stats)
    jax.tree.map(np.testing.assert_array_equal, new, jw.one_shot(PARAMS, Wanda(0.5), stats))
