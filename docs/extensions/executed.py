"""Runs notebooks that the cache of outputs does not have, as many at once as `-j` says, before pages are read.

Sphinx reads the guides in one batch, one after the other, and each finds its outputs in the cache. What fails here runs
once more there, which reports it.
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import nbformat
from jupyter_cache import get_cache
from jupyter_cache.base import CacheBundleIn
from jupyter_cache.executors.utils import single_nb_execution


def is_cached(cache, notebook) -> bool:
    try:
        cache.match_cache_notebook(notebook)
    except KeyError:
        return False
    return True


def execute(app):
    config = app.env.mystnb_config
    cache = get_cache(config.execution_cache_path)
    paths = sorted(Path(app.srcdir).glob("guides/*.ipynb"))
    missing = [path for path in paths if not is_cached(cache, nbformat.read(path, as_version=4))]

    def run(path):
        with TemporaryDirectory() as folder:
            notebook = nbformat.read(path, as_version=4)
            return single_nb_execution(notebook, folder, config.execution_timeout, allow_errors=False)

    with ThreadPoolExecutor(app.parallel) as pool:
        for path, result in zip(missing, pool.map(run, missing), strict=True):
            if result.err is None:
                bundle = CacheBundleIn(result.nb, str(path), data={"execution_seconds": result.time})
                cache.cache_notebook_bundle(bundle, check_validity=False, overwrite=True)


def setup(app):
    app.connect("builder-inited", execute, priority=501)  # after myst-nb has set up the cache
    return {"parallel_read_safe": True, "parallel_write_safe": True}
