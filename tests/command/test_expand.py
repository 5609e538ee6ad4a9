"""`jaxweights expand`: plain arrays, as `load` and `todense` give them, in the shapes of the original."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from files.oracles import bits_of, oracle

import jaxweights as jw
from jaxweights import files
from jaxweights.command.main import main


def stored_tree():
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.normal(size=(64, 32)), jnp.float32)
    return {
        "ints": {"kernel": jw.quantize(w, 4, block=32)},
        "list": [{"kernel": jw.quantize(w.astype(jnp.bfloat16), "nf4")}, {"bias": jnp.arange(4.0)}],
        "sparse": jw.sparse.pack(jnp.where(jw.magnitude_mask(w, (2, 4)), w, 0)),
        "ids": np.arange(3, dtype=np.int64),
        "half": w.astype(jnp.bfloat16),
    }


def run(path, out, *options):
    return main(["expand", str(path), "-o", str(out), *options])


def arrays_of(tree):
    """{name: array} of a tree, dense."""
    leaves = jax.tree_util.tree_leaves_with_path(jw.densify(tree))
    return {".".join(str(getattr(k, "key", getattr(k, "idx", k))) for k in keys): np.asarray(a) for keys, a in leaves}


def test_our_own_layout(tmp_path, capsys):
    tree = stored_tree()
    files.save(tmp_path / "small.safetensors", tree, metadata={"format": "pt"})
    assert run(tmp_path / "small.safetensors", tmp_path / "back.safetensors") == 0
    assert "6 arrays, 3 of them were stored" in capsys.readouterr().out
    back, dense = files.load(tmp_path / "back.safetensors"), jw.densify(tree)
    assert jax.tree.structure(back) == jax.tree.structure(dense)
    for name, a in arrays_of(dense).items():
        assert bits_of(arrays_of(back)[name]) == bits_of(a), name
    metadata = files.metadata(tmp_path / "back.safetensors")
    assert set(metadata) == {"format", "jaxweights"} and "stored" not in metadata["jaxweights"]

    assert run(tmp_path / "small.safetensors", tmp_path / "back.npz") == 0
    with np.load(tmp_path / "back.npz") as found:
        expected = arrays_of(tree)
        assert set(found.files) == set(expected)
        for name, a in expected.items():
            a = a.astype(np.float32) if a.dtype == jnp.bfloat16 else a
            assert bits_of(found[name]) == bits_of(a), name


def test_gguf_as_its_package_dequantizes(tmp_path):
    gguf, quants = oracle("gguf"), oracle("gguf.quants")
    weights = np.random.default_rng(0).normal(size=(6, 512)).astype(np.float32)
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "test")
    expected = {}
    for name in ("Q4_0", "Q8_0", "Q5_1"):
        kind = gguf.GGMLQuantizationType[name]
        blocks = quants.quantize(weights, kind)
        writer.add_tensor(f"blk.{name}.weight", blocks, raw_dtype=kind)
        expected[f"blk.{name}.weight"] = quants.dequantize(blocks, kind)
    writer.add_tensor("norm", np.arange(4, dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for suffix in ("npz", "gguf"):
        assert run(tmp_path / "model.gguf", tmp_path / f"back.{suffix}") == 0
    found = np.load(tmp_path / "back.npz")
    again = {t.name: t.data for t in gguf.GGUFReader(tmp_path / "back.gguf").tensors}
    for name, w in expected.items():
        np.testing.assert_array_equal(found[name], w)
        np.testing.assert_array_equal(again[name], w)
    assert found["norm"].dtype == np.float16
    assert files.metadata(tmp_path / "back.gguf")["general.architecture"] == "test"


def test_gptq_in_the_shape_that_the_file_has(tmp_path):
    w = jnp.asarray(np.random.default_rng(0).normal(size=(64, 32)), jnp.float32)
    q = jw.quantize(w, jw.formats.integers(4, block=32, scale="float16"))
    files.save(tmp_path / "gptq.safetensors", {"layer": {"kernel": q}}, format="gptq")
    assert run(tmp_path / "gptq.safetensors", tmp_path / "back.safetensors") == 0
    back = files.load(tmp_path / "back.safetensors")["layer"]["weight"]
    assert back.dtype == jnp.float16 and "quantization_config" not in files.metadata(tmp_path / "back.safetensors")
    np.testing.assert_array_equal(back.astype(jnp.float32).T, q.todense().astype(jnp.float16).astype(jnp.float32))


ORIGINALS = [
    '{"w": {"name": "v"}}',
    "3",
    "[1]",
    '{"w": 3}',
    '{"w": {"nam": "x"}}',
    '{"w": {"name": 3}}',
    '{"w": {"transposed": "no"}}',
    "{",
]


@pytest.mark.parametrize("original", [*ORIGINALS, '{"w": {"dtype": "object"}}', '{"w": {"dtype": "no dtype"}}'])
def test_hostile_metadata_is_an_error(original, tmp_path, capsys):
    path = tmp_path / "small.safetensors"
    files.save(path, {"w": jnp.eye(4), "v": jnp.eye(2)}, metadata={"jaxweights.original": original})
    assert run(path, tmp_path / "back.safetensors") == 2
    said = capsys.readouterr().err
    assert said.startswith("jaxweights expand: error: ") and said.count("\n") == 1
    assert "jaxweights.original" in said
    assert [p.name for p in tmp_path.iterdir()] == ["small.safetensors"]


def test_errors(tmp_path, capsys):
    path = tmp_path / "model.safetensors"
    files.save(path, {"a": jnp.eye(2)})
    (tmp_path / "there.npz").write_bytes(b"mine")
    for out, message in {
        "back.bin": "OUT must end in .safetensors, .gguf or .npz",
        "there.npz": "exists: give --force",
        "model.safetensors": "is FILE itself",
        "none/back.npz": "is no folder",
    }.items():
        assert run(path, tmp_path / out, *(["--force"] if "itself" in message else [])) == 2
        assert message in capsys.readouterr().err
    path.write_bytes(path.read_bytes()[:-1])
    assert run(path, tmp_path / "back.npz") == 2
    assert "truncated" in capsys.readouterr().err
    assert (tmp_path / "there.npz").read_bytes() == b"mine" and not (tmp_path / "back.npz").exists()
