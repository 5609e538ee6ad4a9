"""Norm modules: Flax's checkpoints load, values match Flax's, and Linen and NNX agree."""

import dataclasses
import inspect

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxweights as jw

rng = np.random.default_rng(0)
X = jnp.float32(rng.normal(size=(4, 5, 3, 8)) * 2 + 0.5)
MASK = jnp.asarray(rng.random(X.shape) < 0.7)  # Flax returns NaN where all entries are masked
NEITHER = {"use_bias": False, "use_scale": False}
INITS = {"scale_init": nn.initializers.normal(0.3), "bias_init": nn.initializers.constant(0.5)}
HALF, HALVES = {"dtype": jnp.bfloat16}, {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
MODULES = [  # name, options, and the size(s) of the feature axes
    ("LayerNorm", {}, 8),
    ("LayerNorm", {"epsilon": 0.1, **NEITHER}, 8),
    ("LayerNorm", {**INITS, "param_dtype": jnp.bfloat16}, 8),
    ("LayerNorm", {**HALF, "use_bias": False}, 8),
    ("LayerNorm", {"reduction_axes": (1, 2)}, 8),
    ("LayerNorm", {"reduction_axes": (-2, -1), "feature_axes": 1}, 5),
    ("RMSNorm", {"epsilon": 0.1}, 8),
    ("RMSNorm", {"scale_init": nn.initializers.normal(0.3), **HALVES, "reduction_axes": (1, 3), "feature_axes": 2}, 3),
    ("GroupNorm", {"num_groups": 4}, 8),
    ("GroupNorm", {"num_groups": None, "group_size": 4, "use_bias": False}, 8),
    ("GroupNorm", {"num_groups": 2, "reduction_axes": (2, 3), **INITS, **HALF}, 8),
    ("InstanceNorm", {}, 8),
    ("InstanceNorm", {"feature_axes": 2, **INITS}, 3),
    ("InstanceNorm", {**HALVES, **NEITHER}, 8),
    ("BatchNorm", {"use_running_average": False}, 8),
    ("BatchNorm", {"use_running_average": True, "epsilon": 0.1, **NEITHER}, 8),
    ("BatchNorm", {"use_running_average": False, "axis": 1, "momentum": 0.7, **INITS}, 5),
    ("BatchNorm", {"use_running_average": False, **HALVES}, 8),
    ("BatchNorm", {"use_running_average": True, "axis": -2, **HALF, "use_scale": False}, 3),
]
every_module = pytest.mark.parametrize(
    ("name", "options", "size"), MODULES, ids=lambda v: v if isinstance(v, str) else ""
)


def close(found, expected, tolerance=1e-5):
    def check(a, b):
        assert a.dtype == b.dtype and a.shape == b.shape
        np.testing.assert_allclose(np.float32(a), np.float32(b), rtol=10 * tolerance, atol=tolerance)

    jax.tree.map(check, found, expected)


def tolerance(options):
    """Rounding of what the two store or return in 16 bits; NNX also rounds x to them before it takes statistics."""
    return 1e-5 if {"dtype", "param_dtype"}.isdisjoint(options) else 0.03


def dtypes(tree):
    return jax.tree.map(lambda a: a.dtype, tree)


def perturbed(tree):
    return jax.tree.map(lambda p: (p + abs(rng.normal(size=p.shape))).astype(p.dtype), tree)


@every_module
def test_linen_has_the_parameters_outputs_and_gradients_of_flax(name, options, size):
    del size
    ours, flaxs = getattr(jw.linen, name)(**options), getattr(nn, name)(**options)
    start = flaxs.init(jax.random.key(0), X)
    jax.tree.map(np.testing.assert_array_equal, ours.init(jax.random.key(0), X), start)
    assert dtypes(ours.init(jax.random.key(0), X)) == dtypes(start)
    variables = perturbed(start)

    def run(module, variables, x, mask):
        def loss(variables, x):
            y, new = module.apply(variables, x, mask=mask, mutable=["batch_stats"])
            return jnp.sum(jnp.sin(y.astype(jnp.float32)) * (1 if mask is None else mask)), (y, new)

        return jax.grad(loss, (0, 1), has_aux=True)(variables, x)

    both = jax.jit(lambda variables, x, mask: [run(module, variables, x, mask) for module in (ours, flaxs)])
    for mask in (None, MASK):
        found, expected = both(variables, X, mask)
        close(found, expected, tolerance(options))
    half = jax.eval_shape(
        lambda v, x: [m.apply(v, x, mutable=["batch_stats"])[0] for m in (ours, flaxs)],
        variables,
        X.astype(jnp.bfloat16),
    )
    assert half[0].dtype == half[1].dtype


@every_module
def test_nnx_has_the_parameters_and_outputs_of_flax_and_of_linen(name, options, size):
    make = [getattr(level, name) for level in (jw.nnx, nnx)]
    rngs = [nnx.Rngs(0), nnx.Rngs(0)]
    ours, flaxs = (f(size, **options, rngs=r) for f, r in zip(make, rngs, strict=True))
    np.testing.assert_array_equal(*(jax.random.key_data(r.params()) for r in rngs))  # the next layer starts alike
    start = [nnx.to_pure_dict(nnx.state(m)) for m in (ours, flaxs)]
    jax.tree.map(np.testing.assert_array_equal, *start)
    state = perturbed(start[1])
    for module in (ours, flaxs):
        nnx.update(module, state)
    linen = getattr(jw.linen, name)(**options)
    variables = {
        kind: {n: v for n, v in state.items() if (n in ("mean", "var")) == (kind == "batch_stats")}
        for kind in ("params", "batch_stats")
    }
    apply = nnx.jit(lambda m, x, mask: m(x, mask=mask))
    for mask in (None, MASK):
        y, theirs = apply(ours, X, mask), apply(flaxs, X, mask)
        if not (name == "GroupNorm" and "reduction_axes" in options):  # Flax's is wrong in NNX (0.12), not in Linen
            close(y, theirs, tolerance(options))
        if mask is None:
            same = jax.jit(lambda v, x: linen.apply(v, x, mutable=["batch_stats"])[0])(variables, X)
            np.testing.assert_array_equal(y.astype(same.dtype), same)
    close(nnx.to_pure_dict(nnx.state(ours)), nnx.to_pure_dict(nnx.state(flaxs)), tolerance(options))
    low = X.astype(jnp.bfloat16)
    if flax.__version__ != "0.12.0":  # where nnx.BatchNorm without parameters ignores the dtype of its statistics
        assert apply(ours, low, None).dtype == apply(flaxs, low, None).dtype


def test_promote_dtype_decides_the_dtype():
    """It gets the arrays that Flax gives it."""
    seen = []

    def promote(arrays, *, dtype):
        seen.append([None if a is None else a.shape for a in arrays])
        return tuple(None if a is None else a.astype(jnp.float16) for a in arrays)

    for name, options in (
        ("LayerNorm", {}),
        ("RMSNorm", {}),
        ("InstanceNorm", {"use_scale": False}),
        ("BatchNorm", {}),
    ):
        assert getattr(jw.nnx, name)(8, promote_dtype=promote, **options)(X).dtype == jnp.float16
    assert seen == [[X.shape, (8,), (8,)], [X.shape, (8,)], [X.shape, None, (8,)], [X.shape, *[(8,)] * 4]]


def test_metadata_reaches_the_parameters():
    module = jw.nnx.GroupNorm(8, 2, scale_metadata={"kind": "a"}, bias_metadata={"kind": "b"})
    assert (module.scale.kind, module.bias.kind) == ("a", "b")


@pytest.mark.parametrize("convention", ["flax", "torch"])
def test_cumulative_statistics_average_all_batches(convention):
    """As torch's momentum=None. A batch in which a feature does not count does not count for that feature."""
    batches = [np.float32(rng.normal(size=(6, 3)) + i) for i in range(4)]
    masks = [np.ones((6, 3), bool) for _ in batches]
    masks[1][:, 0] = False
    ddof = int(convention == "torch")
    expected = [
        np.stack([np.mean([f(b[:, c]) for b, m in zip(batches, masks, strict=True) if m[0, c]]) for c in range(3)])
        for f in (np.mean, lambda b: np.var(b, ddof=ddof))
    ]
    linen = jw.linen.BatchNorm(False, momentum="cumulative", convention=convention)
    module = jw.nnx.BatchNorm(3, momentum="cumulative", convention=convention)
    variables = linen.init(jax.random.key(0), batches[0])
    step = jax.jit(lambda v, x, mask: {**v, **linen.apply(v, x, mask=mask, mutable=["batch_stats"])[1]})
    for batch, mask in zip(batches, masks, strict=True):
        variables = step(variables, batch, mask)
        module(batch, mask=mask)
    for found in (variables["batch_stats"], nnx.to_pure_dict(nnx.state(module, nnx.BatchStat))):
        np.testing.assert_array_equal(found["count"], [3, 4, 4])
        for name, value in zip(("mean", "var"), expected, strict=True):
            np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=1e-6)


def test_torch_agrees_with_cumulative_statistics():
    torch = pytest.importorskip("torch", reason="PyTorch is the oracle")
    theirs, ours = (
        torch.nn.BatchNorm1d(3, momentum=None),
        jw.nnx.BatchNorm(3, momentum="cumulative", convention="torch"),
    )
    for i in range(3):
        x = np.float32(rng.normal(size=(6, 3)) * (i + 1) + i)
        theirs(torch.from_numpy(x))
        ours(x)
    np.testing.assert_allclose(ours.mean[...], theirs.running_mean, rtol=1e-5)
    np.testing.assert_allclose(ours.var[...], theirs.running_var, rtol=1e-5)


@pytest.mark.parametrize("jit", [True, False])
def test_norms_run_under_strict_promotion(jit):
    x = X.astype(jnp.bfloat16)
    options = {"BatchNorm": {"use_running_average": False}, "GroupNorm": {"num_groups": 4}}
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"), jax.disable_jit(not jit):
        for name in ("LayerNorm", "RMSNorm", "GroupNorm", "InstanceNorm", "BatchNorm"):
            linen = getattr(jw.linen, name)(**options.get(name, {}))
            variables = linen.init(jax.random.key(0), x)
            loss = lambda v, m=linen, **o: m.apply(v, x, mutable=["batch_stats"], **o)[0].astype(jnp.float32).sum()
            for mask in (None, MASK):
                assert jnp.isfinite(
                    jax.jit(jax.grad(lambda v, f=loss, w=mask: f(v, mask=w)))(variables)["params"]["scale"]
                ).all()
            module = getattr(jw.nnx, name)(8, **options.get(name, {}), dtype=jnp.bfloat16)
            assert module(x, mask=MASK).dtype == jnp.bfloat16
        for more in ({"renorm": (2.0, 1.0)}, {"ghost_size": 2}, {"momentum": "cumulative"}, {"convention": "torch"}):
            module = jw.nnx.BatchNorm(8, **more)
            assert module(x).shape == module(x, use_running_average=True).shape == x.shape


# Ours take both at their best: the variance in two passes, and sums in float32.
WITHOUT_MEANING = {"use_fast_variance", "force_float32_reductions"}


@pytest.mark.parametrize("name", ["LayerNorm", "RMSNorm", "GroupNorm", "InstanceNorm", "BatchNorm"])
@pytest.mark.parametrize("level", ["linen", "nnx"])
def test_arguments_are_named_as_in_flax(level, name):
    """Defaults and positions match too. Older releases of Flax have fewer."""
    ours, flaxs = (
        signature(getattr(getattr(jw, level), name)),
        signature(getattr({"linen": nn, "nnx": nnx}[level], name)),
    )
    flaxs = {n: default for n, default in flaxs.items() if n not in WITHOUT_MEANING}
    assert flaxs.items() - {("momentum", 0.99)} <= {*ours.items()}
    extra = {"convention", "ghost_size", "renorm", "promote_dtype", "bias_metadata", "scale_metadata"}
    assert ours.keys() - flaxs.keys() <= extra
    assert [n for n in ours if n in flaxs] == list(flaxs)


def signature(module):
    if issubclass(module, nn.Module):
        return {f.name: f.default for f in dataclasses.fields(module) if f.name not in ("parent", "name")}
    of = {n: p.default for n, p in inspect.signature(module.__init__).parameters.items() if n not in ("self", "rngs")}
    return {n: () if n.endswith("_metadata") else default for n, default in of.items()}
