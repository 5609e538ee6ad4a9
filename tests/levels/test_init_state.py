"""Weights that were loaded into wrapped models: `init_state` makes the state that belongs to them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx, serialization
from flax.traverse_util import flatten_dict, unflatten_dict

import jaxweights as jw
from jaxweights.levels.paths import STATE

KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (4, 6))
NORM, PRUNE, SPECTRAL = jw.WeightNorm(), jw.Prune(0.5), jw.SpectralNorm()
ALL = jw.Chain(SPECTRAL, NORM, jw.Prune(0.5, score=jw.scores.random))  # learned, fixed and random state


class Net(nn.Module):
    """Wrapped layers beside plain ones, and in a stack."""

    wrap: bool = True

    @nn.compact
    def __call__(self, x, train=False):
        layer = (lambda m: jw.linen.Transformed(m, ALL)) if self.wrap else (lambda m: m)
        x = layer(nn.Dense(6, name="a"))(x)
        x = nn.BatchNorm(use_running_average=not train)(x)
        x = nn.Dropout(0.5, deterministic=not train)(x)
        stack = nn.scan(
            lambda m, carry, _: (m(carry), None),
            variable_axes={"params": 0, STATE: 0},
            split_rngs={"params": True},
            length=3,
        )
        return nn.Dense(2, name="out")(stack(layer(nn.Dense(6, name="stack")), x, None)[0])


def without_state(tree):
    if not isinstance(tree, dict):
        return tree
    return {name: without_state(value) for name, value in tree.items() if name != STATE}


def close(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), a, b)


@pytest.mark.parametrize(
    ("model", "args", "kwargs"),
    [
        pytest.param(jw.linen.Transformed(nn.Dense(3), ALL), (), {}, id="wrapper"),
        pytest.param(Net(), (jax.ShapeDtypeStruct(X.shape, X.dtype),), {"train": True}, id="model"),
    ],
)
def test_linen_makes_the_state_that_init_makes(model, args, kwargs):
    """From the plain variables, and in place of the state of other weights; all else is kept."""
    keys = {"params": KEY, "dropout": KEY}
    variables = jax.jit(model.init)(keys, X)
    close(jw.linen.init_state(model, without_state(variables), keys, *args, **kwargs), variables)
    stale = {**jax.tree.map(lambda a: a + a, variables), "params": variables["params"]}
    stale["params"] = jax.tree_util.tree_map_with_path(lambda p, a: a * (1 + (STATE in str(p))), stale["params"])
    new = jax.jit(lambda v: jw.linen.init_state(model, v, keys, *args, **kwargs))(stale)
    close({name: new[name] for name in ("params", STATE)}, {name: variables[name] for name in ("params", STATE)})
    others = lambda v: {name: collection for name, collection in v.items() if name not in ("params", STATE)}
    jax.tree.map(np.testing.assert_array_equal, others(new), others(stale))


def test_linen_keeps_what_a_transform_promises():
    plain = nn.Sequential([nn.Dense(8), nn.Dense(8), nn.Dense(8)])
    checkpoint = jax.jit(plain.init)(jax.random.key(7), X)
    names = [f"layers_{i}" for i in range(3)]
    kernels = {name: checkpoint["params"][name]["kernel"] for name in names}

    def folded(transform):
        model = jw.linen.Transformed(plain, transform)
        variables = jw.linen.init_state(model, checkpoint, KEY)
        if transform is NORM:
            np.testing.assert_allclose(model.apply(variables, X), plain.apply(checkpoint, X), rtol=1e-5, atol=1e-6)
        return {name: p["kernel"] for name, p in jw.linen.fold(model, variables)["params"].items()}

    for name, kernel in folded(PRUNE).items():
        np.testing.assert_array_equal(kernel, kernels[name] * jw.magnitude_mask(kernels[name], 0.5))
    for kernel in folded(SPECTRAL).values():
        assert np.linalg.norm(np.float64(kernel), 2) == pytest.approx(1, abs=1e-2)
    folded(NORM)


def test_linen_state_of_a_wrapper_further_in():
    """A call makes it; without one it would be lost."""

    class Inner(nn.Module):
        @nn.compact
        def __call__(self, x):
            return jw.linen.Transformed(nn.Dense(6, name="b"), NORM)(nn.Dense(6, name="a")(x))

    model = jw.linen.Transformed(Inner(), NORM, where="a/kernel")
    variables = jax.jit(model.init)(KEY, X)
    close(jw.linen.init_state(model, without_state(variables), KEY, X), variables)
    with pytest.raises(ValueError, match=r"keeps the state of \['b/kernel'\]: pass the arguments of a call"):
        jw.linen.init_state(model, variables, KEY)


def orbax(params, folder):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "model", params)
        checkpointer.wait_until_finished()
        return checkpointer.restore(folder / "model")


def msgpack(params, folder):
    (folder / "model").write_bytes(serialization.to_bytes(params))
    return serialization.msgpack_restore((folder / "model").read_bytes())


def safetensors(params, folder):
    numpy = pytest.importorskip("safetensors.numpy", reason="safetensors comes with the extra models")
    numpy.save_file(flatten_dict(jax.tree.map(np.asarray, params), sep="/"), folder / "model")
    return unflatten_dict(numpy.load_file(folder / "model"), sep="/")


@pytest.mark.parametrize("saved", [orbax, msgpack, safetensors])
def test_a_plain_checkpoint_loads_in_one_line(saved, tmp_path):
    """Weight norm and a clipping bound that no weight reaches: the outputs are those of the plain module."""
    transform = jw.Chain(jw.ClipWeights(lambda step: 100.0), NORM)
    plain = nn.Dense(3)
    checkpoint = {"kernel": 3 * jax.random.normal(jax.random.key(5), (6, 3)), "bias": jnp.arange(3.0)}
    expected = plain.apply({"params": checkpoint}, X)
    restored = saved(checkpoint, tmp_path)

    model = jw.linen.Transformed(plain, transform)
    variables = jw.linen.init_state(model, {"params": restored}, KEY)
    np.testing.assert_allclose(model.apply(variables, X), expected, rtol=1e-5, atol=1e-5)

    module = jw.nnx.transformed(nnx.Linear(6, 3, rngs=nnx.Rngs(0)), transform)
    nnx.update(module, restored)
    jw.nnx.init_state(module, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(module(X), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("jit", [lambda f: f, nnx.jit], ids=["eager", "jit"])
def test_nnx_makes_the_state_that_transformed_makes(jit):
    layer = lambda seed, rngs: jw.nnx.transformed(nnx.Linear(6, 6, rngs=nnx.Rngs(seed)), ALL, rngs=rngs)
    model = lambda seed, rngs: nnx.Sequential(layer(seed, rngs), nnx.Linear(6, 6, rngs=nnx.Rngs(8)), layer(seed, rngs))
    new, expected = model(1, nnx.Rngs(2)), model(3, nnx.Rngs(4))
    weights = nnx.filter_state(nnx.state(expected, nnx.Param), lambda path, _: STATE not in path)
    nnx.update(new, weights)
    jit(lambda m: jw.nnx.init_state(m, rngs=nnx.Rngs(4)))(new)
    close(nnx.to_pure_dict(nnx.state(new)), nnx.to_pure_dict(nnx.state(expected)))


def test_nnx_keeps_what_a_transform_promises():
    kernel = jax.random.normal(jax.random.key(5), (6, 6))

    def folded(transform):
        module = jw.nnx.transformed(nnx.Linear(6, 6, rngs=nnx.Rngs(0)), transform)
        module.kernel[...] = kernel
        jw.nnx.init_state(module, rngs=nnx.Rngs(0))
        return jw.nnx.fold(module).kernel[...]

    np.testing.assert_allclose(folded(NORM), kernel, rtol=1e-6)
    np.testing.assert_array_equal(folded(PRUNE), kernel * jw.magnitude_mask(kernel, 0.5))
    assert np.linalg.norm(np.float64(folded(SPECTRAL)), 2) == pytest.approx(1, abs=1e-2)


def test_nnx_modules_made_under_vmap_say_so():
    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def layers(rngs):
        linear = nnx.Linear(6, 6, rngs=rngs)
        return jw.nnx.transformed(linear, jw.ClipWeights(lambda step: 1.0), rngs=rngs)

    stack = layers(nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"made anew it has \(\): make it as the module was made, under nnx.vmap"):
        jw.nnx.init_state(stack, rngs=nnx.Rngs(0))
    nnx.vmap(lambda m: jw.nnx.init_state(m, rngs=nnx.Rngs(0)))(stack)
    assert stack.weight_transform.fixed["kernel"]["step"].shape == (3,)
