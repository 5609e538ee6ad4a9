"""Trees and arguments that cannot be saved, and paths that cannot be loaded. For damaged files, see tests/files."""

import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from bad_input.vocabulary import KEY, T, V, W
from flax import nnx

import jaxweights as jw

FOLDER = tempfile.TemporaryDirectory()
HERE = Path(FOLDER.name)
OURS, GGUF = HERE / "m.safetensors", HERE / "m.gguf"
TREE = {"layer": {"kernel": W}}
HALVES = jw.formats.integers(4, block=32, scale="float16")
Q = jw.quantize(jnp.ones((64, 32)), HALVES)
TEXT = HERE / "text.safetensors"
TEXT.write_text("not a model, but a text")


def save(tree, path=OURS, **options):
    jw.files.save(path, tree, **options)


WIDE = jnp.linspace(-1, 1, 64 * 32).reshape(64, 32)
AWQ_STATS = jw.capture(lambda w, x: x @ w, WIDE, [jnp.eye(64)], second_moment=True)[""]
PACKED = jw.sparse.pack(W * (jnp.arange(4) < 2)[:, None])


def deep(n):
    return {"a": deep(n - 1)} if n else W


CASES = [
    # Paths.
    ("load a number", lambda: jw.files.load(3), T, "path must be a string or a Path, got int 3"),
    ("load another suffix", lambda: jw.files.load("m.bin"), V, "path must end in .safetensors, .gguf or"),
    ("load a text", lambda: jw.files.load(TEXT), V, "it is truncated, or no safetensors file"),
    ("metadata of a text", lambda: jw.files.metadata(TEXT), V, "it is truncated, or no safetensors file"),
    ("metadata of a number", lambda: jw.files.metadata(None), T, "path must be a string or a Path"),
    ("save to a number", lambda: save(TREE, 3), T, "path must be a string or a Path"),
    ("save to another suffix", lambda: save(TREE, "m.npz"), V, "path must end in .safetensors or .gguf, got 'm.npz'"),
    ("save to no folder", lambda: save(TREE, HERE / "a" / "m.gguf"), FileNotFoundError, "is no folder: make it first"),
    # Trees.
    ("save an array", lambda: save(W), T, "save {'weight': it}"),
    ("save None", lambda: save(None), T, "save {'weight': it}"),
    ("save a string", lambda: save({"a": "b"}), T, "the leaf 'a' must be an array, a QuantizedArray"),
    ("save a number", lambda: save({"a": {"b": 3.0}}), T, "the leaf 'a.b' must be an array"),
    ("save a set", lambda: save({"a": {1.0}}), T, "convert it with jnp.asarray"),
    ("save a key of JAX", lambda: save({"a": KEY}), T, "save jax.random.key_data(key)"),
    ("save a module", lambda: save(nnx.Linear(4, 2, rngs=nnx.Rngs(0))), T, "of a Flax NNX module nnx.state(module)"),
    ("save under jit", lambda: jax.jit(lambda w: save({"a": w}))(W), T, "is traced and has no values: save outside"),
    ("save a sparse array of JAX", lambda: save({"a": jw.sparse.to_bcoo(W)}), T, "a PackedArray or a BlockSparse"),
    ("save with a point in a key", lambda: save({"a": {"b.c": W}}), V, "the key 'b.c' at 'a' has a \".\""),
    ("save with keys of two kinds", lambda: save({"a": {0: W, "b": W}}), T, "keys of tree must be strings, got 0"),
    ("save with a tuple as key", lambda: save({("a", "b"): W}), T, "write them as strings"),
    ("save too deep a tree", lambda: save(deep(101)), V, "more than 100 levels deep"),
    ("save an int4", lambda: save({"a": jnp.zeros(2, jnp.int4)}), V, "'a' is of dtype int4, which safetensors has not"),
    ("save dates", lambda: save({"a": np.zeros(2, "M8[s]")}), V, "which safetensors has not"),
    ("save a query as GPTQ", lambda: save({"query": Q}, format="gptq"), V, "must be named 'weight' or 'kernel'"),
    ("save a kernel and a weight", lambda: save({"kernel": Q, "weight": Q}, format="gptq"), V, "two tensors would be"),
    # Options.
    ("save in an unknown format", lambda: save(TREE, format="q4"), V, "format must be None or one of 'gptq'"),
    ("save GGUF in a format", lambda: save(TREE, GGUF, format="gptq"), V, "format must be None for GGUF"),
    ("save GGUF entropy-coded", lambda: save(TREE, GGUF, entropy_coding=True), V, "entropy_coding is for safetensors"),
    ("save GPTQ entropy-coded", lambda: save(TREE, format="gptq", entropy_coding=True), V, "leave one out"),
    ("save with a number as entropy_coding", lambda: save(TREE, entropy_coding=1), T, "entropy_coding must be True"),
    ("save metadata of numbers", lambda: save(TREE, metadata={"a": 1}), T, "write str(it)"),
    ("save a list as metadata", lambda: save(TREE, metadata=["a"]), T, "metadata must be a dict with strings as keys"),
    ("save our own metadata", lambda: save(TREE, metadata={"jaxweights": "x"}), V, "which save writes itself"),
    ("save a dict in metadata of GGUF", lambda: save(TREE, GGUF, metadata={"a": {}}), V, "or a list or vector of such"),
    ("save a mixed list in GGUF", lambda: save(TREE, GGUF, metadata={"a": ["b", 1]}), V, "values of one type"),
    ("save complex numbers in GGUF", lambda: save(TREE, GGUF, metadata={"a": np.complex64(1)}), V, "dtype that GGUF"),
    ("save an alignment of 48", lambda: save(TREE, GGUF, metadata={"general.alignment": 48}), V, "a power of two"),
    # What a format cannot hold.
    (
        "save a packed weight as GPTQ",
        lambda: save({"kernel": PACKED}, format="gptq"),
        T,
        "gptq has only QuantizedArray",
    ),
    (
        "save NF4 as AWQ",
        lambda: save({"kernel": jw.quantize(WIDE, "nf4")}, format="awq"),
        V,
        "AWQ has integers: quantize with formats.integers",
    ),
    (
        "save a weight of AWQ as GPTQ",
        lambda: save({"kernel": jw.methods.AWQ(HALVES).fit(WIDE, AWQ_STATS)}, format="gptq"),
        V,
        "quantize with methods.GPTQ, or with methods.RoundToNearest after jaxweights.smooth",
    ),
    ("save f32 scales as GPTQ", lambda: save({"kernel": jw.quantize(WIDE, 4)}, format="gptq"), V, "scale='float16'"),
    ("save a packed weight in GGUF", lambda: save({"a": PACKED}, GGUF), T, "GGUF has none: save it as safetensors"),
    (
        "save clusters in GGUF",
        lambda: save({"a": jw.store_clusters(jnp.ones(2), jnp.zeros((4, 2), int))}, GGUF),
        T,
        "is a ClusteredArray, GGUF has none",
    ),
    ("save NF4 in GGUF", lambda: save({"a": jw.quantize(WIDE, "nf4")}, GGUF), V, "'mxfp4' for MXFP4"),
    ("save booleans in GGUF", lambda: save({"a": W > 0}, GGUF), V, "'a' is of dtype bool, which GGUF has not"),
    ("save five axes in GGUF", lambda: save({"a": jnp.ones((1,) * 5)}, GGUF), V, "at most 4 axes: reshape it"),
    ("save a long name in GGUF", lambda: save({"a" * 64: W}, GGUF), V, "a name in GGUF at most 63: shorten it"),
]
