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
    "int8": lambda w: jw.quantize(w, 8),
    "int3 with zeros": lambda w: jw.quantize(w, jw.formats.integers(3, block=64, symmetric=False)),
    "nvfp4": lambda w: jw.quantize(w, "nvfp4"),
    "5 clusters": lambda w: jw.store_clusters(w[0, :5], jnp.zeros(w.shape, jnp.int8), has_zeros=True),
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


def clusters(w):
    return jw.store_clusters(w[0, :64], jnp.zeros(w.shape, jnp.int8), has_zeros=False)


integers = jw.formats.integers
LARGE = {  # the format, or what stores the weight, the shape, numbers of rows of x
    "int8": (8, (8192, 28672), (1, 16)),
    "int4": (integers(4, block=128), (8192, 28672), (1, 16)),
    "int4 with zeros": (integers(4, block=128, symmetric=False), (8192, 28672), (16,)),
    "nf4": ("nf4", (8192, 28672), (16,)),
    "int3, in a loop": (integers(3, block=128), (8192, 28672), (16,)),
    "int4, in a loop": (integers(4, block=128), (28672, 8192), (16,)),
    "64 clusters, in a loop": (clusters, (8192, 28672), (1, 16)),
}


@pytest.mark.parametrize("name", LARGE)
def test_products_with_large_stored_weights_read_them_once_on_a_tpu(name, tpu):
    """Without an array of the size of the weight. The benchmark has all formats."""
    format, shape, ns = LARGE[name]
    place = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=jax.sharding.SingleDeviceSharding(tpu[0]))
    w = jax.ShapeDtypeStruct(shape, jnp.float32)
    store = format if callable(format) else lambda w: jw.quantize(w, format)
    q = jax.tree.map(place, jax.eval_shape(store, w))
    for n in ns:
        x = place(jax.ShapeDtypeStruct((n, shape[0]), jnp.float32))
        compiled = jax.jit(jw.matmul).lower(x, q).compile()
        memory = compiled.memory_analysis()
        assert memory.temp_size_in_bytes <= 2**20
        # What a loop reads is counted once, however often it goes round.
        if "loop" not in name:
            assert compiled.cost_analysis()["bytes accessed"] <= 1.2 * memory.argument_size_in_bytes
