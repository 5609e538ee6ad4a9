"""What is saved comes back bit for bit, under its name, and is plain to the safetensors package; a file is whole."""

import builtins
import dataclasses
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from files.oracles import assert_same, bits_of, halves, leaves, normal, oracle
from flax import nnx

import jaxweights as jw
from jaxweights import files
from jaxweights.core.axes import ATTENTION_IN
from jaxweights.files import safetensors
from jaxweights.techniques.quantization.scales import ScaleFormat, Scales

W = normal(64, 32)


def stored_weights():
    """A weight of every format, every field of `QuantizedArray`, and every way to be stored."""
    formats = jw.formats
    named = ["int2", "int3", "int4", "int5", "int6", "int7", "int8", "nf4", "fp4", "fp8_e4m3", "fp8_e5m2"]
    named += ["mxfp4", "mxfp8", "nvfp4", "ternary", "binary"]
    weights = jax.jit(lambda w: {name: jw.quantize(w, name) for name in named})(W)
    weights["double"] = jw.quantize(normal(300, 4), dataclasses.replace(formats.NF4_DOUBLE, block=16))
    weights["zero"] = jw.quantize(W, formats.integers(3, symmetric=False, block=24, scale="bfloat16"))
    weights["hqq"] = jw.quantize(W, formats.integers(4, symmetric=False, block=16), range=jw.ranges.HQQ(2))
    weights["tensor"] = jw.quantize(W, formats.integers(8, per_tensor=True))
    weights["stack"] = jw.quantize(normal(3, 64, 8), halves(4), axes=jw.Axes(batch=0))
    weights["attention"] = jw.quantize(normal(32, 2, 8), 4, axes=ATTENTION_IN)
    weights["grouped"] = jw.quantize(normal(3, 3, 4, 8), 8, axes=jw.Axes(groups=2))
    order = jnp.asarray(np.random.default_rng(0).permutation(64), jnp.int32)
    minimum = Scales(jnp.ones((4, 32), jnp.uint8), jnp.full((1, 32), 0.25), ScaleFormat("uint8", 4))
    all_fields = dataclasses.replace(jw.quantize(W, halves(4, 16)), order=order, minimum=minimum)
    weights["fields"] = dataclasses.replace(all_fields, input_scale=jnp.arange(64.0), dtype=jnp.dtype("bfloat16"))
    weights["packed"] = jw.sparse.pack(W * (jnp.arange(64) % 4 < 2)[:, None])
    index = jnp.arange(3 * 64 * 8).reshape(3, 64, 8) % 6
    weights["clusters"] = jw.store_clusters(jnp.arange(6.0), index, axes=jw.Axes(batch=0))
    weights["clusters and zeros"] = jw.store_clusters(normal(8, 6), index[0] - 1)
    weights["blocks"] = jw.sparse.pack_blocks(W * (jnp.arange(64) < 8)[:, None], block=(8, 8))
    return weights


def test_stored_weights_come_back_bit_for_bit(tmp_path):
    tree = {"layer": stored_weights(), "bias": jnp.arange(3.0)}
    files.save(tmp_path / "m.safetensors", tree)
    loaded = files.load(tmp_path / "m.safetensors")
    assert_same(loaded, tree)
    for a, b in zip(leaves(loaded), leaves(tree), strict=True):
        if hasattr(a, "todense"):
            assert (a.format == b.format and a.dtype == b.dtype) if hasattr(a, "format") else True
            assert (a.shape, a.axes) == (b.shape, b.axes)
    # Words of codes and scales, and no more: the file is as small as the weights.
    size = sum(a.nbytes for a in jax.tree.leaves(tree))
    header = int.from_bytes((tmp_path / "m.safetensors").read_bytes()[:8], "little")
    assert (tmp_path / "m.safetensors").stat().st_size == size + header + 8


def test_arrays_of_every_dtype_come_back_in_trees_of_any_kind(tmp_path):
    dtypes = ["f4", "f2", "i4", "i2", "i1", "u4", "u2", "u1", "?", ml_dtypes.bfloat16, "c8"]
    dtypes += [ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, ml_dtypes.float8_e8m0fnu]
    tree = {str(i): jnp.asarray(np.arange(3).astype(d)) for i, d in enumerate(dtypes)}
    tree |= {"wide": [np.arange(3), np.arange(3, dtype=np.uint64), np.pi * np.ones(2)]}
    tree |= {"empty": jnp.zeros((0, 3)), "scalar": jnp.float32(2.5), "none": None, "nothing": {}, "no list": []}
    tree |= {"pair": (jnp.ones(2), [jnp.ones(1), (jnp.ones(0),)]), "numbers": {0: jnp.ones(1), -3: {7: jnp.zeros(2)}}}
    tree |= {"mlp/~/linear_0": {"w b": jnp.ones(1)}, "ü": {"": jnp.ones(1)}}
    files.save(tmp_path / "m.safetensors", tree, metadata={"by": "me"})
    loaded = files.load(tmp_path / "m.safetensors")
    assert_same(loaded, tree)
    assert type(loaded["pair"]) is tuple and type(loaded["numbers"]) is dict
    assert [type(a) for a in loaded["wide"]] == [np.ndarray] * 3 and isinstance(loaded["0"], jax.Array)
    assert files.metadata(tmp_path / "m.safetensors")["by"] == "me"
    # Names that mean something in the formats of other tools mean nothing in a file of ours.
    tree = {"l": {"qweight": jnp.ones(1), "weight_packed": jnp.ones(2), "x_blocks": jnp.zeros((1, 1, 16), jnp.uint8)}}
    files.save(tmp_path / "m.safetensors", tree)
    assert_same(files.load(tmp_path / "m.safetensors"), tree)
    listed = [jnp.ones(1), {"a": jnp.ones(2)}]
    files.save(tmp_path / "m.safetensors", listed)
    assert_same(files.load(tmp_path / "m.safetensors"), listed)


def test_the_state_of_an_nnx_module_comes_back_for_update(tmp_path):
    def model(seed):
        rngs = nnx.Rngs(seed)
        return nnx.Sequential(nnx.Linear(8, 4, rngs=rngs), nnx.relu, nnx.BatchNorm(4, rngs=rngs))

    saved, other = model(0), model(1)
    saved(jnp.arange(24.0).reshape(3, 8))  # moves the running averages
    files.save(tmp_path / "m.safetensors", nnx.state(saved))
    loaded = files.load(tmp_path / "m.safetensors")
    assert_same(loaded, nnx.to_pure_dict(nnx.state(saved)))
    nnx.update(other, loaded)
    assert_same(nnx.to_pure_dict(nnx.state(other)), nnx.to_pure_dict(nnx.state(saved)))
    small = jw.nnx.compress(saved, [jnp.ones((2, 8))], jw.methods.RoundToNearest(4))
    files.save(tmp_path / "s.safetensors", nnx.state(small))
    kernel = files.load(tmp_path / "s.safetensors")["layers"][0]["kernel"]
    assert str(kernel.format) == "int4"
    np.testing.assert_array_equal(kernel.todense(), nnx.to_pure_dict(nnx.state(small))["layers"][0]["kernel"].todense())
    # Keys are no weights: the error says how to leave them out.
    saved = nnx.Sequential(nnx.Linear(8, 4, rngs=nnx.Rngs(0)), nnx.Dropout(0.5, rngs=nnx.Rngs(0)))
    with pytest.raises(TypeError, match=r"nnx.state\(module, nnx.Not\(nnx.RngState\)\)"):
        files.save(tmp_path / "s.safetensors", nnx.state(saved))
    files.save(tmp_path / "s.safetensors", nnx.state(saved, nnx.Not(nnx.RngState)))
    nnx.update(saved, files.load(tmp_path / "s.safetensors"))


def test_what_is_saved_is_plain_to_the_safetensors_package_and_what_it_saves_is_loaded(tmp_path):
    package = oracle("safetensors.numpy")
    tree = {"a": {"kernel": jw.quantize(W, "nf4"), "bias": jnp.arange(3, dtype=jnp.bfloat16)}}
    files.save(tmp_path / "m.safetensors", tree)
    read = package.load_file(tmp_path / "m.safetensors")
    assert set(read) == {"a.kernel.words", "a.kernel.scale.codes", "a.bias"}
    assert bits_of(read["a.kernel.words"]) == bits_of(tree["a"]["kernel"].words)
    assert read["a.bias"].tobytes() == np.asarray(tree["a"]["bias"]).tobytes()
    with oracle("safetensors").safe_open(tmp_path / "m.safetensors", "np") as file:
        described = json.loads(file.metadata()["jaxweights"])
    assert described["stored"]["a.kernel"]["format"]["block"] == 64
    arrays = {f"x.{i}.w": np.arange(6).reshape(2, 3).astype(d) for i, d in enumerate(["f4", "f2", "i4", "u1", "?"])}
    package.save_file(arrays, tmp_path / "n.safetensors", {"format": "np"})
    loaded = files.load(tmp_path / "n.safetensors")
    assert_same(loaded, {"x": {str(i): {"w": jnp.asarray(a)} for i, a in enumerate(arrays.values())}})
    assert files.metadata(tmp_path / "n.safetensors") == {"format": "np"}


def test_a_model_in_several_files(tmp_path):
    """Parts of one weight may lie in different files."""
    q = jw.quantize(W, halves(4))
    files.save(tmp_path / "one.safetensors", {"l": {"weight": q, "bias": jnp.ones(2)}}, format="gptq")
    tensors = safetensors.read(tmp_path / "one.safetensors").tensors
    shards = {"a.safetensors": ["l.qweight", "l.bias"], "b.safetensors": ["l.scales", "l.qzeros", "l.g_idx"]}
    for file, names in shards.items():
        safetensors.write(tmp_path / file, [safetensors.Piece.of({n: tensors[n] for n in names})], {})
    places = {n: file for file, names in shards.items() for n in names}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    for path in (tmp_path, tmp_path / "model.safetensors.index.json"):
        loaded = files.load(path)["l"]
        np.testing.assert_array_equal(loaded["weight"].astype(q.dtype).todense().T, q.todense())
        np.testing.assert_array_equal(loaded["bias"], jnp.ones(2))
    (tmp_path / "a.safetensors").unlink()
    with pytest.raises(FileNotFoundError):
        files.load(tmp_path)


def test_a_file_is_replaced_only_when_the_new_one_is_whole(tmp_path, monkeypatch):
    path = tmp_path / "m.safetensors"
    files.save(path, {"a": jnp.ones(2)})
    before = path.read_bytes()
    with pytest.raises(TypeError):
        files.save(path, {"a": jnp.zeros(2), "b": object()})

    def full(*args):
        raise OSError("no space left")

    for function in ("write_values", "replacing"):
        with monkeypatch.context() as patch:
            patch.setattr(safetensors, function, full)
            with pytest.raises(OSError, match="no space"):
                files.save(path, {"a": jnp.zeros(2)})
        assert path.read_bytes() == before
        assert [p.name for p in tmp_path.iterdir()] == [path.name]
    # What was loaded does not change with the file.
    loaded = files.load(path)
    files.save(path, {"a": jnp.zeros(2)})
    np.testing.assert_array_equal(loaded["a"], 1)
    np.testing.assert_array_equal(files.load(path)["a"], 0)


def test_tensors_are_made_one_at_a_time(tmp_path, monkeypatch):
    """Of three weights in the layout of another tool, no two are in memory: each is written before the next is made."""
    events = []
    write, gptq = safetensors.write_values, files.save.__globals__["_CODECS"]["gptq"]

    def made(what, q):
        events.append("make")
        return gptq.write(what, q)

    monkeypatch.setitem(files.save.__globals__["_CODECS"], "gptq", gptq._replace(write=made))
    monkeypatch.setattr(safetensors, "write_values", lambda *a: (events.append("write"), write(*a)))
    q = jw.quantize(W, halves(4))
    files.save(tmp_path / "m.safetensors", {name: {"kernel": q} for name in "abc"}, format="gptq")
    assert events == ["make"] * 3 + (["make"] + ["write"] * 4) * 3


def test_nothing_of_a_file_is_read_but_what_is_loaded(tmp_path, monkeypatch):
    """A tensor is looked at through the memory map: no call reads the file as a whole."""
    files.save(tmp_path / "m.safetensors", {"a": jnp.ones((64, 64))})

    def refuse(*args):
        raise AssertionError("read as a whole")

    monkeypatch.setattr(np, "fromfile", refuse)
    opened = []
    real = builtins.open
    monkeypatch.setattr(builtins, "open", lambda *a, **k: opened.append(real(*a, **k)) or opened[-1])
    assert safetensors.read(tmp_path / "m.safetensors").tensors["a"].base is not None
    assert [f.closed for f in opened] == [True]


def test_a_loaded_model_runs(tmp_path):
    """x @ q of loaded weights, in our own file and in one of another tool, is the product with the dense weight."""
    q = jw.quantize(W, halves(4, symmetric=False))
    files.save(tmp_path / "a.safetensors", {"l": {"kernel": q}})
    files.save(tmp_path / "b.safetensors", {"l": {"kernel": q}}, format="gptq_v2")
    kernel = files.load(tmp_path / "a.safetensors")["l"]["kernel"]
    weight = files.load(tmp_path / "b.safetensors")["l"]["weight"]
    x = normal(5, 64)
    expected = np.float64(x) @ np.float64(q.todense())
    assert weight.shape == (32, 64)
    products = jax.jit(lambda x, *weights: [x @ w for w in weights])(x, kernel, weight, weight.transpose((1, 0)))
    for y in products:
        np.testing.assert_allclose(y, expected, rtol=0, atol=2e-5 * np.abs(expected).max())
