"""Small programs, one for each way to use a weight, with the reading of each weight in words."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import jaxweights as jw

P = jax.sharding.PartitionSpec
RNG = np.random.default_rng(0)


class Case(NamedTuple):
    f: Any
    args: tuple
    positions: int | None
    weights: dict

    @property
    def params(self):
        return {name: normal(*shape) for name, (shape, _) in self.weights.items()}


def normal(*shape):
    return (RNG.normal(size=shape) / 2).astype(np.float32)


def case(f, *args, positions=2, **weights):
    """f(p, *args) with weights name=(shape, reading), of which each matrix is used at so many positions.

    The positions are None where the matrix is made of several entries of the weight, so that its gradients say little.
    """
    args = tuple(normal(*a) if isinstance(a, tuple) else a for a in args or ((2, 4),))
    return Case(f, args, positions, weights)


def image(f, size=(3, 4), channels=4, **options):
    """A convolution of one image. Without padding, a window of 3 x 3 has two places in an image of 3 x 4."""
    return case(f, (1, *size, channels), **options)


def conv(x, w, strides=(1, 1), padding="VALID", spec=("NHWC", "HWIO", "NHWC"), **options):
    return lax.conv_general_dilated(x, w, strides, padding, dimension_numbers=spec, **options)


def fused_attention(p, x):
    q, k, v = jnp.moveaxis((x @ p["qkv"]).reshape(2, 3, 3, 4), 1, 0)  # (positions, of q k v, heads, features)
    mix = jax.nn.softmax(jnp.einsum("thd,shd->hts", q, k))
    return jnp.einsum("hts,shd,hdo->to", mix, v, p["out"].reshape(3, 4, 5))


def gates(x, i, f, g, o):
    return jax.nn.sigmoid(o) * jnp.tanh(jax.nn.sigmoid(f) * x.sum() + jax.nn.sigmoid(i) * jnp.tanh(g))


def mlp(x, w, b, v, c):
    return jnp.tanh(x @ w + b) @ v + c


MLP = {"w": ((3, 4, 6), "stack in out"), "b": ((3, 6), None), "v": ((3, 6, 5), "batch in out"), "c": ((3, 5), None)}


@jax.custom_vjp
def with_vjp(x, w):
    return x @ w


with_vjp.defvjp(lambda x, w: (x @ w, (x, w)), lambda r, g: (g @ r[1].T, r[0].T @ g))


@jax.custom_jvp
def with_jvp(x, w):
    return x @ w


with_jvp.defjvp(lambda xs, ts: (xs[0] @ xs[1], ts[0] @ xs[1] + xs[0] @ ts[1]))


def straight_through(w):
    return w + lax.stop_gradient(jnp.round(w * 8) / 8 - w)


def scan(p, x):
    return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p)[0]


def double_scan(p, x):
    return lax.scan(lambda x, w: (scan(w, x), None), x, p)[0]


def layers_by_index(p, x):
    return lax.fori_loop(0, 3, lambda i, x: jnp.tanh(x @ p["w"][i]), x)


def carried(p, x):
    """Two steps of a recurrent network that carries its weight."""
    step = lambda carry, x: ((jnp.tanh(carry[0] @ carry[1] + x), carry[1]), None)
    return lax.scan(step, (x[:, :, 0], p["w"]), jnp.moveaxis(x, 2, 0))[0][0]


def on_a_mesh(p, x):
    """Columns of the first layer and rows of the second on two devices; the third is gathered."""
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))

    def run(x, w, v, u):
        return lax.psum(jnp.tanh(x @ w) @ v, "d") @ lax.all_gather(u, "d", axis=1, tiled=True)

    specs = (P(), P(None, "d"), P("d"), P(None, "d"))
    return jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False)(x, p["w"], p["v"], p["u"])


IN_OUT, OUT_IN = ((4, 5), "in out"), ((5, 4), "out in")
MATRIX, KERNEL = {"w": IN_OUT}, {"w": ((3, 3, 4, 5), "win win in out")}
EXPERTS, LAYERS = {"w": ((3, 4, 5), "stack in out")}, {"w": ((3, 4, 4), "batch in out")}

CASES = {
    # Moved, reshaped and cut
    "(in, out)": case(lambda p, x: x @ p["w"], **MATRIX),
    "(out, in)": case(lambda p, x: x @ p["w"].T, w=OUT_IN),
    "from the left": case(lambda p, x: (p["w"] @ x.T).T, w=OUT_IN),
    "moveaxis": case(lambda p, x: x @ jnp.moveaxis(p["w"], 0, -1).reshape(4, 15), w=((3, 4, 5), "out in out")),
    "outputs merged": case(lambda p, x: x @ p["w"].reshape(4, 15), w=((4, 3, 5), "in out out")),
    "inputs merged": case(lambda p, x: x @ p["w"].reshape(4, 5), w=((2, 2, 5), "in in out")),
    "inputs split": case(
        lambda p, x: jnp.einsum("tab,abo->to", x, p["w"].reshape(2, 3, 5)), (2, 2, 3), w=((6, 5), "in out")
    ),
    "reversed": case(lambda p, x: x @ p["w"][::-1], **MATRIX),
    "halves": case(lambda p, x: jnp.tanh(x @ p["w"][:, :3]) * (x @ p["w"][:, 3:]), w=((4, 6), "in out")),
    "four gates, split": case(lambda p, x: gates(x, *jnp.split(x @ p["w"], 4, -1)), w=((4, 12), "in out")),
    "four gates, kernel split": case(
        lambda p, x: gates(x, *(x @ g for g in jnp.split(p["w"], 4, -1))), w=((4, 12), "in out")
    ),
    "four gates, by index": case(
        lambda p, x: gates(x, *(x @ p["w"].reshape(4, 4, 3)[:, i] for i in range(4))), w=((4, 12), "in out")
    ),
    "every other row": case(lambda p, x: x @ p["w"][::2], w=((8, 5), "in out")),
    "padded": case(lambda p, x: x @ jnp.pad(p["w"], ((0, 1), (0, 0))), w=((3, 5), "in out")),
    "rolled": case(lambda p, x: x @ jnp.roll(p["w"], 1, 1), **MATRIX),
    "rows in another order": case(lambda p, x: x @ p["w"][np.array([2, 0, 1, 3])], **MATRIX),
    "columns in another order": case(lambda p, x: x @ p["w"][:, np.array([2, 0, 4])], **MATRIX),
    "columns one by one": case(
        lambda p, x: x @ jnp.concatenate([p["w"][:, :1], jnp.zeros((4, 1)), p["w"][:, 1:]], 1), **MATRIX
    ),
    "a traced slice": case(
        lambda p, x, i: x @ lax.dynamic_slice_in_dim(p["w"], i, 3, 1), (2, 4), np.array(1), w=((4, 6), "in out")
    ),
    "concatenated": case(
        lambda p, x: jnp.tanh(x @ jnp.concatenate([p["w"], p["v"]], -1)), **MATRIX, v=((4, 3), "in out")
    ),
    "stacked": case(lambda p, x: jnp.einsum("ti,nio->tno", x, jnp.stack([p["w"], p["v"]])), **MATRIX, v=IN_OUT),
    "stacked, under vmap": case(
        lambda p, x: jax.vmap(lambda w: x @ w)(jnp.stack([p["w"], p["v"]])), **MATRIX, v=IN_OUT
    ),
    # Indexed
    "an expert each": case(lambda p, x: jnp.stack([x @ p["w"][i] for i in range(3)]), **EXPERTS),
    "one expert": case(lambda p, x: x @ p["w"][1], **EXPERTS),
    "the expert of an index": case(lambda p, x, i: x @ p["w"][i], (2, 4), np.array(1), **EXPERTS),
    "an expert a token": case(
        lambda p, x, i: jnp.einsum("ti,tio->to", x, p["w"][i]),
        (4, 4),
        np.array([0, 1, 2, 0]),
        w=((3, 4, 5), "batch in out"),
    ),
    "an expert a token, under vmap": case(
        lambda p, x, i: jax.vmap(lambda x, i: x @ p["w"][i])(x, i),
        (4, 4),
        np.array([0, 1, 2, 0]),
        w=((3, 4, 5), "batch in out"),
    ),
    "two experts a token": case(
        lambda p, x, i: jnp.einsum("ti,tkio->tko", x, p["w"][i]),
        (3, 4),
        np.array([[0, 1], [1, 2], [0, 2]]),
        w=((3, 4, 5), "batch in out"),
    ),
    "experts of runs of tokens": case(
        lambda p, x, n: lax.ragged_dot(x, p["w"], n),
        (6, 4),
        np.array([2, 2, 2], np.int32),
        w=((3, 4, 5), "batch in out"),
    ),
    "iterated over": case(lambda p, x: jnp.stack([x @ w for w in p["w"]]), **EXPERTS),
    "unstacked": case(
        lambda p, x: jnp.stack([x @ w for w in jnp.unstack(p["w"], axis=1)]), w=((4, 3, 5), "in stack out")
    ),
    "all experts, weighed": case(
        lambda p, x: jnp.einsum("te,teo->to", jax.nn.softmax(x @ p["route"]), jnp.einsum("ti,eio->teo", x, p["w"])),
        w=((5, 4, 5), "out in out"),
        route=((4, 5), "in out"),
    ),
    # Products
    "batch of an einsum": case(
        lambda p, x: jnp.einsum("nti,nio->nto", x, p["w"]), (3, 2, 4), w=((3, 4, 5), "batch in out")
    ),
    "batch axis last": case(
        lambda p, x: jnp.einsum("tin,ion->ton", x, p["w"]), (2, 4, 3), w=((4, 5, 3), "in out batch")
    ),
    "heads": case(lambda p, x: jnp.einsum("td,dhk->thk", x, p["w"]), w=((4, 3, 5), "in out out")),
    "heads together": case(lambda p, x: jnp.einsum("thk,hkd->td", x, p["w"]), (2, 3, 2), w=((3, 2, 5), "in in out")),
    "BTD,SNDH->SBTNH": case(
        lambda p, x: jnp.einsum("BTD,SNDH->SBTNH", x, p["w"]), (1, 2, 4), w=((3, 2, 4, 5), "out out in out")
    ),
    "a fused qkv kernel": case(fused_attention, qkv=((4, 36), "in out"), out=((12, 5), "in out")),
    "tied embeddings": case(
        lambda p, i: jnp.tanh(p["w"][i] @ p["v"]) @ p["w"].T,
        np.array([1, 3]),
        positions=None,
        w=((7, 4), "out in"),
        v=((4, 4), "in out"),
    ),
    # vmap
    "vmap, data of its own": case(
        lambda p, x: jax.vmap(jnp.matmul)(x, p["w"]), (3, 2, 4), w=((3, 4, 5), "batch in out")
    ),
    "vmap, the same data": case(lambda p, x: jax.vmap(lambda w: x @ w)(p["w"]), **EXPERTS),
    "vmap of a layer": case(lambda p, x: jax.vmap(lambda w, b: x @ w + b)(p["w"], p["b"]), **EXPERTS, b=((3, 5), None)),
    "vmap of two layers": case(lambda p, x: jax.vmap(lambda p: mlp(x, **p))(p), **MLP),
    "vmap of two layers, samples inside": case(
        lambda p, x: jax.vmap(lambda p: jax.vmap(lambda x: mlp(x, **p))(x))(p), **MLP
    ),
    "vmap of two layers, samples outside": case(
        lambda p, x: jax.vmap(lambda x: jax.vmap(lambda p: mlp(x, **p))(p))(x), **MLP
    ),
    "vmap over samples": case(lambda p, x: jax.vmap(lambda x: p["w"] @ x + p["b"])(x), w=OUT_IN, b=((5,), None)),
    "vmap over as many samples as outputs": case(
        lambda p, x: jax.vmap(lambda x: p["w"] @ x + p["b"])(x), (5, 4), positions=5, w=OUT_IN, b=((5,), None)
    ),
    # Control flow
    "scan": case(lambda p, x: scan(p["w"], x), **LAYERS),
    "scan, then one of its layers": case(
        lambda p, x: scan(p["w"], x) @ p["w"][0], (2, 7), positions=4, w=((3, 7, 7), "batch in out")
    ),
    "scan in a scan": case(lambda p, x: double_scan(p["w"], x), w=((2, 3, 4, 4), "batch batch in out")),
    "scan with a weight in all steps": case(
        lambda p, x: lax.scan(lambda h, x: (jnp.tanh(h @ p["w"] + x),) * 2, x[0], x)[0],
        w=((4, 4), "in out"),
    ),
    "scan that carries a weight": case(carried, (1, 4, 2), w=((4, 4), "in out")),
    "fori_loop": case(
        lambda p, x: lax.fori_loop(0, 2, lambda i, x: jnp.tanh(x @ p["w"]), x), (1, 4), w=((4, 4), "in out")
    ),
    "while_loop": case(
        lambda p, x: lax.while_loop(lambda x: jnp.abs(x).sum() > 1, lambda x: jnp.tanh(x @ p["w"]) / 2, x),
        positions=None,
        w=((4, 4), "in out"),
    ),
    "fori_loop over layers": case(layers_by_index, **LAYERS),
    "cond": case(lambda p, x: lax.cond(x[0, 0] > 9, lambda w: x @ w, lambda w: jnp.tanh(x @ w), p["w"]), **MATRIX),
    "cond between weights": case(
        lambda p, x, i: jnp.tanh(x @ lax.cond(i > 0, lambda: p["w"], lambda: p["v"])) + x @ p["v"],
        (2, 4),
        np.array(1),
        w=IN_OUT,
        v=IN_OUT,
    ),
    "switch": case(
        lambda p, x, i: lax.switch(i, [lambda x: x @ p["w"], lambda x: x @ p["w"] * 2, lambda x: -x @ p["w"]], x),
        (2, 4),
        np.array(1),
        **MATRIX,
    ),
    "remat": case(lambda p, x: jax.checkpoint(lambda x, w: jnp.tanh(x @ w))(x, p["w"]), **MATRIX),
    "jit": case(lambda p, x: jax.jit(jnp.matmul)(x, p["w"]), **MATRIX),
    "custom_vjp": case(lambda p, x: with_vjp(x, p["w"]), **MATRIX),
    "custom_jvp": case(lambda p, x: with_jvp(x, p["w"]), **MATRIX),
    "shard_map": case(on_a_mesh, w=((4, 6), "in out"), v=((6, 3), "in out"), u=((3, 4), "in out")),
    "map over samples": case(lambda p, x: lax.map(lambda x: p["w"] @ x, x), w=OUT_IN),
    # Computed from weights
    "cast": case(lambda p, x: x @ p["w"].astype(jnp.float16).astype(jnp.float32), **MATRIX),
    "masked entries": case(
        lambda p, x, m: x @ jnp.where(m, p["w"], 0), (2, 4), normal(4, 5) > 0, positions=None, **MATRIX
    ),
    "a triangle of it": case(lambda p, x: x @ jnp.tril(p["w"]), positions=None, **MATRIX),
    "dropped entries": case(
        lambda p, x, k: x @ (p["w"] * jax.random.bernoulli(k, 0.8, (4, 5))),
        (2, 4),
        jax.random.key(0),
        positions=None,
        **MATRIX,
    ),
    "rounded, straight-through": case(lambda p, x: x @ straight_through(p["w"]), **MATRIX),
    "weight norm": case(
        lambda p, x: x @ (p["w"] / jnp.linalg.norm(p["w"], axis=0) * p["g"]), positions=None, **MATRIX, g=((5,), None)
    ),
    "spectral norm": case(lambda p, x: x @ jw.spectral_normalize(p["w"], p["w"].sum()), positions=None, **MATRIX),
    "LoRA beside": case(
        lambda p, x: x @ p["w"] + x @ p["a"] @ p["b"], **MATRIX, a=((4, 3), "in out"), b=((3, 5), "in out")
    ),
    # Convolutions
    "HWIO": image(lambda p, x: conv(x, p["w"]), **KERNEL),
    "OIHW": image(
        lambda p, x: conv(x.transpose(0, 3, 1, 2), p["w"], spec=("NCHW", "OIHW", "NCHW")),
        w=((5, 4, 3, 3), "out in win win"),
    ),
    "strides": image(lambda p, x: conv(x, p["w"], (2, 2)), size=(3, 5), **KERNEL),
    "dilation": image(lambda p, x: conv(x, p["w"], rhs_dilation=(2, 2)), size=(5, 6), **KERNEL),
    "groups": image(lambda p, x: conv(x, p["w"], feature_group_count=2), w=((3, 3, 2, 6), "win win in out, 2 groups")),
    "depthwise": image(
        lambda p, x: conv(x, p["w"], feature_group_count=4), w=((3, 3, 1, 12), "win win in out, 4 groups")
    ),
    "transposed convolution": image(
        lambda p, x: lax.conv_transpose(x, p["w"], (2, 2), "VALID"),
        size=(1, 1),
        channels=20,
        positions=9,
        w=((2, 2, 20, 12), "win win in out"),
    ),
    "transposed convolution, its kernel too": image(
        lambda p, x: lax.conv_transpose(x, p["w"], (2, 2), "VALID", transpose_kernel=True),
        size=(1, 1),
        channels=20,
        positions=9,
        w=((2, 2, 12, 20), "win win out in"),
    ),
    "convolution, samples under vmap": image(lambda p, x: jax.vmap(lambda x: conv(x[None], p["w"])[0])(x), **KERNEL),
    "convolution, vmap over images and kernels": case(
        lambda p, x: jax.vmap(conv)(x, p["w"]), (2, 1, 3, 4, 4), w=((2, 3, 3, 4, 5), "batch win win in out")
    ),
    "convolution, vmap over kernels": image(
        lambda p, x: jax.vmap(lambda w: conv(x, w))(p["w"]), w=((2, 3, 3, 4, 5), "stack win win in out")
    ),
    "grouped convolution, vmap over images and kernels": case(
        lambda p, x: jax.vmap(lambda x, w: conv(x, w, feature_group_count=2))(x, p["w"]),
        (3, 1, 3, 4, 4),
        w=((3, 3, 3, 2, 6), "batch win win in out, 2 groups"),
    ),
    "one-dimensional convolution": case(
        lambda p, x: lax.conv_general_dilated(x, p["w"], (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC")),
        (1, 4, 4),
        w=((3, 4, 5), "win in out"),
    ),
    "causal depthwise convolution": case(
        lambda p, x: lax.conv_general_dilated(
            x, p["w"][:, None], (1,), [(2, 0)], dimension_numbers=("NWC", "WIO", "NWC"), feature_group_count=4
        ),
        (1, 2, 4),
        w=((3, 4), "win out, 4 groups"),
    ),
}
