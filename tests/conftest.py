"""Settings of the test run: CPU, eight devices, and a TPU's compiler where libtpu is installed."""

import os
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
# What libtpu asks of the machine, so that it compiles with no TPU at hand.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("TPU_WORKER_ID", "0")

# JAX reads them when it is imported.
import jax
import pytest

# Most of the time goes to compiling. One directory a process: JAX may read what another process has half written.
_compiled = tempfile.TemporaryDirectory()
jax.config.update("jax_compilation_cache_dir", _compiled.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def pytest_collection_modifyitems(items):
    """The file that takes longest is the first, so that no worker is left with it at the end."""
    items.sort(key=lambda item: item.path.name != "test_examples.py")


@pytest.fixture(autouse=True, scope="module")
def _programs_are_let_go():
    """Each compiled program maps memory, of which a process may have only so many pieces: XLA crashes at the next."""
    yield
    jax.clear_caches()
