"""How models of three frameworks read their weights, as gradients confirm; and the layout itself."""

import fnmatch
import functools
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxweights as jw
from benchmarks.readings import confirmed, gradients, ranks, singular_values
from jaxweights.levels.paths import flatten
from jaxweights.models.layout_table import in_words

KEY = jax.random.key(0)
IN_OUT, OUT_IN = {"*kernel": "in out", "*bias": "added"}, {"*weight": "out in", "*bias": "added"}
HEADS = {"*out/kernel": "in in out", "*kernel": "in out out", "*bias": "added"}


class Model(NamedTuple):
    """A model, and what its layout says of each weight.

    Attributes:
      layout: () -> Layout.
      f: a function (params, *args).
      params: its weights.
      args: the data.
      says: {glob: the roles of the axes, or why there are none}; the first that matches a path.
      positions: how often each matrix is used; None if that is more than its rank.
    """

    layout: Any
    f: Any
    params: Any
    args: tuple
    says: dict
    positions: int | None


def linen(module, *args, says, positions=2, **kwargs):
    """A Linen module."""
    variables = jax.eval_shape(lambda *args: module.init({"params": KEY, "dropout": KEY}, *args, **kwargs), *args)
    params, rest = variables["params"], {name: filled(c) for name, c in variables.items() if name != "params"}
    options = {"rngs": {"dropout": KEY}, **kwargs}
    f = lambda p, *args: module.apply({**rest, "params": p}, *args, mutable=[*rest], **options)[0]
    return Model(lambda: jw.linen.layout(module, variables, *args, **options), f, params, args, says, positions)


def of_nnx(make, *args, says, positions=2):
    """The NNX module of some rngs."""
    model = nnx.eval_shape(lambda: make(nnx.Rngs(0)))
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    f = lambda p, *args: nnx.merge(graph, p, filled(rest))(*args)
    return Model(lambda: jw.nnx.layout(model, *args), f, params, args, says, positions)


def equinox(make, *args, says, positions=2, call=jax.vmap):
    """The Equinox module of a key; of one sample, under `vmap`."""
    model = eqx.filter_eval_shape(make, KEY)
    is_array = lambda leaf: isinstance(leaf, jax.Array | jax.ShapeDtypeStruct)
    params, static = eqx.partition(model, is_array)
    run = lambda model, *args: call(model)(*args)
    f = lambda p, *args: run(eqx.combine(p, static), *args)
    return Model(lambda: jw.layout(run, model, *args), f, params, args, says, positions)


def normal(*shape):
    return jnp.asarray(np.random.default_rng(len(shape)).normal(size=shape) / 2, jnp.float32)


def filled(tree):
    """The tree with random numbers for shapes, and one key for keys."""
    rng = np.random.default_rng(0)

    def fill(leaf):
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.asarray(rng.normal(size=leaf.shape) / 2, leaf.dtype)
        return KEY if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else jnp.zeros(leaf.shape, leaf.dtype)

    return jax.tree.map(fill, tree)


class Lifted(nn.Module):
    """A scanned and rematerialized stack without biases, an ensemble on the same data, and heads of queries."""

    @nn.compact
    def __call__(self, x):
        step = nn.remat(lambda layer, x, _: (jnp.tanh(layer(x)), None))
        stack = nn.scan(step, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        x, _ = stack(nn.Dense(x.shape[-1], use_bias=False, name="stack"), x, None)
        apart = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "axis_size": 3}
        ensemble = nn.vmap(lambda layer, x: layer(x), in_axes=None, **apart)
        experts = nn.vmap(lambda layer, x: layer(x), in_axes=0, **apart)
        x = ensemble(nn.Dense(6, use_bias=False, name="ensemble"), x)
        x = experts(nn.Dense(6, use_bias=False, name="experts"), x)
        return nn.DenseGeneral((2, 8), use_bias=False, name="q_proj")(x.mean(0))


class Tied(nn.Module):
    """A language model whose last layer is the table of embeddings, with positions, a class token and dropout."""

    @nn.compact
    def __call__(self, tokens, train=False):
        embed = nn.Embed(9, 6)
        x = embed(tokens) + self.param("pos_embedding", nn.initializers.normal(), (2, 6))
        x = jnp.concatenate([self.param("cls_token", nn.initializers.normal(), (1, 6)), x])
        x = nn.Dropout(0.5, deterministic=not train)(nn.LayerNorm()(nn.Dense(6)(x)))
        return embed.attend(x[1:])


class Images(nn.Module):
    """Convolutions of one image, down to one position and up again."""

    @nn.compact
    def __call__(self, x, train=True):
        x = nn.Conv(8, (3, 3), padding="VALID", name="plain")(x)
        x = nn.BatchNorm(use_running_average=not train)(x)
        x = nn.Conv(8, (1, 1), feature_group_count=8, use_bias=False, name="depthwise")(x)
        x = nn.Conv(8, (1, 2), feature_group_count=2, padding="VALID", use_bias=False, name="grouped")(jnp.tanh(x))
        x = nn.ConvTranspose(12, (1, 1), use_bias=False, name="up")(jnp.tanh(x))
        x = nn.ConvTranspose(9, (1, 1), use_bias=False, transpose_kernel=True, name="transposed")(jnp.tanh(x))
        return nn.Dense(4, name="head")(x.reshape(len(x), -1))


class Scanned(nnx.Module):
    """A scanned stack of layers, and an ensemble of two layers on the same data."""

    def __init__(self, rngs):
        def make(n, out):
            each = nnx.vmap(lambda rngs: nnx.Linear(6, out, use_bias=False, rngs=rngs))
            return nnx.split_rngs(splits=n)(each)(rngs)

        self.layers, self.first, self.second = make(3, 6), make(4, 6), make(4, 5)

    def __call__(self, x):
        x = nnx.scan(lambda x, layer: jnp.tanh(layer(x)), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers)
        return nnx.vmap(lambda a, b, x: b(jnp.tanh(a(x))), in_axes=(0, 0, None))(self.first, self.second, x)


class Adapted(nnx.Module):
    """A layer with an adapter, and an einsum with a batch of heads."""

    def __init__(self, rngs):
        self.adapted = nnx.LoRALinear(6, 8, lora_rank=3, rngs=rngs)
        self.heads = nnx.Einsum("thd,hdk->thk", (2, 4, 5), (2, 5), rngs=rngs)

    def __call__(self, x):
        return self.heads(jnp.tanh(self.adapted(x)).reshape(len(x), 2, 4))


def each(model):
    """The call of an ensemble on the same samples."""
    return lambda x: eqx.filter_vmap(lambda model: jax.vmap(model)(x))(model)


X, H, IMAGE = normal(2, 4), normal(2, 5), normal(1, 3, 4, 3)
SEQUENCE = normal(1, 2, 8)

MODELS = {
    "Linen attention": lambda: linen(nn.MultiHeadDotProductAttention(3, qkv_features=12), SEQUENCE, says=HEADS),
    "Linen LSTM": lambda: linen(nn.LSTMCell(5), (H, H), X, says=IN_OUT),
    "Linen optimized LSTM": lambda: linen(nn.OptimizedLSTMCell(5), (H, H), X, says=IN_OUT),
    "Linen GRU": lambda: linen(nn.GRUCell(5), H, X, says=IN_OUT),
    "Linen transformations": lambda: linen(
        Lifted(), normal(2, 6), says={"ensemble/*": "stack in out", "q_proj/*": "in out out", "*": "batch in out"}
    ),
    "Linen tied embeddings": lambda: linen(
        Tied(),
        jnp.array([1, 3]),
        train=True,
        positions=None,
        says={"Embed_0/*": "out in", "*kernel": "in out", "cls*": "joined to data", "*scale": "scales", "*": "added"},
    ),
    "Linen images": lambda: linen(
        Images(),
        IMAGE,
        says={
            "depthwise/*": "win win in out, 8 groups",
            "grouped/*": "win win in out, 2 groups",
            "transposed/*": "win win out in",
            "head/kernel": "in out",
            "*kernel": "win win in out",
            "*scale": "scales",
            "*bias": "added",
        },
    ),
    "NNX attention": lambda: of_nnx(
        lambda rngs: nnx.MultiHeadAttention(3, 8, 12, decode=False, rngs=rngs), SEQUENCE, says=HEADS
    ),
    "NNX LSTM": lambda: of_nnx(lambda rngs: nnx.LSTMCell(4, 5, rngs=rngs), (H, H), X, says=IN_OUT),
    "NNX transformations": lambda: of_nnx(Scanned, normal(2, 6), says={"first/*": "stack in out", "*": "batch in out"}),
    "NNX adapters": lambda: of_nnx(
        Adapted,
        normal(2, 6),
        says={"heads/kernel": "batch in out", "*kernel": "in out", "*lora*": "in out", "*": "added"},
    ),
    "Equinox MLP": lambda: equinox(lambda key: eqx.nn.MLP(4, 5, 6, 2, jnp.tanh, key=key), X, says=OUT_IN),
    "Equinox attention": lambda: equinox(
        lambda key: eqx.nn.MultiheadAttention(3, 9, key=key),
        *[normal(2, 9)] * 3,
        says={"*weight": "out in"},
        call=lambda model: model,
    ),
    "Equinox LSTM": lambda: equinox(
        lambda key: eqx.nn.LSTMCell(4, 5, key=key),
        X,
        H,
        says={"weight*": "out in", "*": "added"},
        call=lambda cell: jax.vmap(lambda x, h: cell(x, (h, h))),
    ),
    "Equinox ensemble": lambda: equinox(
        lambda key: eqx.filter_vmap(lambda key: eqx.nn.MLP(4, 5, 6, 2, jnp.tanh, key=key))(jax.random.split(key, 3)),
        X,
        says={"layers/0/weight": "stack out in", "*weight": "batch out in", "*": "added"},
        call=each,
    ),
    "Equinox convolution": lambda: equinox(
        lambda key: eqx.nn.Conv2d(3, 6, 3, key=key),
        normal(1, 3, 3, 4),
        says={"*weight": "out in win win", "*": "added"},
    ),
    "Equinox transposed convolution": lambda: equinox(
        lambda key: eqx.nn.ConvTranspose2d(5, 6, 1, key=key),
        normal(2, 5, 1, 1),
        says={"*weight": "out in win win", "*": "added"},
    ),
}

built = functools.cache(lambda name: MODELS[name]())


@functools.cache
def of_all():
    """{model: gradients of its weights}, all in one compiled program."""
    models = {name: model for name in MODELS if (model := built(name)).positions}
    given = {name: (filled(model.params), model.args) for name, model in models.items()}
    return jax.jit(lambda given: {name: gradients(models[name].f, p, *args) for name, (p, args) in given.items()})(
        given
    )


@pytest.mark.parametrize("name", MODELS)
def test_a_model_tells_how_it_reads_its_weights(name):
    layout, _, params, _, says, positions = built(name)
    found, shapes = layout(), flatten(params).by_path
    expected = {path: next(s for glob, s in says.items() if fnmatch.fnmatchcase(path, glob)) for path in shapes}
    read = {path: in_words(axes, shapes[path].shape) for path, axes in found.items()} | found.skipped
    assert read == {path: words.replace("stack", "batch") for path, words in expected.items()}
    if positions:
        of = flatten(of_all()[name]).by_path
        for path in found:
            assert confirmed(of[path], expected[path], positions), (path, ranks(of[path], expected[path]))


READ_WRONGLY_BY_SHAPE = ("Linen transformations", "Equinox attention", "Equinox ensemble")


@pytest.mark.parametrize(
    "names", [READ_WRONGLY_BY_SHAPE, pytest.param([*MODELS], marks=pytest.mark.slow)], ids=["some", "all"]
)
def test_spectral_norms_are_one_with_the_layout_of_the_model(names):
    """The models as the branches of one tree."""
    layout = {f"{name}/{path}": axes for name in names for path, axes in built(name).layout().items()}
    t = jw.on_tree(jw.SpectralNorm(), layout=layout)
    params = {name: filled(built(name).params) for name in names}
    weights = flatten(jax.jit(lambda params: t.apply(params, t.init(params, KEY)))(params)).by_path
    for path in layout:
        name, _, rest = path.partition("/")
        words = next(s for glob, s in built(name).says.items() if fnmatch.fnmatchcase(rest, glob))
        np.testing.assert_allclose(singular_values(weights[path], words), 1, atol=0.01, err_msg=path)


class Decoder(nn.Module):
    """A language model of 24 layers."""

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(50_000, 1024)(tokens)
        for _ in range(24):
            x = x + nn.MultiHeadDotProductAttention(16)(nn.LayerNorm()(x))
            x = x + nn.Dense(1024)(nn.gelu(nn.Dense(4096)(nn.LayerNorm()(x))))
        return nn.Dense(50_000, use_bias=False)(nn.LayerNorm()(x))


def test_a_large_model_is_read_from_shapes():
    """400 million weights: nothing of that size is computed."""
    tokens = jax.ShapeDtypeStruct((8, 1024), jnp.int32)
    variables = jax.eval_shape(Decoder().init, KEY, tokens)
    found = jw.linen.layout(Decoder(), variables, tokens)
    assert len(found) == 24 * 6 + 1
    shapes = {w.path: w.shape for w in found.weights}
    assert {in_words(axes, shapes[path]) for path, axes in found.items()} == {"in out", "in out out", "in in out"}
    assert found.skipped["Embed_0/embedding"] == "looked up"
    assert {*found.skipped.values()} == {"looked up", "added", "scales"}


def test_a_layout_is_a_hashable_mapping_that_prints_every_weight():
    model = built("Linen images")
    found, again = model.layout(), model.layout()
    assert found == again and hash(found) == hash(again)
    assert dict(found) == {path: found[path] for path in found} and len(found) == 6
    with pytest.raises(KeyError):
        found["plain/bias"]
    lines = str(found).splitlines()
    for path in flatten(model.params).paths:
        assert any(path in line for line in lines)
    assert any("depthwise/kernel" in line and "8 groups" in line for line in lines)
    assert {*found.convolutions} == {"plain/kernel", "depthwise/kernel", "grouped/kernel", "up/kernel"}


def test_shapes_and_arrays_have_one_layout_inside_of_jit_too():
    model = built("Linen optimized LSTM")
    params, shapes = filled(model.params), model.params
    found = jw.layout(model.f, shapes, *model.args)
    assert jw.layout(model.f, params, *model.args) == found
    inside = []
    jax.eval_shape(lambda p: inside.append(jw.layout(model.f, p, *model.args)), params)
    assert inside == [found]


def test_flags_and_other_arguments_pass_as_they_are():
    def f(params, x, train, name, extra=None):
        assert train is True and name == "a" and extra is None
        return x["x"] @ params[name] * 2.0

    found = jw.layout(f, {"a": jnp.ones((4, 5))}, {"x": jnp.ones((2, 4))}, True, "a")
    assert in_words(found["a"], (4, 5)) == "in out"


def test_a_module_stays_as_it_is():
    """With statistics and a stream of random keys that its call moves on."""
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(nnx.Linear(4, 5, rngs=rngs), nnx.BatchNorm(5, rngs=rngs), nnx.Dropout(0.5, rngs=rngs))
    copy = nnx.clone(model)
    jw.nnx.layout(model, X)
    np.testing.assert_array_equal(model(X), copy(X))
