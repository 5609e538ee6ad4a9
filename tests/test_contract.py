"""The contract that every technique and variant of `cases.py` keeps, at every level."""

import functools
import importlib.util
import math
import re

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from cases import CASES, KEY, TRANSFORMS
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

import jaxweights as jw
from jaxweights.lifts.paths import STATE

ids = lambda cases: {"argvalues": cases, "ids": [c.name for c in cases]}
every_case = pytest.mark.parametrize("case", **ids(CASES))
every_transform = pytest.mark.parametrize("case", **ids(TRANSFORMS))
EPS = {jnp.float32: 2e-6, jnp.bfloat16: 2e-2, jnp.float16: 2e-3}


def weight(case, dtype=jnp.float32, seed=0):
    return jax.random.normal(jax.random.key(seed), case.shape).astype(dtype)


def close(a, b, rtol, size=None):
    """Equal up to `rtol` of each value and of the largest, or of `size`."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * (size or np.abs(b).max(initial=1e-30)))


# Arrays


@every_case
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_shape_and_dtype_are_kept_and_16_bits_agree_with_32(case, dtype):
    w = weight(case, dtype)
    with jax.numpy_dtype_promotion("strict"):
        new = case.call(w)
    chex.assert_trees_all_equal_shapes_and_dtypes(new, w)
    close(new, case.call(w.astype(jnp.float32)), 2 * EPS[dtype])


@every_case
def test_jit_is_eager(case):
    w = weight(case)
    close(jax.jit(case.call)(w), case.call(w), 1e-5)


@every_case
def test_vmap_is_a_loop(case):
    ws = jnp.stack([weight(case, seed=i) for i in range(3)])
    close(jax.vmap(case.call)(ws), jnp.stack([case.call(w) for w in ws]), 1e-5)


@every_case
@pytest.mark.parametrize("kind", ["zero", "constant", "huge", "huge f16", "tiny"])
def test_values_and_gradients_are_finite(case, kind):
    w = weight(case)
    w = {
        "zero": jnp.zeros_like(w),
        "constant": jnp.full_like(w, 0.5),
        "huge": 1e30 * jnp.sign(w),
        "huge f16": 6e4 * jnp.sign(w).astype(jnp.float16),
        "tiny": 1e-30 * w,
    }[kind]
    scale = 1 / np.float32(np.abs(np.asarray(w, np.float32)).max(initial=1e-6))
    loss = lambda w: jnp.sum((case.call(w).astype(jnp.float32) * scale) ** 2) / w.size
    if kind == "tiny":
        loss = lambda w: jnp.sum(case.call(w)) / w.size
    chex.assert_tree_all_finite((case.call(w), jax.value_and_grad(loss)(w)))


# Transforms


@every_transform
def test_equal_specs_compile_once(case):
    chex.clear_trace_counter()

    @functools.partial(jax.jit, static_argnums=0)
    @chex.assert_max_traces(n=1)
    def run(lifted, params, state):
        return lifted.apply(params, lifted.update(params, state))

    params = {"kernel": weight(case)}
    for _ in range(2):
        lifted = jw.on_tree(case.transform(), where="kernel")
        run(lifted, params, lifted.init(params, KEY))
    assert case.transform() == case.transform()


@pytest.mark.parametrize("case", **ids([c for c in TRANSFORMS if c.idempotent]))
def test_a_second_application_changes_nothing(case):
    t, w = case.transform(), weight(case)
    state = t.update(w, t.init(w, KEY))
    once = t.apply(w, state)
    close(t.apply(once, state), once, 2e-6)


class LinenProbe(nn.Module):
    """A module whose output is its kernel."""

    shape: tuple[int, ...]

    @nn.compact
    def __call__(self):
        return self.param("kernel", nn.initializers.zeros, self.shape)


class NnxProbe(nnx.Module):
    """A module whose output is its kernel."""

    def __init__(self, kernel):
        self.kernel = nnx.Param(kernel)

    def __call__(self):
        return self.kernel[...]


def linen_variables(w, state):
    learned = {STATE: state.learned} if state.learned else {}
    return {"params": {"kernel": w, **learned}} | ({STATE: state.fixed} if state.fixed else {})


def nnx_model(t, w, state):
    model = jw.nnx.transformed(NnxProbe(w), t, "kernel")
    for stored, given in ((model.weight_transform.learned, state.learned), (model.weight_transform.fixed, state.fixed)):
        for path, entry in given.items():
            for name, value in entry.items():
                stored[path][name][...] = value
    return model


@every_transform
def test_the_levels_give_the_same_numbers(case):
    t, w = case.transform(), weight(case)
    params = {"kernel": w}
    lifted = jw.on_tree(t, where="kernel")
    state = lifted.init(params, jax.random.key(0))
    moved = lifted.update(params, state)
    expected = lifted.apply(params, moved)["kernel"]

    flat = {n: a for part in state for n, a in part.get("kernel", {}).items()}
    close(t.apply(w, t.update(w, flat)), expected, 1e-6)

    tx = jw.project(t, where="kernel")
    updates, opt_state = tx.update({"kernel": jnp.zeros_like(w)}, tx.init(params), params)
    close(optax.apply_updates(params, updates)["kernel"], expected, 1e-6, size=np.abs(w).max())
    jax.tree.map(lambda a, b: close(a, b, 1e-5), opt_state.transform, moved)

    model = jw.linen.Transformed(LinenProbe(case.shape), t, where="kernel")
    output, new = model.apply(linen_variables(w, state), mutable=[STATE])
    close(output, expected, 1e-6)
    jax.tree.map(lambda a, b: close(a, b, 1e-5), dict(new.get(STATE, {})), moved.fixed)

    close(nnx_model(t, w, state)(), expected, 1e-6)


@every_transform
def test_the_levels_train_alike(case):
    t, w = case.transform(), weight(case)
    target, rate = weight(case, seed=1), 0.1
    lifted = jw.on_tree(t, where="kernel")
    state = lifted.init({"kernel": w}, jax.random.key(0))
    loss = lambda new: jnp.sum((new - target) ** 2)
    move = lambda tree, grads: jax.tree.map(lambda p, g: p - rate * g, tree, grads)

    params, learned, fixed = {"kernel": w}, state.learned, state.fixed
    variables = linen_variables(w, state)
    model = jw.linen.Transformed(LinenProbe(case.shape), t, where="kernel")
    nnx_probe = nnx_model(t, w, state)

    @jax.jit
    def tree_step(params, learned, fixed):
        moved = lifted.update(params, jw.TreeState(learned, fixed))
        on = lambda p, s: loss(lifted.apply(p, jw.TreeState(s, moved.fixed))["kernel"])
        grads = jax.grad(on, (0, 1))(params, learned)
        return *move((params, learned), grads), moved.fixed

    @jax.jit
    def linen_step(variables):
        def on(p):
            new, moved = model.apply({**variables, "params": p}, mutable=[STATE])
            return loss(new), moved

        grads, moved = jax.grad(on, has_aux=True)(variables["params"])
        return {**variables, **moved, "params": move(variables["params"], grads)}

    @nnx.jit
    def nnx_step(module):
        grads = nnx.grad(lambda m: loss(m()))(module)
        nnx.update(module, move(nnx.state(module, nnx.Param), grads))

    for _ in range(4):
        params, learned, fixed = tree_step(params, learned, fixed)
        variables = linen_step(variables)
        nnx_step(nnx_probe)
    close(variables["params"]["kernel"], params["kernel"], 1e-5)
    close(nnx_probe.kernel[...], params["kernel"], 1e-5)
    assert not np.allclose(params["kernel"], w)
    for path, entry in learned.items():
        for name, value in entry.items():
            close(variables["params"][STATE][path][name], value, 1e-5)
            close(nnx_probe.weight_transform.learned[path][name][...], value, 1e-5)


@every_transform
def test_state_survives_a_checkpoint_and_training_resumes_bit_for_bit(case, tmp_path):
    t = case.transform()
    lifted = jw.on_tree(t, where="**/kernel")
    params = {"layer": {"kernel": weight(case)}}
    tx = optax.chain(optax.adam(0.05), jw.project(t, where="**/kernel"))
    state = {"params": params, "transform": lifted.init(params, KEY), "optimizer": tx.init(params)}

    @jax.jit
    def step(state, i):
        moved = lifted.update(state["params"], state["transform"])
        noise = jax.random.normal(jax.random.fold_in(KEY, i), case.shape)
        loss = lambda p: jnp.sum(lifted.apply(p, moved)["layer"]["kernel"] * noise)
        updates, opt = tx.update(jax.grad(loss)(state["params"]), state["optimizer"], state["params"])
        return {"params": optax.apply_updates(state["params"], updates), "transform": moved, "optimizer": opt}

    for i in range(2):
        state = step(state, i)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", jax.tree.map(ocp.utils.to_shape_dtype_struct, state))
    chex.assert_trees_all_equal(restored, state)
    for i in range(2, 4):
        state, restored = step(state, i), step(restored, i)
    chex.assert_trees_all_equal(restored, state)


# Devices


def sharding(mesh, shape):
    """The last two axes over the mesh where it divides them, as model parallelism has it."""
    names = [None] * (len(shape) - 2) + ["x", "y"][-len(shape) :]
    spec = [n if n and d % mesh.shape[n] == 0 else None for n, d in zip(names, shape, strict=True)]
    return NamedSharding(mesh, PartitionSpec(*spec))


def gathered(hlo):
    """The number of elements of each all-gather of a compiled program."""
    found = re.findall(r"= (\([^)]*\)|\S+) all-gather(?:-start)?\(", hlo)
    shapes = [s for result in found for s in re.findall(r"\[([\d,]*)\]", result)]
    return [math.prod(int(d) for d in s.split(",") if d) for s in shapes]


@every_case
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_on_a_mesh_no_weight_is_gathered(case, kind):
    if case.name == "spectral_normalize exact":
        pytest.skip("an exact SVD needs the whole matrix on one device: SpectralNorm is the sharded one")
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(jax.sharding.AxisType[kind],) * 2)
    w = weight(case)
    placed = jax.device_put(w, sharding(mesh, case.shape))
    if case.transform is None:
        compiled = jax.jit(case.call, out_shardings=placed.sharding).lower(placed).compile()
        new, expected = compiled(placed), case.call(w)
    else:
        lifted = jw.on_tree(case.transform(), where="*")
        params = {"a": w, "b": w[::-1]}
        state = lifted.init(params, KEY)
        run = lambda params, state: lifted.apply(params, lifted.update(params, state))
        jax.tree.map(lambda a, b: close(a, b, 1e-4), lifted.init(jax.device_put(params, placed.sharding), KEY), state)
        place = lambda a: jax.device_put(
            a, sharding(mesh, a.shape) if a.shape == case.shape else NamedSharding(mesh, PartitionSpec())
        )
        out = jax.tree.map(lambda _: placed.sharding, params)
        arguments = jax.tree.map(place, (params, state))
        compiled = jax.jit(run, out_shardings=out).lower(*arguments).compile()
        new, expected = compiled(*arguments), run(params, state)
    jax.tree.map(lambda a, b: close(a, b, 1e-5), new, expected)
    assert all(n < w.size / 2 for n in gathered(compiled.as_text())), gathered(compiled.as_text())


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_weights_that_are_sharded_differently_are_not_gathered_either(kind):
    """Weights of one shape are updated as one stack, but not across shardings."""
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(jax.sharding.AxisType[kind],) * 2)
    names = [f"layer_{i}/{role}" for i in range(2) for role in ("query", "out")]
    params = {n: jax.random.normal(jax.random.key(i), (64, 64)) for i, n in enumerate(names)}
    specs = {n: PartitionSpec(*(("x", "y") if "query" in n else ("y", "x"))) for n in names}
    placed = {n: jax.device_put(w, NamedSharding(mesh, specs[n])) for n, w in params.items()}
    lifted = jw.on_tree(jw.SpectralNorm())
    state = lifted.init(params, KEY)
    compiled = jax.jit(lifted.update).lower(placed, state).compile()
    jax.tree.map(lambda a, b: close(a, b, 1e-4), compiled(placed, state), lifted.update(params, state))
    assert all(n < 64 * 64 / 2 for n in gathered(compiled.as_text()))


@pytest.fixture(scope="module")
def tpu():
    """Devices of a v5e slice to compile for; none need be there. libtpu locks itself: for this file alone."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed: pip install 'jaxweights[tpu-compile]' compiles for a TPU without one")
    from jax.experimental import topologies

    return topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices


@every_case
def test_it_compiles_for_a_tpu(case, tpu):
    mesh = jax.sharding.Mesh(np.array(tpu).reshape(2, 2), ("x", "y"))
    w = jax.ShapeDtypeStruct(case.shape, jnp.bfloat16, sharding=sharding(mesh, case.shape))
    loss = lambda w: jnp.sum(case.call(w).astype(jnp.float32))
    compiled = jax.jit(jax.value_and_grad(loss)).lower(w).compile()
    assert compiled.memory_analysis() is not None
