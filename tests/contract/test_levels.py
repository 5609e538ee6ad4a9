"""Every transform of `cases.py` at every level: one compilation, equal values, equal training."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from cases import KEY, TRANSFORMS
from contract.table import EPS, close, each_kind_of_transform, every_transform, over, same_state, weight
from flax import nnx

import jaxweights as jw
from jaxweights.levels.paths import STATE


@every_transform
def test_equal_specs_trace_once_and_so_does_a_moved_state(case):
    chex.clear_trace_counter()

    @functools.partial(jax.jit, static_argnums=0)
    @chex.assert_max_traces(n=1)
    def run(lifted, params, state):
        moved = lifted.update(params, state)
        return lifted.apply(params, moved), moved

    params = {"kernel": jax.ShapeDtypeStruct(case.shape, jnp.float32)}
    for _ in range(2):
        lifted = jw.on_tree(case.transform(), where="kernel")
        state = jax.eval_shape(lifted.init, params, KEY)
        for _ in range(2):
            _, state = run.eval_shape(lifted, params, state)
    assert case.transform() == case.transform()


@each_kind_of_transform
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


@over([c for c in TRANSFORMS if c.idempotent])
def test_a_second_application_changes_nothing(case):
    t, w = case.transform(), weight(case)

    @jax.jit
    def twice(w):
        state = t.update(w, t.init(w, KEY))
        once = t.apply(w, state)
        return once, t.apply(once, state)

    once, again = twice(w)
    close(again, once, 2e-6)


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


def levels(case):
    """w -> {level: the weight there}, for tracing: without a given state."""
    t = case.transform()
    lifted, tx = jw.on_tree(t, where="kernel"), jw.project(t, where="kernel")
    module = jw.linen.Transformed(LinenProbe(case.shape), t, where="kernel")

    def weights(w):
        params = {"kernel": w}
        updates, _ = tx.update({"kernel": jnp.zeros_like(w)}, tx.init(params), params)
        variables = module.init(KEY)
        variables = {**variables, "params": {**variables["params"], "kernel": w}}
        return {
            "tree": lifted.apply(params, lifted.update(params, lifted.init(params, KEY)))["kernel"],
            "optax": optax.apply_updates(params, updates)["kernel"],
            "linen": module.apply(variables, mutable=[STATE])[0],
            "nnx": jw.nnx.transformed(NnxProbe(w), t, "kernel")(),
        }

    return weights


@every_transform
def test_every_level_keeps_shape_and_dtype(case):
    for dtype in EPS:
        w = jax.ShapeDtypeStruct(case.shape, dtype)
        for level, new in jax.eval_shape(levels(case), w).items():
            assert (new.shape, new.dtype) == (w.shape, w.dtype), level


@over([c for c in TRANSFORMS if c.kind], slow=lambda case: case.kind not in ("learned", "scheduled"))
def test_no_level_leaks_a_tracer(case):
    """Slow for what it does: JAX caches nothing then."""
    with jax.checking_leaks():
        jax.eval_shape(levels(case), jax.ShapeDtypeStruct(case.shape, jnp.float32))


@each_kind_of_transform
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
    same_state(case, lifted, params, opt_state.transform, moved, 1e-5)

    model = jw.linen.Transformed(LinenProbe(case.shape), t, where="kernel")
    output, new = model.apply(linen_variables(w, state), mutable=[STATE])
    close(output, expected, 1e-6)
    same_state(case, lifted, params, jw.TreeState(state.learned, dict(new.get(STATE, {}))), moved, 1e-5)

    close(nnx_model(t, w, state)(), expected, 1e-6)


@each_kind_of_transform
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
    moved = zip(jax.tree.leaves((params["kernel"], learned)), jax.tree.leaves((w, state.learned)), strict=True)
    assert not all(np.allclose(new, old) for new, old in moved)
    for path, entry in learned.items():
        for name, value in entry.items():
            close(variables["params"][STATE][path][name], value, 1e-5)
            close(nnx_probe.weight_transform.learned[path][name][...], value, 1e-5)
