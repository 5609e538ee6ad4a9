"""`jaxweights compress`: what is written is what the calls on a tree give, and what other tools read."""

import functools
import json
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from command.models import compress, torch_like
from files.oracles import bits_of, oracle

import jaxweights as jw
from jaxweights import files
from jaxweights.command import job
from jaxweights.command.main import main
from jaxweights.recipes import Recipe

OUT_IN = jw.Axes(input=-1, output=-2)


def kernels(tree):
    return {f"{i}.{name}": layer[name]["weight"] for i, layer in tree["layers"].items() for name in ("up", "down")}


def assert_kept(loaded, tree):
    """Checks that all but the matrices of the layers, and the embedding, is as it was, bit for bit."""
    assert bits_of(loaded["ids"]) == bits_of(tree["ids"])
    for i, layer in tree["layers"].items():
        for path in (("up", "bias"), ("down", "bias"), ("norm", "weight")):
            assert bits_of(loaded["layers"][i][path[0]][path[1]]) == bits_of(layer[path[0]][path[1]])


def assert_same(stored, other):
    assert stored.format == other.format
    assert stored.shape == other.shape
    assert jax.tree.all(jax.tree.map(np.array_equal, stored, other))


@functools.partial(jax.jit, static_argnums=1)
def by_hand(tree, format):
    return {name: jw.quantize(w, format, axes=OUT_IN) for name, w in kernels(tree).items()}


def test_a_recipe_does_what_the_calls_do(model, tmp_path, capsys):
    tree, out = torch_like(), tmp_path / "small.safetensors"
    text = """
[[rules]]
weights = "embed*"
bits = 8

[[rules]]
weights = "*.0.down.*"
prune = 0.5

[[rules]]
weights = "*"
prune = "2:4"
bits = 4
block = 32
symmetric = false
scale = "float16"

[output]
to = "jaxweights"
"""
    (tmp_path / "recipe.toml").write_text(text)
    assert compress(model, "-o", out, "--recipe", tmp_path / "recipe.toml") == 0
    loaded = files.load(out)
    assert_kept(loaded, tree)

    @jax.jit
    def expected():
        format = jw.formats.integers(4, block=32, symmetric=False, scale="float16")
        pruned = {name: jnp.where(jw.magnitude_mask(w, (2, 4), axes=OUT_IN), w, 0) for name, w in kernels(tree).items()}
        halved = tree["layers"]["0"]["down"]["weight"]
        halved = jnp.where(jw.magnitude_mask(halved, 0.5, axes=OUT_IN), halved, 0)
        embedding = jw.quantize(tree["embed_tokens"]["weight"], 8, axes=OUT_IN)
        return {name: jw.quantize(w, format, axes=OUT_IN) for name, w in pruned.items()}, halved, embedding

    quantized, halved, embedding = expected()
    assert_same(loaded["embed_tokens"]["weight"], embedding)
    np.testing.assert_array_equal(loaded["layers"]["0"]["down"]["weight"], halved)
    found = kernels(loaded)
    for name in ("0.up", "1.up", "1.down"):
        assert_same(found[name], quantized[name])

    metadata = files.metadata(out)
    assert Recipe.parse(metadata["jaxweights.recipe"]) == Recipe.parse(text)
    assert metadata["format"] == "pt"
    said = capsys.readouterr().out
    for name, w, new in [
        ("embed_tokens.weight", tree["embed_tokens"]["weight"], embedding.todense()),
        ("layers.0.down.weight", tree["layers"]["0"]["down"]["weight"], halved),
    ]:
        w, new = np.float64(w), np.float64(new)
        error = np.linalg.norm(new - w) / np.linalg.norm(w)
        row = re.search(rf"{name}.* ([\d.]+) kB +[\d.]+ kB +[\d.]+× +([\d.]+)% +([\d.]+) dB", said)
        assert float(row[1]) == pytest.approx(4 * w.size / 1000, rel=5e-3)
        assert float(row[2]) == pytest.approx(100 * error, abs=0.0051)
        assert float(row[3]) == pytest.approx(-20 * np.log10(error), abs=0.051)
    assert "6 tensors" in said and "a vector" in said and "int64" in said

    # The recipe of a result does the same again, and the spool is gone.
    assert compress(model, "-o", tmp_path / "again.safetensors", "--recipe", out) == 0
    assert (tmp_path / "again.safetensors").read_bytes() == out.read_bytes()
    assert {p.name for p in tmp_path.iterdir()} == {
        "model.safetensors",
        "recipe.toml",
        "small.safetensors",
        "again.safetensors",
    }


def test_integers(model, tmp_path):
    tree, out = torch_like(), tmp_path / "small.safetensors"
    assert compress(model, "-o", out, "--bits", 4, "--block", 32) == 0
    loaded = files.load(out)
    assert_kept(loaded, tree)
    assert bits_of(loaded["embed_tokens"]["weight"]) == bits_of(tree["embed_tokens"]["weight"])
    expected = by_hand(tree, jw.formats.integers(4, block=32))
    for name, w in kernels(loaded).items():
        np.testing.assert_array_equal(w.todense(), expected[name].todense(), err_msg=name)
    config = json.loads(files.metadata(out)["quantization_config"])
    (group,) = config["config_groups"].values()
    assert sorted(group["targets"]) == sorted(f"layers.{i}.{name}" for i in range(2) for name in ("up", "down"))


def test_the_name_of_integers_is_their_bits(model, tmp_path):
    for suffix, options in (("bits", ["--bits", "4"]), ("name", ["--format", "INT4", "--to", "Compressed-Tensors"])):
        assert compress(model, "-o", tmp_path / f"{suffix}.safetensors", *options) == 0
    contents = {s: files.load(tmp_path / f"{s}.safetensors") for s in ("bits", "name")}
    jax.tree.map(np.testing.assert_array_equal, *contents.values())
    config = json.loads(files.metadata(tmp_path / "name.safetensors")["quantization_config"])
    assert config["quant_method"] == "compressed-tensors"
    assert compress(model, "-o", tmp_path / "name.safetensors", "--format", "int4", "--force") == 0
    assert (tmp_path / "name.safetensors").read_bytes() == (tmp_path / "bits.safetensors").read_bytes()


def test_who_reads_the_output(model, tmp_path, capsys):
    files.save(tmp_path / "llama.gguf", torch_like(), metadata={"general.architecture": "llama"})
    for path, out, bits, readers in (
        (model, "small.safetensors", 4, "vLLM, transformers and jaxweights."),
        (model, "odd.safetensors", 5, "compressed-tensors and jaxweights."),
        (tmp_path / "llama.gguf", "small.gguf", 4, "the reader of llama.cpp's tools and jaxweights."),
        (model, "bare.gguf", 4, "jaxweights. It has no general.architecture, without which llama.cpp loads no model."),
    ):
        assert compress(path, "-o", tmp_path / out, "--bits", bits) == 0
        assert capsys.readouterr().out.split("read by ")[1].splitlines()[0].endswith(readers), out


def test_nf4_of_some(model, tmp_path):
    out = tmp_path / "small.safetensors"
    assert compress(model, "-o", out, "--format", "nf4", "--where", "*up*") == 0
    loaded, expected = kernels(files.load(out)), by_hand(torch_like(), "nf4")
    for name, w in kernels(torch_like()).items():
        if name.endswith("up"):
            np.testing.assert_array_equal(loaded[name].todense(), expected[name].todense(), err_msg=name)
        else:
            assert bits_of(loaded[name]) == bits_of(w)


@pytest.mark.slow
def test_other_tools_read_the_weights(model, tmp_path):
    """The packages take long to import."""
    out = tmp_path / "small.safetensors"
    assert compress(model, "-o", out, "--bits", 4, "--block", 32) == 0
    (group,) = json.loads(files.metadata(out)["quantization_config"])["config_groups"].values()
    expected = by_hand(torch_like(), jw.formats.integers(4, block=32))
    torch, ct = oracle("torch"), oracle("compressed_tensors.quantization")
    compressor = oracle("compressed_tensors.compressors.pack_quantized.base").PackedQuantizationCompressor
    load_file = oracle("safetensors.torch").load_file
    tensors, scheme = (
        load_file(out),
        ct.QuantizationScheme(targets=["Linear"], weights=ct.QuantizationArgs(**group["weights"])),
    )
    for name, q in expected.items():
        parts = {key.rpartition(".")[2]: t for key, t in tensors.items() if key.startswith(f"layers.{name}.weight_")}
        got = compressor.decompress(parts, scheme)["weight"].to(torch.float32).numpy()
        np.testing.assert_allclose(got, q.todense(), rtol=1e-6, err_msg=name)

    assert compress(model, "-o", out, "--format", "nf4", "--where", "*up*", "--force") == 0
    bnb, tensors = oracle("bitsandbytes.functional"), load_file(out)
    assert "layers.0.down.weight.absmax" not in tensors
    expected = by_hand(torch_like(), "nf4")
    for name in ("0.up", "1.up"):
        base = f"layers.{name}.weight"
        state = {key.removeprefix(f"{base}."): t for key, t in tensors.items() if key.startswith(f"{base}.")}
        got = bnb.dequantize_4bit(tensors[base], bnb.QuantState.from_dict(state, device="cpu"))
        np.testing.assert_allclose(got.numpy(), expected[name].todense(), rtol=1e-6, atol=1e-7)


def test_gguf_is_read_by_its_package(tmp_path):
    tree = torch_like()
    files.save(tmp_path / "model.gguf", tree, metadata={"general.name": "small", "block_count": 2})
    out = tmp_path / "small.gguf"
    assert compress(tmp_path / "model.gguf", "-o", out, "--bits", 8) == 0
    assert files.metadata(out)["general.name"] == "small" and files.metadata(out)["block_count"] == 2
    gguf, quants = oracle("gguf"), oracle("gguf.quants")
    found = {t.name: t for t in gguf.GGUFReader(out).tensors}
    expected = by_hand(tree, jw.formats.integers(8, block=32, scale="float16"))
    for name, q in expected.items():
        t = found[f"layers.{name}.weight"]
        assert t.tensor_type == gguf.GGMLQuantizationType.Q8_0
        np.testing.assert_array_equal(quants.dequantize(t.data, t.tensor_type), q.todense(), err_msg=name)
    np.testing.assert_array_equal(found["layers.1.norm.weight"].data, tree["layers"]["1"]["norm"]["weight"])
    assert found["embed_tokens.weight"].tensor_type == gguf.GGMLQuantizationType.Q8_0  # llama.cpp quantizes it too


def test_kernels_of_flax_and_stacks(tmp_path, capsys):
    rng = np.random.default_rng(0)
    kernel, stack = rng.normal(size=(64, 32)).astype("f4"), rng.normal(size=(3, 64, 32)).astype(jnp.bfloat16)
    tree = {
        "dense": {"kernel": kernel},
        "list": [{"experts": stack}],
        "conv": {"kernel": rng.normal(size=(3, 3, 4, 8))},
    }
    files.save(tmp_path / "model.safetensors", tree)
    (tmp_path / "recipe.toml").write_text(
        '[[rules]]\nweights = "*experts"\nformat = "mxfp4"\ninput = -2\n'
        '[[rules]]\nweights = "dense*"\nformat = "mxfp4"\n'
    )
    out = tmp_path / "small.safetensors"
    assert compress(tmp_path / "model.safetensors", "-o", out, "--recipe", tmp_path / "recipe.toml") == 0
    loaded = files.load(out)
    assert bits_of(loaded["conv"]["kernel"]) == bits_of(tree["conv"]["kernel"])
    assert "no rule" in capsys.readouterr().out
    for got, w in ((loaded["dense"]["weight"], kernel), (loaded["list"][0]["experts"], stack)):
        expected = jw.quantize(w, "mxfp4", axes=jw.Axes(-2, -1, batch=tuple(range(w.ndim - 2)))).todense()
        np.testing.assert_array_equal(got.astype(expected.dtype).todense().swapaxes(-1, -2), expected)
    # Expanded, they have their names, shapes and dtypes again.
    assert main(["expand", str(out), "-o", str(tmp_path / "back.safetensors")]) == 0
    back = files.load(tmp_path / "back.safetensors")
    shapes = lambda tree: jax.tree.map(lambda a: (a.shape, str(a.dtype)), tree)
    assert shapes(back) == shapes(tree)


def test_clusters_entropy_coded(model, tmp_path):
    oracle("constriction")
    tree, options = torch_like(), ["--prune", "0.75", "--cluster", "16", "--where", "*.up.weight"]
    assert compress(model, "-o", tmp_path / "plain.safetensors", *options) == 0
    assert compress(model, "-o", tmp_path / "coded.safetensors", *options, "--entropy-coding") == 0
    plain, coded = (files.load(tmp_path / f"{name}.safetensors") for name in ("plain", "coded"))
    jax.tree.map(np.testing.assert_array_equal, coded, plain)
    weights = {name: {"weight": w} for name, w in kernels(tree).items() if name.endswith("up")}
    layout = {f"{name}/weight": OUT_IN for name in weights}
    methods = (jw.methods.Magnitude(0.75), jw.methods.Cluster(16, keep_zeros=True))
    expected = jw.one_shot(weights, methods, layout=layout)
    for name, w in expected.items():
        got = np.asarray(kernels(plain)[name].todense())
        np.testing.assert_array_equal(got, w["weight"].todense())
        assert len(np.unique(got)) == 16 and np.mean(got == 0) == 0.75
    # Codes take 4 bits; their entropy is that of zeros or not, and less than 4 bits for a quarter of them.
    n = sum(w["weight"].size for w in weights.values())
    sizes = [(tmp_path / f"{name}.safetensors").stat().st_size for name in ("plain", "coded")]
    assert sizes[0] - sizes[1] > n * (4 - 0.8113 - 0.25 * 4) / 8 - 1000
    assert main(["expand", str(tmp_path / "coded.safetensors"), "-o", str(tmp_path / "back.safetensors")]) == 0
    back = files.load(tmp_path / "back.safetensors")
    np.testing.assert_array_equal(kernels(back)["1.up"], kernels(plain)["1.up"].todense())


def test_npz_of_bfloat16_scales(tmp_path):
    w = np.random.default_rng(0).normal(size=(8, 64)).astype("f4")
    np.savez(tmp_path / "model.npz", **{"up.weight": w, "up.bias": w[:, 0]})
    (tmp_path / "r.toml").write_text('[[rules]]\nweights = "up*"\nbits = 8\nscale = "bfloat16"\n')
    out = tmp_path / "small.safetensors"
    assert compress(tmp_path / "model.npz", "-o", out, "--recipe", tmp_path / "r.toml") == 0
    q = jw.quantize(w, jw.formats.integers(8, scale="bfloat16"), axes=OUT_IN)
    assert main(["expand", str(out), "-o", str(tmp_path / "back.npz")]) == 0
    with np.load(tmp_path / "back.npz") as back:
        assert back["up.weight"].dtype == np.float32  # as it was, though the scales are coarser
        np.testing.assert_array_equal(back["up.weight"], q.todense().astype(jnp.bfloat16).astype("f4"))
        np.testing.assert_array_equal(back["up.bias"], w[:, 0])


def test_a_folder_becomes_a_folder(model, tmp_path):
    folder = tmp_path / "model"
    (folder / "more").mkdir(parents=True)
    model.rename(folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "bert"}')
    (folder / "more" / "vocab.txt").write_text("a\nb\n")
    (folder / "pytorch_model.bin").write_bytes(b"weights")
    assert compress(folder, "-o", tmp_path / "small", "--bits", 8) == 0
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    assert config["model_type"] == "bert" and config["quantization_config"]["quant_method"] == "compressed-tensors"
    assert (tmp_path / "small" / "more" / "vocab.txt").read_text() == "a\nb\n"
    assert not (tmp_path / "small" / "pytorch_model.bin").exists()
    assert set(files.load(tmp_path / "small")) == set(torch_like())
    before = (tmp_path / "small" / "model.safetensors").read_bytes()
    assert compress(folder, "-o", tmp_path / "small", "--bits", 8) == 2
    assert compress(folder, "-o", tmp_path / "small", "--bits", 4, "--force") == 0
    assert (tmp_path / "small" / "model.safetensors").read_bytes() != before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "small"]


# Errors.

BITS = ["--bits", "4"]
DEEP = "rules = " + 10_000 * "["
ERRORS = {
    "nothing to do": ([], "give --recipe, --prune"),
    "no file": ([*BITS], "no such file"),
    "recipe and more": (["--recipe", "r.toml", *BITS], "--recipe has the rules, so --bits has no place"),
    "no recipe": (["--recipe", "none.toml"], "none.toml"),
    "a file without one": (["--recipe", "model.safetensors"], "has no recipe"),
    "a recipe nested too deeply": (["--recipe", "deep.toml"], "deep.toml: the recipe is nested too deeply"),
    "one in a file": (["--recipe", "deep.safetensors"], "the recipe in deep.safetensors: the recipe is nested too"),
    "prune": (["--prune", "50"], "must be in [0, 1), got 50.0: write 0.5 for 50%"),
    "nothing matches": ([*BITS, "--where", "decoder*"], "matches nothing"),
    "nothing changes": ([*BITS, "--where", "*bias"], "the recipe changes nothing"),
    "layout": ([*BITS, "--to", "onnx"], "to must be one of"),
    "layout for nf4": (["--format", "nf4", "--to", "compressed-tensors"], "does not hold what format = 'nf4' makes"),
    "gguf name": ([*BITS, "--to", "gguf"], "must end in .gguf"),
    "coding for others": ([*BITS, "--entropy-coding", "--to", "compressed-tensors"], "entropy_coding is for"),
    "bits of gguf": (["--bits", "3", "-o", "small.gguf"], "bits = 4, 5 or 8"),
    "other suffix": ([*BITS, "-o", "small.bin"], "must end in .safetensors or .gguf"),
    "no folder": ([*BITS, "-o", "none/small.safetensors"], "is no folder: make it first"),
    "exists": ([*BITS, "-o", "there.safetensors"], "there.safetensors exists: give --force"),
    "itself": ([*BITS, "-o", "model.safetensors", "--force"], "is FILE itself"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case, model, tmp_path, monkeypatch, capsys):
    options, message = ERRORS[case]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.toml").write_text("[[rules]]\nweights = '*'\nbits = 4\n")
    (tmp_path / "deep.toml").write_text(DEEP)
    files.save(tmp_path / "deep.safetensors", {}, metadata={"jaxweights.recipe": DEEP})
    (tmp_path / "there.safetensors").write_bytes(b"mine")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    out = [] if "-o" in options else ["-o", "small.safetensors"]
    assert compress("none.safetensors" if case == "no file" else "model.safetensors", *options, *out) == 2
    said = capsys.readouterr()
    assert message in said.err and said.err.count("\n") == 1 and said.out == ""
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_errors_of_weights(tmp_path, capsys):
    path, out = tmp_path / "model.safetensors", tmp_path / "small.safetensors"
    files.save(path, {"a": {"weight": np.full((4, 4), np.nan, "f4")}})
    assert compress(path, "-o", out, *BITS) == 2
    assert "'a.weight' has weights that are not finite" in capsys.readouterr().err
    files.save(path, {"a": {"weight": jw.quantize(jnp.eye(8), 4)}})
    assert compress(path, "-o", out, *BITS) == 2
    assert "make plain arrays of them first, with jaxweights expand" in capsys.readouterr().err
    path.write_bytes(path.read_bytes()[:-3])
    assert compress(path, "-o", out, *BITS) == 2
    assert "truncated" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


CONFIGS = {"": "config.json is no JSON", "[1]": "config.json must be a JSON object, got list", 9999 * "[": "is no JSON"}


@pytest.mark.parametrize("config", CONFIGS, ids=["empty", "list", "deep"])
def test_errors_of_config_json(config, model, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "model"
    folder.mkdir()
    model.rename(folder / "model.safetensors")
    (folder / "config.json").write_text(config)
    monkeypatch.setattr(job, "_made", lambda *_: pytest.fail("a weight was made before config.json was read"))
    assert compress(folder, "-o", tmp_path / "small", *BITS) == 2
    assert CONFIGS[config] in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_what_a_layout_lacks_has_a_remedy(tmp_path, capsys):
    rng, path, out = np.random.default_rng(0), tmp_path / "model.npz", tmp_path / "small.safetensors"
    np.savez(path, **{"conv.weight": rng.normal(size=(8, 4, 3, 3)).astype("f4")})
    assert compress(path, "-o", out, *BITS) == 2
    assert "4 axes, compressed-tensors has matrices): give --to jaxweights" in capsys.readouterr().err
    assert compress(path, "-o", out, *BITS, "--to", "jaxweights") == 0
    np.savez(path, **{"up.weight": rng.normal(size=(8, 4)), "ids": np.arange(4).reshape(2, 2)})
    assert compress(path, "-o", out, *BITS, "--force") == 2
    err = capsys.readouterr().err
    assert "float64: save it as float32" in err and "--to" not in err


def test_a_folder_that_is_not_writable(model, tmp_path, monkeypatch, capsys):
    def refused(path, *_):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "mkdir", refused)
    assert compress(model, "-o", tmp_path / "small.safetensors", *BITS) == 2
    assert capsys.readouterr().err.endswith(f"error: {tmp_path / 'small.safetensors'}: Permission denied\n")


def test_a_full_disk_leaves_no_output(model, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device", "small")

    from jaxweights.files import safetensors

    monkeypatch.setattr(safetensors, "write_values", full)
    assert compress(model, "-o", tmp_path / "small.safetensors", *BITS) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
