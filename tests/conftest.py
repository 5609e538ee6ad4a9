"""Settings of the test run: CPU, eight devices, a compiler that is quick, and a TPU's where libtpu is installed."""

import os
import tempfile
from collections import Counter
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most of the time goes to compiling. These flags cut it to a third: XLA still optimizes the program, so its text and
# its memory stay as they are, but generates slow code. Flags from outside come last and win.
FLAGS = [
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
]
# Later versions of XLA, and libtpu's, do not know this flag and abort.
OLDER_EMITTERS = tuple(int(n) for n in version("jaxlib").split(".")[:2]) < (0, 11)
if OLDER_EMITTERS:
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")
_outer = os.environ.get("XLA_FLAGS", "").split()  # in a worker, these are there already
os.environ["XLA_FLAGS"] = " ".join([*(flag for flag in FLAGS if flag not in _outer), *_outer])
# What libtpu asks of the machine, so that it compiles with no TPU at hand.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("TPU_WORKER_ID", "0")

# JAX reads them when it is imported.
import jax  # noqa: E402
import pytest  # noqa: E402

# The compilation cache, kept between runs if JAXWEIGHTS_TEST_CACHE names a folder. Each worker has its own folder: JAX
# may read what another process has half written.
KEPT = os.environ.get("JAXWEIGHTS_TEST_CACHE")
_compiled = None if KEPT else tempfile.TemporaryDirectory()
CACHE = Path(KEPT or _compiled.name).resolve() / os.environ.get("PYTEST_XDIST_WORKER", "main")
CACHE.mkdir(parents=True, exist_ok=True)
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_enable_xla_caches", "none")  # they would make the folder part of the key
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def link(sources, folder):
    """Puts the files into the folder, those that it has not."""
    folder.mkdir(exist_ok=True)
    for source in sources:
        if not (folder / source.name).exists():
            os.link(source, folder / source.name)


def pytest_configure(config):
    """A worker starts with what all workers of the runs before have compiled."""
    if KEPT and (shared := CACHE.parent / "all").exists():
        link(shared.iterdir(), CACHE)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session):
    """When all workers are done, what they have compiled is there for the next run."""
    if KEPT and not hasattr(session.config, "workerinput"):
        link(CACHE.parent.glob("[gm]*/*"), CACHE.parent / "all")


LONG = ("test_examples.py", "test_arrays.py", "test_checkpoints.py", "test_benchmarks.py")


def pytest_collection_modifyitems(items):
    """The files that take longest come first, so that no worker is left with one at the end."""
    items.sort(key=lambda item: item.path.name not in LONG)


def pytest_terminal_summary(terminalreporter):
    """Names the ten files that took longest."""
    seconds = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if hasattr(report, "nodeid") and hasattr(report, "duration"):
                seconds[report.nodeid.partition("::")[0]] += report.duration
    terminalreporter.section("ten slowest files", sep="=")
    for name, spent in seconds.most_common(10):
        terminalreporter.line(f"{spent:7.1f} s {name}")


@pytest.fixture
def optimizing():
    """The `compiler_options` of `jax.jit` and `compile` for the code that a user gets: for tests that judge it."""
    options = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}
    return options | ({"xla_cpu_use_fusion_emitters": True} if OLDER_EMITTERS else {})


@pytest.fixture(autouse=True, scope="module")
def _programs_are_let_go():
    """Each compiled program maps memory, of which a process may have only so many pieces: XLA crashes at the next."""
    yield
    jax.clear_caches()
