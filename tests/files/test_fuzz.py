"""Fuzzing: whatever the bytes of a file, its reader gives a tree or a documented error, soon and in little memory.

A failure names the reader and the number of the file; both give the same bytes again.
"""

import contextlib
import dataclasses
import faulthandler
import functools
import gc
import io
import itertools
import json
import random
import resource
import sys
import tempfile
import time
import tracemalloc
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from files.damage import damaged, parts
from files.oracles import halves, leaves, normal, oracle

import jaxweights as jw
from jaxweights import files
from jaxweights.command import source
from jaxweights.files import gguf, safetensors
from jaxweights.files.entropy import SYMBOLS_PER_BYTE
from jaxweights.files.writing import Entry, Piece


@functools.cache
def weights():
    """Stored weights (64, 32) by name, made by one program."""
    formats = {
        **{"zero points": halves(4, symmetric=False), "3 bits": halves(3, symmetric=False), "8 bits": halves(8)},
        **{"per tensor": jw.formats.integers(3, per_tensor=True, scale="bfloat16"), "doubly": jw.formats.NF4_DOUBLE},
        **{name: name for name in ("nf4", "mxfp4", "nvfp4", "mxfp8")},
    }

    @jax.jit
    def make(w):
        half = w * (jnp.arange(64) % 4 < 2)[:, None]
        return {name: jw.quantize(w, format) for name, format in formats.items()}, jw.sparse.pack(half)

    w = normal(64, 32)
    quantized, half = make(w)
    order = jnp.asarray(np.random.default_rng(0).permutation(64), jnp.int32)
    words = jnp.where(jnp.arange(32) % 5 == 0, quantized["zero points"].words, 0)
    few = dataclasses.replace(quantized["zero points"], words=words)
    ordered = dataclasses.replace(quantized["zero points"], order=order)
    scaled = dataclasses.replace(ordered, input_scale=jnp.ones(64))
    index = jnp.asarray(np.random.default_rng(0).integers(-1, 5, (64, 32)))
    clustered = jw.store_clusters(jnp.arange(5.0), index, has_zeros=True)
    blocks = jw.sparse.pack_blocks(w, block=(8, 8))
    others = {
        "half": half,
        "ordered": ordered,
        "scaled": scaled,
        "blocks": blocks,
        "clustered": clustered,
        "few codes": few,
    }
    return quantized | others


SAFETENSORS, GGUF = "m.safetensors", "m.gguf"


def saved(path, tree, **options):
    files.save(path, tree, **options)
    return path.read_bytes()


def written(path, tensors, metadata=None):
    """Tensors in safetensors as they are."""
    safetensors.write(path, [Piece.of({name: np.asarray(tensor) for name, tensor in tensors.items()})], metadata or {})
    return path.read_bytes()


def of_arrays(path):
    dtypes = (np.float32, ml_dtypes.bfloat16, np.int8, np.bool_, ml_dtypes.float8_e4m3fn, np.int64)
    tree = [{str(np.dtype(d)): np.ones((2, 3), d) for d in dtypes}, (None, {}), {3: np.zeros((0, 4), np.float32)}]
    yield saved(path, {"l": tree, "scalar": np.array(1, np.float32)}, metadata={"a": "b"})


def of_stored_weights(path):
    for w in weights().values():
        yield saved(path, {"l": {"kernel": w}})


def of_entropy_codes(path):
    oracle("constriction")
    rare = np.where(np.arange(600) % 9 == 0, 1, 0).astype(np.float32).reshape(30, 20)
    for leaf in (rare, rare > 0, weights()["clustered"], weights()["few codes"]):
        yield saved(path, {"l": {"kernel": leaf}}, entropy_coding=True)


def coded(format, *names):
    """Files of another tool: each weight with its config in the metadata, and the last without."""

    def files_of(path):
        for name in names:
            yield saved(path, {"l": {"kernel": weights()[name]}}, format=format)
        yield written(path, safetensors.read(path).tensors)

    return files_of


def of_gptq(path):
    yield from coded("gptq_v2", "zero points", "3 bits", "ordered")(path)
    yield from coded("gptq", "8 bits")(path)


def of_bitsandbytes(path):
    yield from coded("bitsandbytes", "nf4")(path)
    contents = safetensors.read(path).tensors
    absmax, state = "l.weight.absmax", "l.weight.quant_state.bitsandbytes__nf4"
    described = json.loads(contents[state].tobytes()) | {"nested_blocksize": 8, "nested_offset": 0.5}
    doubly = {
        absmax: np.arange(32, dtype=np.uint8),
        "l.weight.nested_absmax": np.ones(4, np.float32),
        "l.weight.nested_quant_map": np.linspace(0, 1, 256, dtype=np.float32),
        state: np.frombuffer(json.dumps(described).encode(), np.uint8),
    }
    yield written(path, contents | doubly)


def of_gguf(path):
    tree = {"l": [np.ones((2, 3), np.float32), np.ones(3, np.float16)], "i": np.arange(3, dtype=np.int8)}
    metadata = {"general.alignment": 64, "list": [1, 2], "tokens": ["a", "b"], "flag": True, "nested": [[1], [2]]}
    yield saved(path, tree, metadata=metadata)


def of_gguf_blocks(path):
    rng = np.random.default_rng(0)
    for name, kind in gguf.BLOCK_TYPES.items():
        shape = (3, kind.rows)
        data = rng.integers(256, size=(3, 1, kind.nbytes), dtype=np.uint8)
        tensor = gguf.Tensor(name, shape, Entry.of(data), lambda data=data: data)
        gguf.write(path, {"l.weight": tensor}, {})
        yield path.read_bytes()


def of_index(path):
    files.save(path.with_name("a.safetensors"), {"a": np.ones(2, np.float32)})
    files.save(path.with_name("b.safetensors"), {"b": {"c": np.ones(3, np.float32)}})
    places = {"a": "a.safetensors", "b.c": "b.safetensors"}
    yield json.dumps({"metadata": {"total_size": 20}, "weight_map": places}).encode()


def of_configs(path):
    """Of each tool with one, beside a file of another tool now and then: the last one written."""
    for format in ("compressed-tensors", "awq", "gptq"):
        beside = path.with_name(SAFETENSORS)
        files.save(beside, {"l": {"kernel": weights()["zero points"]}}, format=format)
        contents = safetensors.read(beside)
        written(beside, contents.tensors)
        yield json.dumps({"quantization_config": json.loads(contents.metadata["quantization_config"])}).encode()


def of_npz(path):
    arrays = {"a.kernel": np.ones((4, 3), np.float32), "n": np.arange(5), "flag": np.array(True)}
    for save in (np.savez, np.savez_compressed):
        save(path, **arrays)
        yield path.read_bytes()


def of_the_command(path):
    yield from itertools.chain(of_arrays(path), of_stored_weights(path), of_gptq(path))


def read_one_by_one(path):
    """As the command reads a file."""
    opened = source.open(path)
    return {name: opened.read(name) for name in opened.items}


class Reader(NamedTuple):
    """What is fuzzed.

    Attributes:
      file: the name of the files.
      valid: gives the bytes of some valid ones. It may use the path, and write files beside it.
      read: reads the file at a path.
      expands: how many bytes of memory a byte of the file stands for at most.
    """

    file: str
    valid: Callable[[Path], Iterable[bytes]]
    read: Callable[[Path], object] = files.load
    expands: int = 8


READERS = {
    "safetensors": Reader(SAFETENSORS, of_arrays),
    "stored weights": Reader(SAFETENSORS, of_stored_weights),
    "gptq": Reader(SAFETENSORS, of_gptq),
    "awq": Reader(SAFETENSORS, coded("awq", "zero points")),
    "compressed-tensors": Reader(SAFETENSORS, coded("compressed-tensors", "zero points", "8 bits", "per tensor")),
    "bitsandbytes": Reader(SAFETENSORS, of_bitsandbytes),
    "mxfp4": Reader(SAFETENSORS, coded("mxfp4", "mxfp4")),
    "sparse-24-bitmask": Reader(SAFETENSORS, coded("sparse-24-bitmask", "half")),
    "gguf": Reader(GGUF, of_gguf),
    "gguf blocks": Reader(GGUF, of_gguf_blocks),
    "index": Reader("model.safetensors.index.json", of_index),
    "entropy codes": Reader(SAFETENSORS, of_entropy_codes, expands=8 * SYMBOLS_PER_BYTE),
    "npz": Reader("m.npz", of_npz, read_one_by_one, expands=1100),
    "command": Reader(SAFETENSORS, of_the_command, read_one_by_one),
    "config": Reader("config.json", of_configs, lambda path: files.load(path.with_name(SAFETENSORS))),
}


@pytest.fixture
def folder():
    """A folder in memory, if there is one."""
    memory = "/dev/shm"
    with tempfile.TemporaryDirectory(dir=memory if Path(memory).is_dir() else None) as name:
        yield Path(name)


@contextlib.contextmanager
def little_memory(extra=2**29):
    """Makes an allocation fail that needs more than so many bytes beyond what the process has."""
    if sys.platform != "linux":
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + extra, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def n_open_files():
    folder = Path("/proc/self/fd")
    return len(list(folder.iterdir())) if folder.exists() else 0


@contextlib.contextmanager
def watched(seconds=120):
    """Ends the process, with a traceback, if there is no `tick` for so long. What hangs in C cannot be stopped."""
    try:
        yield lambda: faulthandler.dump_traceback_later(seconds, exit=True)
    finally:
        faulthandler.cancel_dump_traceback_later()
        tracemalloc.stop()


def check(tree, number, most):
    """What was read is no larger than its file warrants, and has the shapes that it says, of which some are checked."""
    assert sum(a.nbytes for a in jax.tree.leaves(tree)) <= most
    for leaf in leaves(tree) if number % 20 == 0 else ():
        dense = jax.eval_shape(lambda a: a.todense(), leaf) if hasattr(leaf, "todense") else leaf
        assert dense.shape == leaf.shape and dense.dtype == leaf.dtype


@pytest.mark.parametrize("numbers", [range(200), pytest.param(range(200, 20_200), marks=pytest.mark.slow)], ids=len)
@pytest.mark.parametrize("name", READERS)
def test_whatever_the_bytes_there_is_a_tree_or_a_documented_error(name, numbers, folder):
    reader = READERS[name]
    path = folder / reader.file
    valid = []
    for data in reader.valid(path):
        path.write_bytes(data)
        reader.read(path)
        valid.append(parts(data))
    beside = sum(file.stat().st_size for file in folder.iterdir() if file != path)
    refused, messages, open_files = 0, set(), n_open_files()
    with little_memory(), watched() as tick:
        for number in numbers:
            data = damaged(valid[number % len(valid)], random.Random(f"{name} {number}"))
            path.write_bytes(data)
            most = reader.expands * (beside + len(data))
            if sampled := number % 100 == 0:
                tick()
                tracemalloc.start()
            start = time.thread_time()
            try:
                check(reader.read(path), number, most)
            except (ValueError, OSError) as e:
                refused += 1
                messages.add(str(e))
                assert 10 < len(str(e)) < 2000, f"{name} {number}: {e}"
            except BaseException as e:
                raise AssertionError(f"{name} {number}: {type(e).__name__} {e}") from e
            assert time.thread_time() - start < 5, f"{name} {number}"
            if sampled:
                assert tracemalloc.get_traced_memory()[1] < 2**20 + 3 * most, f"{name} {number}"
                tracemalloc.stop()
    gc.collect()
    assert n_open_files() <= open_files
    assert refused > len(numbers) / 4 and len(messages) > 10


def test_what_fuzzing_found(folder):
    """Headers of NumPy that end within a string or a bracket, a weight without any tensor, endless messages, ∞·0."""
    path = folder / "m.npz"
    for shape in (b"'ape':   (4, 3)", b"'shape': ((4,  "):
        data = io.BytesIO()
        np.save(data, np.ones((4, 3), np.float32))
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a.npy", data.getvalue().replace(b"'shape': (4, 3)", shape))
        with pytest.raises(ValueError, match=r"m.npz is damaged, or no .npz file"):
            source.open(path)
    path = folder / SAFETENSORS
    files.save(path, {"l": {"kernel": weights()["nf4"]}})
    written(path, {}, metadata=safetensors.read(path).metadata)
    with pytest.raises(ValueError, match=r"'l.kernel' has no tensor 'words'"):
        read_one_by_one(path)
    for format, name, shape in (
        ("sparse-24-bitmask", "half", "l.shape"),
        ("compressed-tensors", "zero points", "l.weight_shape"),
    ):
        saved(path, {"l": {"kernel": weights()[name]}}, format=format)
        tensors = safetensors.read(path).tensors
        written(path, tensors | {shape: np.zeros((5000, 1)[: tensors[shape].ndim], np.int64)})
        with pytest.raises(ValueError, match=r"of shape [\[(]0, 0, 0[\])]$"):
            files.load(path)
    *_, doubly = of_bitsandbytes(path)
    path.write_bytes(doubly)
    tensors = safetensors.read(path).tensors
    written(path, tensors | {"l.weight.nested_absmax": np.full(4, np.inf, np.float32)})
    assert not np.isfinite(files.load(path)["l"]["weight"].scale.codes).any()  # without a warning of NumPy
