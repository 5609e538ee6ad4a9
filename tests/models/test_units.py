"""Units are found, scored and removed; the smaller model matches the masked one."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxweights as jw

KEY = jax.random.key(0)


def random(tree):
    """The tree with random positive values, so that statistics are not those of a fresh model."""
    leaves, structure = jax.tree.flatten(tree)
    rng = np.random.default_rng(0)
    return jax.tree.unflatten(structure, [jnp.float32(rng.uniform(0.1, 1.1, a.shape)) for a in leaves])


def slots(group):
    return {(s.path, s.axis, s.inner, s.reads) for s in group.slots}


def found(model, *inputs):
    """Returns (variables, function, {name: group})."""
    f = jax.jit(model.apply)
    variables = random(jax.eval_shape(model.init, KEY, *inputs))
    return variables, f, {g.name.removeprefix("params/"): g for g in jw.units.unit_groups(f, variables, *inputs)}


def halves(group):
    """Drops every third unit, a pattern misaligned with other sizes."""
    return jnp.arange(group.size) % 3 != 1


class ResNet(nn.Module):
    """Residual blocks with depthwise convolutions and batch norms, then flatten and dense layers."""

    stem: int = 6
    hidden: tuple[int, int] = (9, 12)
    dense: int = 10

    @nn.compact
    def __call__(self, x):
        norm = lambda name: nn.BatchNorm(use_running_average=True, name=name)
        x = nn.relu(norm("norm")(nn.Conv(self.stem, (3, 3), name="stem")(x)))
        for i, n in enumerate(self.hidden):
            y = nn.relu(norm(f"norm{i}a")(nn.Conv(n, (1, 1), use_bias=False, name=f"expand{i}")(x)))
            y = nn.sigmoid(norm(f"norm{i}b")(nn.Conv(n, (3, 3), feature_group_count=n, name=f"depthwise{i}")(y)))
            x = x + norm(f"norm{i}c")(nn.Conv(self.stem, (1, 1), name=f"project{i}")(y))
        x = nn.avg_pool(nn.max_pool(x, (2, 2), (2, 2)), (2, 2), (1, 1))
        x = nn.silu(nn.Dense(self.dense, name="dense")(x.reshape(len(x), -1)))
        return nn.Dense(3, name="head")(x)


def gate(p, x):
    return jax.nn.sigmoid(x @ p["gate"]) * (x @ p["a"])


def where(p, x):
    return jnp.where(x[:, :1] > 0, (x @ p["a"]) * p["row"], p["row"])


def clip(p, x):
    return jnp.clip(x @ p["a"], -p["column"], p["column"])


def outer(p, x):
    return ((x @ p["a"])[:, None, :] * x[:, :, None]).sum(1)


@pytest.mark.parametrize(
    ("hidden", "also"),
    [(gate, set()), (where, {("row", 1, 1, False)}), (clip, set()), (outer, set())],
)
def test_an_axis_of_size_1_broadcasts_against_the_units(hidden, also):
    shapes = {"a": (4, 3), "gate": (4, 1), "row": (1, 3), "column": (8, 1), "b": (3, 2)}
    params = random({name: jnp.zeros(s) for name, s in shapes.items()})
    x = jax.random.normal(KEY, (8, 4))

    def f(p, x):
        return hidden(p, x) @ p["b"]

    (group,) = jw.units.unit_groups(f, params, x)
    assert slots(group) == {("a", 1, 1, False), ("b", 0, 1, True)} | also
    keep = {group: halves(group)}
    small, masked = jw.units.remove_units(params, keep), jw.units.mask_units(params, keep)
    np.testing.assert_allclose(f(small, x), f(masked, x), rtol=1e-5, atol=1e-6)


X = jax.random.normal(KEY, (2, 8, 8, 3))
residual = functools.cache(lambda: found(ResNet(), X))


def test_a_residual_network_is_smaller_and_computes_what_the_masked_one_does():
    variables, f, groups = residual()
    assert {name: g.size for name, g in groups.items()} == {
        "project0/kernel": 6,
        "depthwise0/kernel": 9,
        "depthwise1/kernel": 12,
        "dense/kernel": 10,
    }
    expected = {("params/expand0/kernel", 3, 1, False), ("params/project0/kernel", 2, 1, True)}
    expected |= {("params/depthwise0/kernel", 3, 1, False), ("params/depthwise0/bias", 0, 1, False)}
    expected |= {(f"params/norm0{n}/{p}", 0, 1, False) for n in "ab" for p in ("scale", "bias")}
    expected |= {(f"batch_stats/norm0{n}/{p}", 0, 1, False) for n in "ab" for p in ("mean", "var")}
    assert slots(groups["depthwise0/kernel"]) == expected
    assert ("params/dense/kernel", 0, 1, True) in slots(groups["project0/kernel"])

    keep = {g: halves(g) for g in groups.values()}
    small = jw.units.remove_units(variables, keep)
    width = lambda name: small["params"][name]["kernel"].shape[-1]
    model = ResNet(width("stem"), (width("expand0"), width("expand1")), width("dense"))
    assert (width("stem"), width("expand0"), width("expand1"), width("dense")) == (4, 6, 8, 7)
    y, masked = jax.jit(model.apply)(small, X), f(jw.units.mask_units(variables, keep), X)
    np.testing.assert_allclose(y, masked, rtol=1e-5)
    assert np.abs(y - f(variables, X)).max() > 0.1


def test_an_nnx_model_is_cut_alike():
    class MLP(nnx.Module):
        def __init__(self, n, rngs):
            self.inner, self.norm = nnx.Linear(4, n, rngs=rngs), nnx.BatchNorm(n, rngs=rngs)
            self.outer = nnx.Linear(n, 2, rngs=rngs)

        def __call__(self, x):
            return self.outer(nnx.relu(self.norm(self.inner(x))))

    model = MLP(8, nnx.Rngs(0))
    model.eval()
    graph, state = nnx.split(model)
    f, x = jax.jit(lambda s, x: nnx.merge(graph, s)(x)), jax.random.normal(KEY, (3, 4))
    (group,) = jw.units.unit_groups(f, state, x)
    assert {s.path for s in group.slots} == {
        *("inner/bias", "inner/kernel", "norm/bias", "norm/mean", "norm/scale", "norm/var", "outer/kernel")
    }
    keep = {group: halves(group)}
    small = MLP(5, nnx.Rngs(0))
    small.eval()
    nnx.update(small, jw.units.remove_units(state, keep))
    np.testing.assert_allclose(small(x), f(jw.units.mask_units(state, keep), x), rtol=1e-5, atol=1e-6)


def test_heads_of_attention_and_the_features_of_their_values():
    x = jnp.ones((2, 5, 16))
    attention = lambda n: nn.MultiHeadDotProductAttention(n, qkv_features=8 * n, out_features=16)
    variables, f, groups = found(attention(4), x)
    heads, features = groups["key/kernel"], groups["value/kernel"]
    assert (heads.size, features.size, len(groups)) == (4, 8, 2)  # not query and key features: 1/√d depends on them
    assert slots(heads) >= {("params/query/kernel", 1, 1, False), ("params/out/kernel", 0, 1, True)}
    keep = {heads: jnp.array([True, False, True, True])}
    y = jax.jit(attention(3).apply)(jw.units.remove_units(variables, keep), x)
    np.testing.assert_allclose(y, f(jw.units.mask_units(variables, keep), x), rtol=1e-5)


def test_units_flattened_before_and_behind_others():
    """Two flattened layouts in one axis: heads of contiguous features, and channels after positions."""
    params = {"a": jnp.ones((5, 12)), "b": jnp.ones(12), "c": jnp.ones((12, 2))}

    def f(p, x):
        y = jnp.tanh((x @ p["a"]).reshape(-1, 3, 4) + p["b"].reshape(3, 4))
        y = y / jnp.sum(jnp.square(y), -1, keepdims=True)  # normalizes each head, so its features must stay
        return y.reshape(-1, 12) @ p["c"]

    (group,) = jw.units.unit_groups(f, params, jnp.ones((7, 5)))
    assert group.size == 3
    assert slots(group) == {("a", 1, 4, False), ("b", 0, 4, False), ("c", 0, 4, True)}
    small = jw.units.remove_units(random(params), {group: jnp.array([True, False, True])})
    np.testing.assert_array_equal(small["b"], random(params)["b"][np.r_[0:4, 8:12]])

    images = {"a": jnp.ones((5, 3)), "c": jnp.ones((12, 2))}
    recurring = lambda p, x: jnp.reshape(x @ p["a"], (-1, 12)) @ p["c"]
    (group,) = jw.units.unit_groups(recurring, images, jnp.ones((2, 4, 5)))
    small = jw.units.remove_units(
        {**images, "c": jnp.arange(24.0).reshape(12, 2)}, {group: jnp.array([True, False, True])}
    )
    np.testing.assert_array_equal(small["c"][:, 0] / 2, [0, 2, 3, 5, 6, 8, 9, 11])


def test_groups_of_a_convolution():
    x = jnp.ones((2, 6, 6, 4))

    class Grouped(nn.Module):
        n: int = 4

        @nn.compact
        def __call__(self, x):
            x = nn.Conv(3 * self.n, (1, 1), name="before")(x)
            x = nn.relu(nn.Conv(2 * self.n, (3, 3), feature_group_count=self.n, name="grouped")(x))
            return nn.Conv(2, (1, 1), name="after")(x)

    variables, f, _ = found(Grouped(), x)
    whole = next(g for g in jw.units.unit_groups(f, variables, x) if g.size == 4)
    assert slots(whole) >= {("params/grouped/kernel", 3, 2, False), ("params/before/kernel", 3, 3, False)}
    keep = {whole: jnp.array([True, True, False, True])}
    y = jax.jit(Grouped(3).apply)(jw.units.remove_units(variables, keep), x)
    np.testing.assert_allclose(y, f(jw.units.mask_units(variables, keep), x), rtol=1e-5)


LOCKED = {
    "output": lambda p, x: x @ p["a"],
    "layer norm": lambda p, x: jax.nn.standardize(x @ p["a"]) @ p["c"],
    "softmax": lambda p, x: jax.nn.softmax(x @ p["a"]) @ p["c"],
    "max": lambda p, x: jnp.max(x @ p["a"], -1),
    "a sum by ones": lambda p, x: (jax.nn.sigmoid(x @ p["a"]) @ jnp.ones(6))[:, None] * p["c"][0],
    "a constant of that size": lambda p, x: (x @ p["a"] * np.arange(6.0)) @ p["c"],
    "data of that size": lambda p, x: (x @ p["a"] * x[0]) @ p["c"],
    "concatenation": lambda p, x: jnp.concatenate([x @ p["a"], x], -1) @ jnp.concatenate([p["c"], p["c"]]),
    "cumulative sum": lambda p, x: jnp.cumsum(x @ p["a"], -1) @ p["c"],
    "slice": lambda p, x: (x @ p["a"])[:, 1:] @ p["c"][1:],
    "lookup": lambda p, x: p["a"][jnp.array([0, 1])] @ p["c"],
    "loop": lambda p, x: jax.lax.fori_loop(0, 2, lambda i, y: y @ p["a"], x) @ p["c"],
    "product of activations": lambda p, x: (x @ p["a"]) @ (x @ p["a"]).T,
}


@pytest.mark.parametrize("f", LOCKED.values(), ids=LOCKED)
def test_units_that_are_not_only_read_by_weights_stay(f):
    assert jw.units.unit_groups(f, {"a": jnp.ones((6, 6)), "c": jnp.ones((6, 3))}, jnp.ones((5, 6))) == ()


def test_shapes_are_enough_and_equal_groups_are_equal():
    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)
    f = lambda p, x: jax.nn.relu(x @ p["a"]) @ p["c"]
    params = {"a": shape(4, 6), "c": shape(6, 2)}
    one, two = (jw.units.unit_groups(f, params, shape(5, 4)) for _ in range(2))
    assert one == two and hash(one) == hash(two)


def test_norms_are_those_of_the_kernels_that_make_the_units():
    variables, _, groups = residual()
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), variables["params"])
    square = sum((p[n]["kernel"] ** 2).sum((0, 1, 2)) for n in ("stem", "project0", "project1"))
    np.testing.assert_allclose(jw.units.unit_norms(variables, groups["project0/kernel"]), np.sqrt(square), rtol=1e-6)
    reader = jw.units.UnitGroup(3, (("b", 0), ("c", 0, 2, True)))
    c = np.arange(12.0).reshape(6, 2)
    norms = jw.units.unit_norms({"b": jnp.ones(3), "c": jnp.asarray(c)}, reader)
    np.testing.assert_allclose(norms, np.sqrt((c.reshape(3, 2, 2) ** 2).sum((1, 2))), rtol=1e-6)


def test_masks_may_be_traced():
    params = {"a": jnp.ones((2, 3)), "b": jnp.ones((3, 1))}
    group = jw.units.UnitGroup(3, (("a", 1), ("b", 0, 1, True)))
    masked = jax.jit(lambda p, keep: jw.units.mask_units(p, {group: keep}))(params, jnp.array([True, False, True]))
    np.testing.assert_array_equal(masked["a"], [[1, 0, 1]] * 2)
    np.testing.assert_array_equal(masked["b"][:, 0], [1, 0, 1])


def test_two_groups_in_one_axis():
    """Heads and their features: an entry stays if both keep it."""
    heads, features = jw.units.UnitGroup(2, (("w", 0, 3),)), jw.units.UnitGroup(3, (("w", 0),))
    keep = {heads: np.array([True, True]), features: np.array([True, False, True])}
    np.testing.assert_array_equal(jw.units.remove_units({"w": jnp.arange(6.0)}, keep)["w"], [0, 2, 3, 5])
    np.testing.assert_array_equal(jw.units.mask_units({"w": jnp.arange(6.0)}, keep)["w"], [0, 0, 2, 3, 0, 5])
