"""Damaged files: what is wrong is told by a ValueError that names the file or the tensor."""

import dataclasses
import json
import struct

import jax.numpy as jnp
import numpy as np
import pytest
from files.damage import with_header
from files.oracles import halves, normal

import jaxweights as jw
from jaxweights import files
from jaxweights.files import safetensors
from jaxweights.files.writing import Piece

W = normal(64, 32)
Q = jw.quantize(W, halves(4, symmetric=False))
TREE = {"l": {"kernel": Q, "bias": jnp.arange(3.0)}}


def saved(folder, tree=TREE, suffix="safetensors", **options):
    files.save(folder / f"m.{suffix}", tree, **options)
    return folder / f"m.{suffix}"


def header(path, change):
    path.write_bytes(with_header(path.read_bytes(), change))
    return path


def entry(name, **fields):
    """Changes the entry of a tensor in a header; None leaves out what has this name."""

    def change(header):
        new = {**header[name], **fields}
        return {**header, name: {k: v for k, v in new.items() if v is not None}}

    return change


def ours(change):
    """Changes the description of the stored weights."""

    def of(header):
        described = json.loads(header["__metadata__"]["jaxweights"])
        change(described["stored"]["l.kernel"], described)
        return {**header, "__metadata__": {"jaxweights": json.dumps(described)}}

    return of


SAFETENSORS = {
    "overlap": (
        lambda h: entry("l.kernel.zero", data_offsets=h["l.bias"]["data_offsets"])(h),
        "'l.kernel.zero' has 12",
    ),
    "shared bytes": (
        lambda h: entry("l.kernel.scale.codes", data_offsets=[0, 128])(entry("l.kernel.words", shape=[1])(h)),
        "'l.kernel.words' has 1024 bytes",
    ),
    "beyond the end": (entry("l.bias", data_offsets=[9**9, 9**9 + 12]), "'l.bias' ends at byte"),
    "negative offset": (entry("l.bias", data_offsets=[-12, 0]), "'l.bias': data_offsets must be 0 <= begin"),
    "no list": (entry("l.bias", data_offsets="0"), "'l.bias': data_offsets must be two integers"),
    "floats": (entry("l.bias", data_offsets=[0.0, 12.0]), "'l.bias': data_offsets must be two integers"),
    "negative size": (entry("l.bias", shape=[-3]), "'l.bias': the shape must be"),
    "huge shape": (entry("l.bias", shape=[0, 2**63]), "'l.bias': no array has the shape"),
    "many axes": (entry("l.bias", shape=[1] * 65), "'l.bias': the shape must be"),
    "boolean size": (entry("l.bias", shape=[True]), "'l.bias': the shape must be"),
    "unknown dtype": (entry("l.bias", dtype="F7"), "'l.bias' has the dtype 'F7'"),
    "other dtype": (entry("l.bias", dtype="F64"), "'l.bias' has 12 bytes, its shape"),
    "no dtype": (entry("l.bias", dtype=None), "'l.bias' must have a dtype"),
    "missing scale": (lambda h: {k: v for k, v in h.items() if "scale" not in k}, "the file is damaged"),
    "renamed scale": (
        lambda h: {k.replace("scale", "scales"): v for k, v in h.items()},
        "'l.kernel' has no tensor 'scale.codes'",
    ),
    "integers for scales": (entry("l.kernel.scale.codes", dtype="I16"), "'scale.codes' is of dtype int16, not float16"),
    "other metadata": (lambda h: {**h, "__metadata__": {"a": 1}}, "__metadata__ must map strings to strings"),
    "no tensor": (lambda h: {**h, "l.bias": 3}, "'l.bias' must have a dtype, a shape and data_offsets, got 3"),
    "a list": (lambda h: [h], "must be a JSON object, got list"),
    "tensor below another": (
        lambda h: {k.replace("l.bias", "l.kernel.b.c"): v for k, v in h.items()},
        "'l.kernel.b.c' lies below another tensor, at 'kernel'",
    ),
    "taken name": (
        lambda h: {k.replace("l.bias", "l.kernel"): v for k, v in h.items()},
        "tensor 'l.kernel', and others",
    ),
    "unknown type": (ours(lambda q, _: q.update(type="Set")), "the type 'Set' is not known"),
    "unknown grid": (ours(lambda q, _: q["format"]["grid"].update(kind="x")), "the grid 'x' is not known"),
    "more bits": (ours(lambda q, _: q["format"]["grid"].update(bits=5, low=None)), "'words' has shape (8, 32)"),
    "smaller block": (ours(lambda q, _: q["format"].update(block=8)), "'scale.codes' has shape (2, 32)"),
    "other shape": (ours(lambda q, _: q["layer"].update(shape=[32, 32])), "'words' has shape (8, 32)"),
    "the same axis twice": (ours(lambda q, _: q["layer"]["axes"].update(input=[-1])), "as both input and output"),
    "axes from the front": (
        ours(lambda q, _: q["layer"]["axes"].update(input=[0])),
        "axes must be counted from the end",
    ),
    "another field": (ours(lambda q, _: q["format"].update(x=1)), "unexpected keyword argument 'x'"),
    "no layer": (ours(lambda q, _: q.pop("layer")), "it has no 'layer'"),
    "code object as dtype": (ours(lambda q, _: q.update(dtype="object")), "'object' is no dtype of a weight"),
    "newer version": (ours(lambda _, all: all.update(version=3)), "is of version 3"),
    "a list that is none": (ours(lambda _, all: all.update(nodes={"l": "list"})), "the metadata calls 'l' a list"),
    "unknown kind": (ours(lambda _, all: all.update(nodes={"l": "set"})), "the kinds of nodes must be"),
}


@pytest.mark.parametrize(("change", "message"), SAFETENSORS.values(), ids=SAFETENSORS)
def test_a_lying_header_of_safetensors(change, message, tmp_path):
    with pytest.raises(ValueError) as info:
        files.load(header(saved(tmp_path), change))
    assert message in str(info.value)


def test_clusters_that_are_not_as_described(tmp_path):
    """A code without a value is refused, in whichever matrix of a stack it is."""
    stack = jw.store_clusters(jnp.arange(5.0), jnp.arange(144).reshape(2, 24, 3) % 6 - 1, axes=jw.Axes(batch=0))
    files.save(tmp_path / "m.safetensors", {"l": {"kernel": stack}})
    valid = (tmp_path / "m.safetensors").read_bytes()
    beyond = dataclasses.replace(stack, words=stack.words.at[1, 0, 2].set(-1))
    for change, message in (
        (ours(lambda q, _: q.update(has_zeros=False)), "'words' has the code 5, of 5 values"),
        (ours(lambda q, _: q.update(has_zeros=1)), "has_zeros is '1', neither true nor false"),
        (ours(lambda q, _: q.pop("has_zeros")), "it has no 'has_zeros'"),
        (ours(lambda q, _: q["layer"].update(shape=[24, 4])), "'words' has shape (2, 3, 3)"),
        (entry("l.kernel.codebook", shape=[2, 1, 5]), "'codebook' has shape (2, 1, 5)"),
        (entry("l.kernel.codebook", dtype="I32"), "of dtype int32, not floating-point"),
        (lambda h: {k: v for k, v in h.items() if "codebook" not in k}, "the file is damaged"),
    ):
        (tmp_path / "m.safetensors").write_bytes(valid)
        with pytest.raises(ValueError) as info:
            files.load(header(tmp_path / "m.safetensors", change))
        assert message in str(info.value)
    files.save(tmp_path / "m.safetensors", {"l": {"kernel": beyond}})
    with pytest.raises(ValueError, match="'words' has the code 7, of 6 values"):
        files.load(tmp_path / "m.safetensors")


def test_bytes_that_are_no_safetensors(tmp_path):
    path = saved(tmp_path)
    valid = path.read_bytes()
    size = struct.unpack("<Q", valid[:8])[0]
    twice = valid[8 : 8 + size].replace(b'"l.bias"', b'"l.kernel.words"')
    deep = b"[" * 100_000
    for data, message in (
        (b"", "m.safetensors is empty"),
        (valid[:5], "5 bytes and a header of 0"),
        (valid[: 8 + size - 1], "it is truncated"),
        (valid[:-1], "the file is truncated"),
        (valid + b"0", "its header tells of"),
        (struct.pack("<Q", 2**63) + valid[8:], f"a header of {2**63}"),
        (valid[:8] + b"\xff" * size + valid[8 + size :], "is not JSON in UTF-8"),
        (struct.pack("<Q", len(twice)) + twice + valid[8 + size :], "has 'l.kernel.words' twice"),
        (struct.pack("<Q", len(deep)) + deep, "is not JSON in UTF-8"),
        (struct.pack("<Q", 9) + b'{"a":NaN}', "has the constant NaN"),
    ):
        path.write_bytes(data)
        with pytest.raises(ValueError) as info:
            files.load(path)
        assert message in str(info.value)
    boolean = saved(tmp_path, {"b": jnp.ones(4, bool)})
    boolean.write_bytes(boolean.read_bytes()[:-1] + b"\x02")
    with pytest.raises(ValueError, match="'b' is of booleans"):
        files.load(boolean)


def test_overlapping_tensors_are_named(tmp_path):
    path = saved(tmp_path, {"a": jnp.ones(2), "b": jnp.ones(2), "c": jnp.ones(2)})
    with pytest.raises(ValueError, match="tensors 'a' and 'b' overlap: bytes 0 to 8 and 4 to 12"):
        files.load(header(path, entry("b", data_offsets=[4, 12])))


def parts_of(path, changed):
    """The tensors of a file as another, some of them changed: None leaves one out."""
    tensors = {name: np.array(t) for name, t in safetensors.read(path).tensors.items()}
    tensors = {name: value for name, value in (tensors | changed).items() if value is not None}
    safetensors.write(path, [Piece.of(tensors)], {})
    return path


def test_parts_that_do_not_fit_each_other(tmp_path):
    """In the formats of other tools: what is missing, of another dtype or shape, or at odds with the config."""
    i32, f16 = np.zeros((4, 4), np.int32), np.zeros((2, 8), np.float16)
    shuffled = (np.arange(64) % 3).astype(np.int32)
    for format, changed, message in (
        ("gptq_v2", {"l.scales": None}, "'l.weight' has no tensor '.scales'"),
        ("gptq_v2", {"l.qzeros": None}, "'l.weight' has no tensor '.qzeros'"),
        ("gptq_v2", {"l.scales": f16.astype(np.float32)}, "'.scales' must be of dtype float16, got float32"),
        ("gptq_v2", {"l.scales": f16[0]}, "'.scales' must have 2 axes"),
        ("gptq_v2", {"l.qzeros": i32}, "'.qzeros' must have shape (2, 4)"),
        ("gptq_v2", {"l.qzeros": np.zeros((2, 5), np.int32)}, "fit no number of bits"),
        ("gptq_v2", {"l.qweight": np.zeros((8, 31), np.int32)}, "the others tell, got (8, 31)"),
        ("gptq_v2", {"l.g_idx": shuffled}, "groups of g_idx must be 0 to 1 with 32 inputs each"),
        ("gptq_v2", {"l.g_idx": shuffled[:5]}, "'.g_idx' must have shape (64,)"),
        ("gptq_v2", {"l.weight": np.zeros(3)}, "tensor 'l.weight', and others that make up a weight"),
        ("awq", {"l.qzeros": None}, "'l.weight' has no tensor '.qzeros'"),
        ("awq", {"l.qzeros": i32}, "'.qzeros' must have shape (2, 4)"),
        ("compressed-tensors", {"l.weight_scale": None}, "'l.weight' has no tensor '.weight_scale'"),
        ("compressed-tensors", {"l.weight_shape": None}, "'l.weight' has no tensor '.weight_shape'"),
        ("compressed-tensors", {"l.weight_shape": np.array([32, 640])}, "is no number of bits"),
        ("compressed-tensors", {"l.weight_shape": np.array([32, -64])}, "no packed weight of shape (32, -64)"),
        ("compressed-tensors", {"l.weight_packed": np.zeros((32, 8), np.uint8)}, "must be of dtype int32, got uint8"),
        ("compressed-tensors", {"l.weight_scale": np.zeros((32, 5), np.float16)}, "5 groups, which do not divide"),
        ("compressed-tensors", {"l.weight_zero_point": i32[:1]}, "'.weight_zero_point' must have shape (4, 2)"),
        ("bitsandbytes", {"l.weight.absmax": None}, "'l.weight' has no tensor '.absmax'"),
        ("bitsandbytes", {"l.weight.absmax": np.zeros(3, np.float32)}, "'.absmax' must have 32 entries"),
        ("bitsandbytes", {"l.weight": None}, "has 1024 bytes of codes, got none"),
        ("bitsandbytes", {"l.weight": np.zeros(3, np.uint8)}, "has 1024 bytes of codes, got 3 bytes"),
        ("bitsandbytes", {"l.weight.quant_map": np.zeros(3, np.float32)}, "'.quant_map' must be 16 finite numbers"),
        (
            "bitsandbytes",
            {"l.weight.quant_state.bitsandbytes__nf4": np.frombuffer(b"[" * 9, np.uint8)},
            "the quant_state is not JSON",
        ),
    ):
        kernel = jw.quantize(W, "nf4") if format == "bitsandbytes" else Q
        with pytest.raises(ValueError) as info:
            files.load(parts_of(saved(tmp_path, {"l": {"kernel": kernel}}, format=format), changed))
        assert message in str(info.value), (format, str(info.value))


def test_a_config_that_disagrees(tmp_path):
    for format, config, message in (
        ("gptq_v2", {"quant_method": "gptq", "bits": 8}, "its tensors say bits=4, the quantization_config says 8"),
        ("gptq_v2", {"quant_method": "gptq", "bits": 4, "group_size": 16}, "group_size=16 does not fit"),
        ("gptq_v2", {"quant_method": "gptq", "group_size": 0}, "group_size=0 does not fit"),
        ("awq", {"quant_method": "awq", "bits": 4, "group_size": 64}, "group_size=32, the quantization_config says 64"),
        ("awq", {"quant_method": "awq", "version": "gemv"}, "the version 'gemv' of AWQ"),
        (
            "compressed-tensors",
            {"config_groups": {"g": {"weights": {"num_bits": 3}}}},
            "is [4] bits, and the quantization_config says [3]",
        ),
        ("gptq_v2", [], "must be a JSON object, got list"),
    ):
        path = parts_of(saved(tmp_path, format=format), {})
        (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
        with pytest.raises(ValueError) as info:
            files.load(path)
        assert message in str(info.value), str(info.value)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config.json is not JSON"):
        files.load(path)


def test_an_index_that_lies(tmp_path):
    path = saved(tmp_path, {"a": jnp.ones(2)})
    index = tmp_path / "model.safetensors.index.json"
    for text, message in (
        ("[]", "must have a weight_map"),
        ('{"weight_map": {"a": 1}}', "must have a weight_map"),
        ('{"weight_map": {"a": "../m.safetensors"}}', "no safetensors file beside it"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "no safetensors file beside it"),
        ('{"weight_map": {"b": "m.safetensors"}}', "'b' in m.safetensors, which does not hold it"),
    ):
        index.write_text(text)
        with pytest.raises(ValueError, match=message):
            files.load(tmp_path)
    assert path.exists()


def test_bytes_that_are_no_gguf(tmp_path):
    tree = {"w": jw.quantize(W, halves(4)), "b": jnp.ones(3)}
    path = saved(tmp_path, tree, "gguf", metadata={"general.alignment": 64, "n": 1, "flag": True})
    valid = path.read_bytes()
    name_of_w, name_of_b = (valid.index(struct.pack("<Q", 1) + n) for n in (b"w", b"b"))
    key = valid.index(b"general.alignment")

    def at(offset, data):
        return valid[:offset] + data + valid[offset + len(data) :]

    for data, message in (
        (b"", "m.gguf is empty"),
        (b"GGML" + valid[4:], "is no GGUF file"),
        (at(4, struct.pack("<I", 1)), "is GGUF version 1"),
        (at(4, struct.pack(">I", 3)), "is GGUF version 50331648"),
        (valid[:30], "tells of 3 metadata entries, for which its 30 bytes are too few"),
        (valid[:-65], "the file is truncated"),
        (at(8, struct.pack("<Q", 2**60)), f"tells of {2**60} tensors"),
        (at(16, struct.pack("<Q", 2**60)), f"tells of {2**60} metadata entries"),
        (at(name_of_w, struct.pack("<Q", 2**63)), "ends within its header"),
        (at(name_of_w + 8, b"b"), "has the tensor 'b' twice"),
        (at(name_of_w + 8, b"\xff"), "the name of a tensor is not in UTF-8"),
        (at(name_of_w + 9, struct.pack("<I", 5)), "'w' has 5 axes"),
        (at(name_of_w + 13, struct.pack("<Q", 63)), "'w' has shape (32, 63), Q4_0 needs rows of a multiple of 32"),
        (at(name_of_w + 13, struct.pack("<Q", 2**62)), "'w': no array has the shape"),
        (at(name_of_w + 29, struct.pack("<I", 99)), "'w' is of type number 99"),
        (at(name_of_w + 33, struct.pack("<Q", 8)), "'w' starts at byte 8"),
        (at(name_of_w + 33, struct.pack("<Q", 2**40)), "'w' ends at byte"),
        (at(name_of_b + 25, struct.pack("<Q", 0)), "tensors 'w' and 'b' overlap"),
        (at(key + 17, struct.pack("<I", 77)), "the metadata 'general.alignment' is of the unknown type 77"),
        (at(key + 21, struct.pack("<I", 48)), "general.alignment must be a power of two"),
        (at(valid.index(b"flag") + 8, b"\x02"), "is of booleans"),
    ):
        path.write_bytes(data)
        with pytest.raises(ValueError) as info:
            files.load(path)
        assert message in str(info.value), (message, str(info.value))
