"""Every case of `cases.py` compiles for a TPU.

libtpu allows a single process, so all tests that need it are in this file.
"""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract.table import each_kind, sharding

import jaxweights as jw


@pytest.fixture(scope="module")
def tpu():
    """Devices of a v5e slice to compile for, without hardware."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed: pip install 'jaxweights[tpu-compile]' compiles for a TPU without one")
    from jax.experimental import topologies

    jax.devices()  # consume the XLA flags of `conftest.py`, which libtpu does not know
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XLA_FLAGS", "")
        yield topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices


@each_kind
def test_it_compiles_for_a_tpu(case, tpu):
    mesh = jax.sharding.Mesh(np.array(tpu).reshape(2, 2), ("x", "y"))
    w = jax.ShapeDtypeStruct(case.shape, jnp.bfloat16, sharding=sharding(mesh, case.shape))
    loss = lambda w: jnp.sum(case.call(w).astype(jnp.float32))
    compiled = jax.jit(jax.value_and_grad(loss)).lower(w).compile()
    assert compiled.memory_analysis() is not None


STORES = {
    "quantize": lambda w: jw.quantize(w, 8),
    "pack": jw.sparse.pack,
    "pack_blocks": lambda w: jw.sparse.pack_blocks(w, n_blocks=3),
    "to_bcoo": lambda w: jw.sparse.to_bcoo(w, nse=99),
    "to_csr": lambda w: jw.sparse.to_csr(w, nse=99),
}


@pytest.mark.parametrize("store", STORES.values(), ids=STORES)
def test_stored_weights_and_products_with_them_compile_for_a_tpu(store, tpu):
    place = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=jax.sharding.SingleDeviceSharding(tpu[0]))
    w, one, many = (place(jnp.zeros(shape, jnp.bfloat16)) for shape in ((512, 128), (1, 512), (8, 512)))
    stored = jax.tree.map(place, jax.eval_shape(store, w))
    loss = lambda x, stored: jnp.sum(jw.matmul(x, stored).astype(jnp.float32))
    jax.jit(store).lower(w).compile()
    for x in (one, many):
        jax.jit(jax.value_and_grad(loss)).lower(x, stored).compile()
