"""Transform states of all cases survive a checkpoint."""

import chex
import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
import pytest
from cases import KEY, TRANSFORMS
from contract.table import weight

import jaxweights as jw

OF_EACH_KIND = [case for case in TRANSFORMS if case.kind]


@pytest.mark.parametrize(
    "cases", [pytest.param(OF_EACH_KIND, id="kinds"), pytest.param(TRANSFORMS, id="all", marks=pytest.mark.slow)]
)
def test_states_survive_a_checkpoint_and_training_resumes_bit_for_bit(cases, tmp_path):
    """All cases share one tree, with one kernel per case under its name."""
    rules = {f"{case.name}_kernel": case.transform() for case in cases}
    lifted = jw.on_tree(rules)
    params = {f"{case.name}_kernel": weight(case) for case in cases}
    tx = optax.chain(optax.adam(0.05), jw.project(rules))
    start = lambda params: {"params": params, "transform": lifted.init(params, KEY), "optimizer": tx.init(params)}

    @jax.jit
    def step(state, i):
        moved = lifted.update(state["params"], state["transform"])
        noise = {n: jax.random.normal(jax.random.fold_in(KEY, i), w.shape) for n, w in params.items()}
        loss = lambda p: sum(jnp.vdot(w, noise[n]) for n, w in lifted.apply(p, moved).items())
        updates, opt = tx.update(jax.grad(loss)(state["params"]), state["optimizer"], state["params"])
        return {"params": optax.apply_updates(state["params"], updates), "transform": moved, "optimizer": opt}

    state = jax.jit(start)(params)
    for i in range(2):
        state = step(state, i)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", jax.tree.map(ocp.utils.to_shape_dtype_struct, state))
    chex.assert_trees_all_equal(restored, state, strict=True)
    for i in range(2, 4):
        state, restored = step(state, i), step(restored, i)
    chex.assert_trees_all_equal(restored, state, strict=True)
