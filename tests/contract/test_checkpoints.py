"""The state of every transform of `cases.py` survives a checkpoint."""

import chex
import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
from cases import KEY
from contract.table import every_transform, weight

import jaxweights as jw


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
