"""Test settings: CPU, eight devices, fast compilation, and a TPU compiler if libtpu is installed."""

import os
import tempfile
import zlib
from collections import Counter, defaultdict
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most of the test time is compilation. These flags cut it to a third: XLA still optimizes the program, so its text and
# memory use are unchanged, but generates slow code. Flags from the environment come last and take precedence.
FLAGS = [
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
]
# Later versions of XLA, and libtpu, abort on this unknown flag.
OLDER_EMITTERS = tuple(int(n) for n in version("jaxlib").split(".")[:2]) < (0, 11)
if OLDER_EMITTERS:
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")
_outer = os.environ.get("XLA_FLAGS", "").split()  # workers inherit FLAGS
os.environ["XLA_FLAGS"] = " ".join([*(flag for flag in FLAGS if flag not in _outer), *_outer])
# Lets libtpu compile without a TPU.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("TPU_WORKER_ID", "0")

# JAX reads the environment on import.
import jax  # noqa: E402
import pytest  # noqa: E402

# The compilation cache persists between runs if JAXWEIGHTS_TEST_CACHE names a folder. Each worker has its own folder,
# because JAX may read a file that another process is still writing.
KEPT = os.environ.get("JAXWEIGHTS_TEST_CACHE")
_compiled = None if KEPT else tempfile.TemporaryDirectory()
CACHE = Path(KEPT or _compiled.name).resolve() / os.environ.get("PYTEST_XDIST_WORKER", "main")
CACHE.mkdir(parents=True, exist_ok=True)
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_enable_xla_caches", "none")  # they would make the path part of the cache key
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def link(sources, folder):
    """Links the files into the folder, skipping those already there."""
    folder.mkdir(exist_ok=True)
    for source in sources:
        if not (folder / source.name).exists():
            os.link(source, folder / source.name)


def pytest_configure(config):
    """Seeds a worker's cache with the programs compiled in earlier runs."""
    if KEPT and (shared := CACHE.parent / "all").exists():
        link(shared.iterdir(), CACHE)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session):
    """After all workers finish, collects their compiled programs for the next run."""
    if KEPT and not hasattr(session.config, "workerinput"):
        link(CACHE.parent.glob("[gm]*/*"), CACHE.parent / "all")


LONG = (
    *("test_benchmarks", "test_examples", "test_modes", "test_arrays", "test_fuzz", "test_levels", "test_checkpoints"),
    *("test_norm_modules", "test_averages", "test_meshes", "test_quantization_methods", "test_clustering"),
    *("test_standardize", "test_selection"),
)
"""The slowest files, the slowest first."""


def pytest_addoption(parser):
    parser.addoption("--one-in", type=int, default=1, metavar="N", help="of each parametrized test, run one case in N")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    """Runs the slowest files first, so that no worker starts one last. Of those selected, leaves some to `--one-in`."""
    order = {name: i for i, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path.stem, len(LONG)))
    cases = defaultdict(list)
    for item in items:
        cases[item.nodeid.partition("[")[0]].append(item)
    kept = {item for test, found in cases.items() for item in one_in(config.getoption("--one-in"), test, found)}
    if len(kept) < len(items):
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = [item for item in items if item in kept]


def one_in(n, test, cases):
    """One of every `n` cases of a test, at least one. Tests of the same table keep different cases."""
    return cases[zlib.crc32(test.encode()) % min(n, len(cases)) :: n]


def pytest_terminal_summary(terminalreporter):
    """Lists the ten slowest files."""
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
    """`compiler_options` for `jax.jit` and `compile` that restore the optimizations users get."""
    options = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}
    return options | ({"xla_cpu_use_fusion_emitters": True} if OLDER_EMITTERS else {})


@pytest.fixture(autouse=True, scope="module")
def _programs_are_let_go():
    """Frees compiled programs. Each holds memory maps, and XLA crashes at the process limit."""
    yield
    jax.clear_caches()
