"""Files and states that each release wrote are read by this one. Their values are formulas.

At a release, `PYTHONPATH=. python tests/files/test_kept.py VERSION` adds its files to the folder `kept`; VERSION is
MAJOR.MINOR. No file there is written anew.
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxweights as jw
from jaxweights import files

KEPT = Path(__file__).parent / "kept"
ROWS, COLUMNS = np.indices((32, 8))
STEPS = ((7 * ROWS + COLUMNS) % 15 - 7).astype(np.float32)  # -7 to 7 in every 16 rows of a column
E2M1 = np.float32([0, 0.5, 1, 1.5, 2, 3, 4, 6])
WEIGHTS = {
    "int4": 0.25 * STEPS,
    "zero": 0.5 * ((7 * ROWS + COLUMNS) % 16 - 3).astype(np.float32),
    "int8": 0.25 * np.where(ROWS == 0, 127, STEPS),
    "mxfp4": np.sign(STEPS) * E2M1[np.abs(STEPS).astype(int)],
    "two_of_four": np.where(ROWS % 4 < 2, STEPS, 0),
    "blocks": np.where(ROWS < 8, STEPS, 0),
    "clusters": np.float32([-1, 0, 0.5, 3])[(ROWS + COLUMNS) % 4],
}
"""Values that each way to store a weight holds exactly."""
W = np.float32(1 + ROWS - 2 * COLUMNS)
MASK = (ROWS + COLUMNS) % 2 == 0


def stored():
    """The weights, stored."""
    integers = jw.formats.integers
    w = {name: jnp.asarray(values) for name, values in WEIGHTS.items()}
    return {
        "int4": jw.quantize(w["int4"], integers(4, block=16)),
        "zero": jw.quantize(w["zero"], integers(4, symmetric=False, block=32)),
        "int8": jw.quantize(w["int8"], integers(8, block=32, scale="float16")),
        "mxfp4": jw.quantize(w["mxfp4"], "mxfp4"),
        "two_of_four": jw.sparse.pack(w["two_of_four"]),
        "blocks": jw.sparse.pack_blocks(w["blocks"], block=(8, 8)),
        "clusters": jw.store_clusters(jnp.float32([-1, 0, 0.5, 3]), jnp.asarray((ROWS + COLUMNS) % 4)),
    }


def arrays():
    """Arrays and a tree of every kind."""
    half = jnp.arange(4, dtype=jnp.bfloat16) / 2
    return {"half": half, "layers": [jnp.arange(3), (jnp.ones((2, 2)), None)], "by number": {7: jnp.uint8(255)}}


TRANSFORMS = {
    "mask": jw.Prune(0.5),
    "shared": jw.ShareWeights(4),
    "norm": jw.WeightNorm(),
    "steps": jw.LSQ(4),
    "spectral": jw.SpectralNorm(),
}


def states():
    """A state of each transform that has one."""
    vectors = TRANSFORMS["spectral"].init(jnp.asarray(W), jax.random.key(0))
    for _ in range(20):
        vectors = TRANSFORMS["spectral"].update(jnp.asarray(W), vectors)
    return {
        "mask": {"mask": jw.sparse.pack_mask(jnp.asarray(MASK))},
        "shared": {"index": jnp.asarray((ROWS + COLUMNS) % 4, jnp.int8)},
        "norm": {"scale": jnp.arange(1.0, 9.0)},
        "steps": {"scale": jnp.full(8, 0.5)},
        "spectral": vectors,
    }


def applied(name):
    """What the transform makes of W with that state."""
    if name == "mask":
        return np.where(MASK, W, 0)
    if name == "shared":
        groups = (ROWS + COLUMNS) % 4
        return np.float32([W[groups == i].mean() for i in range(4)])[groups]
    if name == "norm":
        return np.arange(1, 9) * W / np.linalg.norm(W, axis=0)
    if name == "steps":
        return 0.5 * np.clip(np.round(W / 0.5), -7, 7)
    return W / np.linalg.norm(W, 2)


def versions(ending):
    return sorted(path.name for path in KEPT.glob(f"*{ending}"))


def dense(leaf):
    return np.asarray(leaf.todense() if hasattr(leaf, "todense") else leaf, np.float32)


def check(path):
    """The names of the weights in a file, after a comparison of their values."""
    loaded = files.load(path)
    for name, leaf in loaded["weights"].items():
        np.testing.assert_array_equal(dense(leaf), WEIGHTS[name], err_msg=f"{path.name}, {name}")
    return set(loaded["weights"])


@pytest.mark.parametrize("name", versions("-weights.safetensors"))
def test_stored_weights_of_every_release_are_read(name):
    assert {"int4", "zero", "int8", "mxfp4", "two_of_four", "blocks"} <= check(KEPT / name)


@pytest.mark.parametrize("name", versions("-coded.safetensors"))
def test_coded_files_of_every_release_are_read(name):
    pytest.importorskip("constriction", reason="entropy coding needs constriction")
    assert check(KEPT / name) == set(WEIGHTS)


@pytest.mark.parametrize("name", versions(".gguf"))
def test_gguf_of_every_release_is_read(name):
    loaded = files.load(KEPT / name)
    np.testing.assert_array_equal(dense(loaded["int8"]), WEIGHTS["int8"].T)  # GGUF has outputs first
    np.testing.assert_array_equal(loaded["half"], [0, 0.5, 1, 1.5])


@pytest.mark.parametrize("name", versions("-arrays.safetensors"))
def test_trees_of_every_release_are_read(name):
    loaded = files.load(KEPT / name)
    assert jax.tree.structure(loaded) == jax.tree.structure(arrays())
    for got, wanted in zip(jax.tree.leaves(loaded), jax.tree.leaves(arrays()), strict=True):
        assert got.dtype == wanted.dtype
        np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("name", versions("-states.safetensors"))
def test_states_of_every_release_are_applied(name):
    loaded = files.load(KEPT / name)
    assert set(loaded) == set(TRANSFORMS)
    for kind, state in loaded.items():
        got = TRANSFORMS[kind].apply(jnp.asarray(W), state)
        np.testing.assert_allclose(got, applied(kind), rtol=1e-5, err_msg=kind)


def test_files_of_this_release_are_kept():
    minor = ".".join(jw.__version__.split(".")[:2])
    kinds = ("-weights.safetensors", "-coded.safetensors", "-arrays.safetensors", "-states.safetensors", ".gguf")
    assert not [kind for kind in kinds if not (KEPT / f"{minor}{kind}").exists()]


if __name__ == "__main__":
    KEPT.mkdir(exist_ok=True)
    start = KEPT / sys.argv[1]
    if versions(f"{start.name}-*"):
        sys.exit(f"the files of {start.name} are there")
    files.save(f"{start}-weights.safetensors", {"weights": stored()})
    files.save(f"{start}-coded.safetensors", {"weights": stored()}, entropy_coding=True)
    files.save(f"{start}-arrays.safetensors", arrays())
    files.save(f"{start}-states.safetensors", states())
    files.save(f"{start}.gguf", {"int8": stored()["int8"], "half": arrays()["half"]})
