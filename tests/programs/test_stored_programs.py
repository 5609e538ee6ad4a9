"""Functions run on stored weights, against the same functions of the arrays that are stored."""

import dataclasses
import functools
import itertools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from stored_weights import OURS, STORES, floats_of_size, normal, same

import jaxweights as jw
from jaxweights.core.axes import Reading
from jaxweights.levels.paths import flatten

# Functions


@jax.custom_jvp
def squashed(w, x):
    return jnp.tanh(x @ w)


squashed.defjvp(lambda primals, tangents: (squashed(*primals), 3 * tangents[1] @ primals[0]))


def everything(params, x, ids, flag):
    """All ways in which a program may use a weight of shape (16, 8)."""
    w, b = params["w"], params["b"]
    y = x @ w + b

    def layer(x):
        return jnp.tanh(x @ w @ w.T)

    def step(carry, _):
        x, w, doubled = carry
        return (jnp.tanh(x @ w @ w.T), w, 2 * doubled), (x, w)

    (last, same, doubled), (xs, ws) = jax.lax.scan(step, (x, w, w), length=2)
    return {
        "product": y,
        "transposed": y @ w.T,
        "from the left": w.T @ x.T,
        "einsum": jnp.einsum("bi,io->ob", x, w),
        "with itself": w.T @ w,
        "elementwise": x @ jnp.sin(w),
        "moved and back": x @ jnp.swapaxes(w, 0, 1).T,
        "reshaped": x @ w.reshape(16, 2, 4)[:, 1],
        "take": jnp.take(w, ids, axis=0),
        "clipped": w.at[ids].get(mode="clip"),
        "filled": w.at[ids].get(mode="fill", fill_value=7.0),
        "rows": (w[3], w[ids[0, 0]], w[2:5], w[::3]),
        "rows by vmap": jax.vmap(lambda i: w[i])(ids[0]),
        "columns": (w[:, 3], jnp.take(w, jnp.array([2, 1]), axis=1)),
        "vmap": jax.vmap(lambda x: x @ w)(x),
        "called": jax.jit(lambda w, x: jnp.tanh(x @ w))(w, x),
        "remat": jax.checkpoint(lambda w, x: jnp.tanh(x @ w))(w, x),
        "own derivative": squashed(w, x),
        "cond": jax.lax.cond(flag, lambda w: (x @ w, w), lambda w: (2 * x @ w, w + 1), w),
        "while": jax.lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, layer(s[1])), (0, x))[1],
        "scan": (last, same, doubled, xs, ws),
        "stopped": jax.lax.stop_gradient(w).T @ x.T,
        "barrier": x @ jax.lax.optimization_barrier((w, x))[0],
        "in a list": [w],
    }


def look_up(params, ids):
    w = params["w"]
    return (
        jnp.take(w, ids, axis=0),
        w.at[ids].get(mode="clip"),
        w.at[ids].get(mode="fill", fill_value=7.0),
        w[ids[0, 0]],
    )


IDS = jnp.array([[1, 15, 0], [-1, -16, 3]])


@pytest.mark.parametrize("name", STORES)
def test_it_is_the_function_of_the_arrays(name):
    params = {"w": STORES[name](normal(16, 8)), "b": normal(8, seed=1)}
    x, beyond = normal(3, 16, seed=2), jnp.array([[17, -20, 3]])
    run = jax.jit(jw.with_stored(everything))
    for ids, flag in ((IDS, True), (IDS, False)):
        same(run(params, x, ids, flag), dense(jw.densify(params), x, ids, flag))
    same(jw.with_stored(look_up)(params, beyond), look_up(jw.densify(params), beyond))


dense = jax.jit(everything)


@pytest.mark.parametrize("name", STORES)
def test_gradients_are_those_of_the_arrays(name):
    """With respect to the data and to the weights that are arrays."""
    params, x = {"w": STORES[name](normal(16, 8)), "b": normal(8, seed=1)}, normal(3, 16, seed=2)

    def f(params, x):
        w = params["w"]
        y = jax.checkpoint(lambda w, x: jnp.tanh(x @ w))(w, x) + params["b"]
        return jnp.sum(jnp.sin(y @ w.T)) + jnp.sum(squashed(w, x))

    def gradients(f, w):
        return jax.jit(jax.grad(lambda b, x: f({"w": w, "b": b}, x), (0, 1)))(params["b"], x)

    same(gradients(jw.with_stored(f), params["w"]), gradients(f, params["w"].todense()))


@pytest.mark.parametrize("name", STORES)
def test_sixteen_bits(name):
    """A bfloat16 model rounds the products of a float32 weight, and of a bfloat16 one."""
    x = normal(3, 16, seed=2).astype(jnp.bfloat16)
    f = lambda w, x: (x @ w.astype(jnp.bfloat16), x.astype(jnp.float32) @ w.astype(jnp.float32))
    for dtype in (jnp.float32, jnp.bfloat16):
        w = STORES[name](normal(16, 8).astype(dtype))
        same(jw.with_stored(f)(w, x), f(jw.densify(w), x), 2e-2)
    wide = lambda w, x: jnp.matmul(x, w, preferred_element_type=jnp.float32)
    same(jw.with_stored(wide)(w, x), wide(jw.densify(w), x), 2e-2 if name == "quantized" else 2e-5)


def test_other_arguments_are_left_alone():
    """Numbers and functions stay what they are, and without a stored weight so does the function."""
    f = lambda params, x, n, *, act: act(x @ params["w"]) if n == 2 else None
    params, x = {"w": jw.quantize(normal(4, 3), 8), "name": "dense", "none": None}, normal(2, 4)
    same(jw.with_stored(f)(params, x, 2, act=jnp.tanh), jnp.tanh(x @ params["w"].todense()))
    assert jw.with_stored(lambda tree: tree["name"])({"name": "dense"}) == "dense"


@functools.partial(jax.tree_util.register_dataclass, data_fields=["values"], meta_fields=[])
@dataclasses.dataclass
class Diagonal:
    """The four members that make a stored weight."""

    values: jax.Array

    shape = property(lambda self: (len(self.values),) * 2)
    dtype = property(lambda self: self.values.dtype)

    def todense(self):
        return jnp.diag(self.values)

    def __rmatmul__(self, x):
        return x * self.values


def test_a_type_of_ones_own():
    w, x = Diagonal(normal(8)), normal(3, 8, seed=1)

    def f(w, x):
        y, _ = jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, length=2)
        return y, y @ w.T, jnp.exp(w), jax.lax.cond(y[0, 0] > 0, lambda w: y @ w, lambda w: w[:3], w)

    same(jw.with_stored(f)(w, x), f(w.todense(), x))
    assert not floats_of_size(jw.with_stored(lambda w, x: jnp.tanh(x @ w)), 64, w, x)
    assert flatten({"a": w}).paths == ["a"]


# Stacks

STACKS = {
    "in front": ((4, 8, 8), jw.Axes(batch=0)),
    "in the middle": ((8, 4, 8), jw.Axes(input=0, output=2, batch=1)),
}


@pytest.mark.parametrize("where", STACKS)
@pytest.mark.parametrize("name", OURS)
def test_stacks(name, where):
    shape, axes = STACKS[where]
    stack = STORES[name](normal(*shape), axes)
    x = normal(3, 8, seed=1)
    at = shape.index(4)

    @jw.with_stored
    def run(stack, x, i):
        ws = jnp.moveaxis(stack, at, 0)
        _, ys = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), (x, w)), x, ws)
        backwards, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, ws, reverse=True)
        return {
            "scan": ys,
            "backwards": backwards,
            "vmap": jax.vmap(lambda w: x @ w)(ws),
            "vmap of data too": jax.vmap(jnp.matmul)(jnp.stack([x] * 4), ws),
            "experts": (x @ ws[1], x @ ws[i], x @ ws[-1]),
            "dispatch by vmap": jax.vmap(lambda x, i: x @ ws[i])(x, jnp.array([2, 0, 2])),
            "dispatch": jnp.einsum("bi,bio->bo", x, ws[jnp.array([2, 0, 2])]),
            "take": jnp.einsum("bi,bio->bo", x, jnp.take(ws, jnp.array([2, 0, 2]), axis=0)),
            "some": jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, ws[1:3])[0],
            "unrolled": functools.reduce(lambda x, w: jnp.tanh(x @ w), list(ws), x),
            "experts at once": jnp.einsum("bi,eio->bo", x, ws),
        }

    same(jax.jit(run)(stack, x, 2), jax.jit(run.__wrapped__)(stack.todense(), x, 2))


@pytest.mark.parametrize("name", OURS)
def test_vmap_over_models(name):
    """An ensemble: `vmap` slices the stored weights."""
    stack, x = STORES[name](normal(4, 8, 8), jw.Axes(batch=0)), normal(3, 8, seed=1)
    f = lambda w, x: jnp.tanh(x @ w) @ w.T
    run = jax.jit(jax.vmap(jw.with_stored(f), in_axes=(0, None)))
    same(run(stack, x), jax.vmap(f, in_axes=(0, None))(stack.todense(), x))


def test_a_stack_of_stacks():
    x, axes = normal(3, 8, seed=1), jw.Axes(batch=(0, 1))
    layer = lambda x, w: (jnp.tanh(x @ w), None)
    f = lambda ws, x: jax.lax.scan(lambda x, ws: jax.lax.scan(layer, x, ws), x, ws)[0]
    for name in OURS:
        stack = STORES[name](normal(2, 3, 8, 8), axes)
        same(jax.jit(jw.with_stored(f))(stack, x), f(stack.todense(), x))


# What is left of the weight in the program


@pytest.mark.parametrize("name", ["packed", "blocks"])
def test_no_array_of_the_weight_is_computed(name):
    """Where the product is one with what is stored: a vector in a dense layer, in a stack, in a tied layer, in each."""
    n = 256
    w = normal(3, n, n) / math.sqrt(n)
    one, stack = STORES[name](w[0]), STORES[name](w, jw.Axes(batch=0))
    if name == "blocks":
        corner = w.at[:, n // 4 :].set(0)
        one, stack = jw.sparse.pack_blocks(corner[0]), jw.sparse.pack_blocks(corner, axes=jw.Axes(batch=0))

    def f(params, x):
        one = params["one"]
        x = jnp.tanh(x @ one)
        x, _ = jax.lax.scan(jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None)), x, params["stack"])
        tied = one @ x, jax.lax.scan(lambda x, w: (jnp.tanh(w @ x), None), x, params["stack"])[0]
        return tied, one.T.T.T @ x, jax.lax.cond(x[0] > 0, lambda w: x @ w, lambda w: -x @ w, one)

    def each(params, x):
        return jnp.einsum("i,lio->ol", x, params["stack"]), jax.vmap(lambda w: w @ x)(params["stack"])

    params, x = {"one": one, "stack": stack}, normal(n, seed=1)
    assert floats_of_size(lambda params, x: x @ params["one"].todense(), n * n, params, x)
    for g, size in ((f, n * n), (each, 3 * n * n)):
        assert not floats_of_size(jw.with_stored(g), size, params, x)
        same(jax.jit(jw.with_stored(g))(params, x), jax.jit(g)(jw.densify(params), x))


def test_only_rows_that_are_looked_up_become_floats():
    table, ids = normal(512, 16), jnp.array([[3, 500], [0, 1]])
    f = lambda table, ids: (jnp.take(table, ids, axis=0), jax.vmap(lambda i: table[i])(ids[0]))
    tied = jw.Axes(input=-1, output=-2)
    for store, axes in itertools.product(("quantized", "packed"), (None, tied)):
        stored = STORES[store](table, axes)
        with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
            assert floats_of_size(jw.with_stored(f), 512, stored, ids) == []
        same(jax.jit(jw.with_stored(f))(stored, ids), f(stored.todense(), ids), 0)


def test_a_stack_of_quantized_layers_becomes_no_array():
    n = 64
    stack, x = jw.quantize(normal(8, n, n), 8, axes=jw.Axes(batch=0)), normal(2, n, seed=1)
    f = lambda stack, x: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, stack)[0]
    assert not floats_of_size(jw.with_stored(f), 2 * n * n, stack, x)


# Convolutions

CONVOLUTIONS = {
    "conv": (nn.Conv(6, (3, 2), strides=(2, 1), use_bias=False), jw.axes.CONV),
    "of one position": (nn.Conv(6, (1, 1), strides=(2, 1), use_bias=False), jw.axes.CONV),
    "depthwise": (nn.Conv(8, (3, 2), feature_group_count=4, use_bias=False), jw.axes.depthwise(4)),
    "transposed": (nn.ConvTranspose(6, (3, 2), strides=(2, 1), use_bias=False), jw.axes.CONV),
    "transposed, kernel too": (
        nn.ConvTranspose(6, (3, 2), strides=(2, 1), transpose_kernel=True, use_bias=False),
        jw.axes.CONV_TRANSPOSE_KERNEL,
    ),
}


@pytest.mark.parametrize("name", ["quantized", "packed", "clustered"])
def test_convolutions(name):
    x = normal(2, 6, 5, 4)
    stored = {}
    for layer, (module, axes) in CONVOLUTIONS.items():
        params = module.init(jax.random.key(0), x)["params"]
        shape = params["kernel"].shape
        group = Reading.of(axes, shape)
        rows = math.prod(shape[a] for a in group.contracted)
        if name != "packed" or rows % 4 == 0:
            stored[layer] = {"kernel": STORES[name](normal(*shape, seed=1), axes)}
    assert len(stored) >= 3

    def f(stored, x):
        return {layer: CONVOLUTIONS[layer][0].apply({"params": p}, x) for layer, p in stored.items()}

    same(jax.jit(jw.with_stored(f))(stored, x), jax.jit(f)(jw.densify(stored), x))
    gradient = lambda f, stored: jax.jit(jax.grad(lambda x: sum(jnp.sum(y**2) for y in f(stored, x).values())))(x)
    same(gradient(jw.with_stored(f), stored), gradient(f, jw.densify(stored)))


def test_a_quantized_convolution_of_one_position_is_a_product():
    x, w = normal(2, 3, 5, 64).astype(jnp.float16), jw.quantize(normal(1, 1, 64, 96, seed=1), 8, axes=jw.axes.CONV)
    f = lambda w, x: nn.Conv(96, (1, 1), use_bias=False, dtype=jnp.float16).apply({"params": {"kernel": w}}, x)
    assert "conv_general_dilated" not in str(jax.make_jaxpr(jw.with_stored(f))(w, x))
    huge = 100 * jnp.ones_like(x)  # the products of codes go beyond the largest float16, 65504
    same(jw.with_stored(f)(w, huge), f(w.todense(), huge), 2e-2)
