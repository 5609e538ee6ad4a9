"""Entropy-coded files come back bit for bit, are as small as their information, and are decoded as the text says."""

import json
import math
import random
import sys
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from files.damage import damaged, parts
from files.oracles import assert_same, normal, oracle

import jaxweights as jw
from jaxweights import files
from jaxweights.files import entropy, safetensors

PATH = "m.safetensors"


@pytest.fixture(autouse=True)
def package():
    oracle("constriction")


def drawn(shape, density, seed=0):
    """Symbols of which most are 7, the others by rows and columns of different densities, some of them dead."""
    rng = np.random.default_rng(seed)
    rows, columns = rng.gamma(0.5, 2, (*shape[:-1], 1)), rng.gamma(2, 0.5, shape[-1])
    is_other = rng.random(shape) < density * np.where(rows > 0.1, rows, 0) * columns
    return np.where(is_other, rng.binomial(30, 0.5, shape), 7).astype(np.uint8)


SYMBOLS = {
    "sparse": drawn((300, 100), 0.06),
    "dense": drawn((40, 60), 0.9),
    "a stack": drawn((2, 3, 20, 30), 0.2),
    "one row": drawn((50,), 0.5),
    "even": np.random.default_rng(1).integers(256, size=(10, 40)).astype(np.uint8),
    "one symbol": np.full((30, 40), 3, np.uint8),
    "one of another": np.eye(64, dtype=np.uint8)[:, :1] * np.ones((1, 80), np.uint8),
    "bits": (np.random.default_rng(2).random((30, 30)) < 0.03).astype(np.uint8),
}


def read_as_described(code):
    """The symbols of a code: the text of `jaxweights.files.entropy`, in exact integers, one symbol at a time."""
    place = 0

    def number():
        nonlocal place
        value = shift = 0
        while True:
            byte = code[place]
            value, shift, place = value | (byte & 127) << shift, shift + 7, place + 1
            if byte < 128:
                return value

    shape = [number() for _ in range(number())]
    n, common = number(), number()
    n_columns, n_rows = shape[-1], math.prod(shape[:-1])
    counts = [[number() for _ in range(number())] if number() else None for _ in range(2)]
    others = [number() for _ in range(n - 1)]
    rest = code[place:]
    words = [int.from_bytes(rest[i : i + 4], "little") for i in range(0, len(rest) // 4 * 4, 4)]
    while words and not words[-1]:
        words.pop()
    state = 0
    for _ in range(2):
        state = state << 32 | words.pop() if words else state

    def pop(frequencies):
        nonlocal state
        low, high = state % 2**24, 0
        for symbol, f in enumerate(frequencies):
            if low < high + f:
                state = f * (state // 2**24) + low - high
                if state < 2**32 and words:
                    state = state << 32 | words.pop()
                return symbol
            high += f
        raise AssertionError

    def frequencies(counts):
        found = [2 + m * (2**24 - 2 * len(counts)) // sum(counts) for m in counts]
        found[counts.index(max(counts))] += 2**24 - sum(found)
        return found

    def run(counts, n):
        return [pop(frequencies(counts)) if len(counts) > 1 else 0 for _ in range(n)]

    rows = [1] * n_rows if counts[0] is None else run(counts[0], n_rows)
    columns = [1] * n_columns if counts[1] is None else run(counts[1], n_columns)
    whole = sum(r * r for r in rows) * sum(c * c for c in columns)
    symbols = np.full((n_rows, n_columns), common)
    where = []
    for r in sorted(set(rows) - {0}) if sum(others) else ():
        for c in sorted(set(columns) - {0}):
            p = min(max(2**16 * sum(others) * r * r * c * c // whole, 1), 2**16 - 1)
            cell = [(i, j) for i in range(n_rows) if rows[i] == r for j in range(n_columns) if columns[j] == c]
            where += [place for place in cell if pop([2**24 - 2**8 * p, 2**8 * p])]
    for place_of, symbol in zip(sorted(where), run(others, len(where)), strict=True):
        symbols[place_of] = symbol + (symbol >= common)
    assert state == 0 and not words
    return symbols.reshape(shape)


@pytest.mark.parametrize("name", SYMBOLS)
def test_codes_are_read_as_the_text_says(name):
    symbols = SYMBOLS[name]
    code = entropy.encode(symbols, int(symbols.max()) + 1)
    np.testing.assert_array_equal(entropy.decode(np.frombuffer(code, np.uint8)), symbols)
    np.testing.assert_array_equal(read_as_described(code), symbols)


@pytest.mark.parametrize("name", SYMBOLS)
def test_codes_are_as_short_as_the_entropy_of_their_counts(name):
    symbols = SYMBOLS[name]
    counts = np.unique(symbols, return_counts=True)[1]
    bits = -np.sum(counts * np.log2(counts / symbols.size))
    numbers = 2 * (int(symbols.max()) + 1) + 20  # bytes of counts and shape, at most
    longest = max(1.002 * bits / 8 + numbers + 8, symbols.size / 64)
    assert symbols.size / 64 <= len(entropy.encode(symbols, int(symbols.max()) + 1)) <= longest


def test_densities_of_rows_and_columns_are_worth_their_levels():
    """Half of the rows are dead: the others have the entropy of twice the density, for half of the entries."""
    rng = np.random.default_rng(0)
    is_alive = rng.random((800, 1)) < 0.5
    symbols = (is_alive & (rng.random((800, 400)) < 0.2)).astype(np.uint8)
    p = symbols[is_alive[:, 0]].mean()
    bits = -400 * is_alive.sum() * (p * np.log2(p) + (1 - p) * np.log2(1 - p)) + 800
    assert len(entropy.encode(symbols, 2)) < 1.02 * bits / 8


@jax.jit
def weights(w):
    """Stored weights of each type, and of codes of one plane and of two."""
    quantized = {name: jw.quantize(w, name) for name in ("mxfp4", "nf4")} | {"3 bits": jw.quantize(w, 3)}
    stack = jnp.arange(3 * 64 * 8).reshape(3, 64, 8) % 6 - 1
    clusters = jw.store_clusters(jnp.arange(5.0), stack, axes=jw.Axes(batch=0), has_zeros=True)
    half = w * (jnp.arange(64) % 4 < 2)[:, None]
    return quantized | {"clusters": clusters, "packed": jw.sparse.pack(half)}


def test_stored_weights_come_back_bit_for_bit(tmp_path):
    w = normal(64, 32)
    pruned = np.where(np.asarray(w) > 1, w, 0)
    arrays = [pruned.astype(t) for t in (np.float32, np.float64, np.float16, jnp.bfloat16)]
    mask, empty = pruned != 0, np.zeros((0, 5), bool)
    tree = {"layer": weights(jnp.asarray(pruned)), "l": arrays, "m": [mask, empty, np.ones(3, bool), np.array(0.0)]}
    tree["signs"] = [np.where(mask, -0.0, 0.0), np.packbits(mask)]
    files.save(tmp_path / "plain.safetensors", tree)
    files.save(tmp_path / PATH, tree, entropy_coding=True)
    assert_same(files.load(tmp_path / PATH), tree)
    plain, coded = (safetensors.read(tmp_path / name) for name in ("plain.safetensors", PATH))
    ours = json.loads(coded.metadata["jaxweights"])
    assert ours["version"] == 2 and {
        "l.0",
        "m.0",
        "signs.0",
        "layer.3 bits.words",
        "layer.clusters.words",
        "layer.mxfp4.words",
    } <= set(ours["coded"])
    assert set(coded.tensors) == set(plain.tensors)
    for name, tensor in coded.tensors.items():
        assert (
            tensor.nbytes < plain.tensors[name].nbytes
            if name in ours["coded"]
            else (tensor.tobytes() == plain.tensors[name].tobytes())
        ), name


def test_a_pruned_and_shared_weight_takes_the_bits_of_its_information(tmp_path):
    rng = np.random.default_rng(0)
    index = np.where(rng.random((400, 300)) < 0.05, rng.integers(16, size=(400, 300)), -1)
    w = jw.store_clusters(jnp.linspace(-1, 1, 16), jnp.asarray(index), has_zeros=True)
    files.save(tmp_path / PATH, {"w": w}, entropy_coding=True)
    p = np.mean(index >= 0)
    bits = index.size * (4 * p - p * np.log2(p) - (1 - p) * np.log2(1 - p))
    data = (tmp_path / PATH).read_bytes()
    size = len(data) - int.from_bytes(data[:8], "little") - 8 - w.codebook.nbytes
    assert bits / 8 - 100 < size < 1.01 * bits / 8 + 60
    assert_same(files.load(tmp_path / PATH), {"w": w})


def test_damaged_codes_are_refused_or_decoded_in_little_memory(tmp_path):
    w = jnp.where(jnp.arange(32) % 5 < 2, normal(64, 32), 0)
    index = jnp.arange(64 * 32).reshape(64, 32) * 7 % 11 - 1
    tree = {"k": jw.store_clusters(jnp.arange(10.0), index, has_zeros=True), "w": w, "m": np.asarray(w) != 0}
    files.save(tmp_path / PATH, tree, entropy_coding=True)
    valid, refused = parts((tmp_path / PATH).read_bytes()), 0
    for seed in range(100):
        data = damaged(valid, random.Random(seed))
        (tmp_path / PATH).write_bytes(data)
        tracemalloc.start()
        try:
            files.load(tmp_path / PATH)
        except ValueError as e:
            assert 10 < len(str(e)) < 2000
            refused += 1
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2**20 + 64 * 16 * len(data)
    assert refused > 50


def varints(*numbers):
    return b"".join(entropy._varint(number) for number in numbers)


BOMBS = {
    "a large shape": varints(2, 2**20, 2**20, 2, 0, 0, 0, 5),
    "a row of zeros": varints(1, 2**40, 1, 0, 0, 0),
    "an empty shape with a large axis": varints(2, 0, 2**40, 2, 0, 0, 0, 0),
    "a number without an end": b"\xff" * 30,
    "a large number": varints(1, 2**62, 2, 0, 0, 0, 0),
    "no axes": varints(0, 2, 0, 0, 0, 0),
    "too many axes": varints(65),
    "too many others": varints(1, 10, 2, 0, 0, 0, 11),
    "no symbols": varints(1, 10, 0, 0, 0, 0),
    "levels of other rows": varints(2, 10, 10, 2, 0, 1, 2, 4, 4, 0, 5),
    "too many levels": varints(2, 100, 100, 2, 0, 1, 65),
    "more levels than bytes": varints(2, 50, 50, 2, 0, 1, 50, *[1] * 50, 1, 50, *[1] * 50, 5),
    "nothing": b"",
    "no code": varints(1, 10, 2, 0, 0, 0, 4),
    "too much code": varints(1, 10, 1, 0, 0, 0) + bytes(8) + b"\1\0\0\0",
    "half a word": varints(1, 10, 1, 0, 0, 0) + b"\1\0",
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused(name):
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"\bit\b|\bits\b"):
        entropy.decode(np.frombuffer(BOMBS[name], np.uint8))
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("description", "said"),
    [
        (3, "the list of coded tensors"),
        ({"other": {"dtype": "bool"}}, "has no tensor 'other', of whose code it tells"),
        ({"w": {"dtype": "float32", "others": -1}}, "is no integer from 0"),
        ({"w": {"dtype": "float32", "others": 10**9}}, "is no integer from 0"),
        ({"w": {"dtype": "float32", "others": 3}}, "tensor 'w' is no entropy code"),
        ({"w": {"dtype": "int64"}}, "the description is"),
        ({"w": {"bits": 9}}, "is no integer from 1 to 8"),
        ({"w": "bits"}, "the description is 'bits'"),
    ],
    ids=str,
)
def test_descriptions_that_are_wrong_are_refused(tmp_path, description, said):
    files.save(tmp_path / PATH, {"w": np.eye(40, dtype=np.float32)}, entropy_coding=True)
    contents = safetensors.read(tmp_path / PATH)
    ours = json.loads(contents.metadata["jaxweights"]) | {"coded": description}
    pieces = [safetensors.Piece.of(contents.tensors)]
    safetensors.write(tmp_path / "n.safetensors", pieces, {"jaxweights": json.dumps(ours)})
    with pytest.raises(ValueError, match=said):
        files.load(tmp_path / "n.safetensors")


def test_without_the_package_errors_name_the_extra(tmp_path, monkeypatch):
    tree = {"w": np.eye(40, dtype=np.float32)}
    files.save(tmp_path / PATH, tree, entropy_coding=True)
    monkeypatch.setitem(sys.modules, "constriction", None)
    with pytest.raises(ImportError, match=r"jaxweights\[coding\]"):
        files.load(tmp_path / PATH)
    with pytest.raises(ImportError, match=r"jaxweights\[coding\]"):
        files.save(tmp_path / "n.safetensors", tree, entropy_coding=True)
    assert not (tmp_path / "n.safetensors").exists()
