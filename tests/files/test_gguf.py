"""GGUF against the package of llama.cpp: what it writes is read bit for bit, and what is written it reads alike."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from files.oracles import dense, halves, normal, oracle

import jaxweights as jw
from jaxweights import files
from jaxweights.files import gguf as container

# The high bytes of the scales and factors in half precision in a block of each type.
TYPES = {"Q8_0": (1,), "Q4_0": (1,), "Q4_1": (1, 3), "Q5_0": (1,), "Q5_1": (1, 3), "MXFP4": ()}
TYPES |= {"Q2_K": (81, 83), "Q3_K": (109,), "Q4_K": (1, 3), "Q5_K": (1, 3), "Q6_K": (209,)}


def random_blocks(gguf, name, rows, n, seed=0):
    """Blocks (rows, bytes) of random bytes, with exponents that keep half-precision scales finite and normal."""
    kind = gguf.GGMLQuantizationType[name]
    size, nbytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = np.random.default_rng(seed).integers(0, 256, (rows, n // size, nbytes), dtype=np.uint8)
    for high_byte in TYPES[name]:
        blocks[..., high_byte] = blocks[..., high_byte] & 0x83 | 0x20
    if name == "MXFP4":
        blocks[..., 0] = blocks[..., 0] % 60 + 90
    return kind, blocks.reshape(rows, -1)


def test_blocks_that_the_package_writes_are_read_and_written_bit_for_bit(tmp_path):
    gguf, quants = oracle("gguf"), oracle("gguf.quants")
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "test")
    expected = {}
    for name in TYPES:
        kind, blocks = random_blocks(gguf, name, 6, 512)
        writer.add_tensor(f"layer.{name}", blocks, raw_dtype=kind)
        expected[name] = blocks, quants.dequantize(blocks, kind)
    plain = {"f32": np.float32, "f16": np.float16, "f64": np.float64, "i8": np.int8, "i16": np.int16, "i32": np.int32}
    for name, dtype in plain.items():
        writer.add_tensor(name, np.arange(24).reshape(2, 3, 4).astype(dtype))
    writer.add_tensor("bf16", np.arange(6, dtype=np.uint16).view(np.uint8).reshape(2, 6), raw_dtype=30)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    tree = files.load(tmp_path / "a.gguf")
    x = normal(2, 512)
    found = dense(tree["layer"])
    products = jax.jit(lambda x, layer: {name: x @ q for name, q in layer.items()})(x, tree["layer"])
    for name, (_, weight) in expected.items():
        q = tree["layer"][name]
        assert isinstance(q, jw.QuantizedArray) and q.shape == (6, 512) and q.dtype == jnp.float32
        np.testing.assert_array_equal(found[name], weight, err_msg=name)
        product = np.float64(x) @ np.float64(weight).T
        np.testing.assert_allclose(products[name], product, rtol=0, atol=1e-5 * np.abs(product).max(), err_msg=name)
    for name, dtype in plain.items():
        assert tree[name].dtype == dtype
        np.testing.assert_array_equal(tree[name], np.arange(24).reshape(2, 3, 4))
    np.testing.assert_array_equal(np.asarray(tree["bf16"]).view(np.uint16).ravel(), np.arange(6))

    files.save(tmp_path / "b.gguf", tree, metadata=files.metadata(tmp_path / "a.gguf"))
    first, second = (gguf.GGUFReader(tmp_path / f"{name}.gguf") for name in "ab")
    assert {t.name: t.data.tobytes() for t in first.tensors} == {t.name: t.data.tobytes() for t in second.tensors}
    assert [t.tensor_type for t in first.tensors if t.name == "layer.Q3_K"] == [11]


@pytest.mark.parametrize(
    ("format", "type"),
    [(halves(8), "Q8_0"), (halves(5), "Q5_0"), (halves(4), "Q4_0"), ("mxfp4", "MXFP4")],
    ids=["Q8_0", "Q5_0", "Q4_0", "MXFP4"],
)
def test_weights_quantized_here_are_the_same_weights_to_the_package(format, type, tmp_path):
    gguf, quants = oracle("gguf"), oracle("gguf.quants")
    stack = jw.quantize(normal(2, 64, 6), format, axes=jw.Axes(batch=0))
    heads = jw.quantize(normal(64, 2, 5), format, axes=jw.Axes(input=0, output=(1, 2)))
    files.save(tmp_path / "m.gguf", {"blk": [{"stack": stack}, {"heads": heads}]})
    read = {t.name: t for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert {t.tensor_type.name for t in read.values()} == {type}
    weight = quants.dequantize(read["blk.0.stack"].data, read["blk.0.stack"].tensor_type)
    np.testing.assert_array_equal(weight.reshape(2, 6, 64), np.asarray(stack.todense()).swapaxes(1, 2))
    weight = quants.dequantize(read["blk.1.heads"].data, read["blk.1.heads"].tensor_type)
    np.testing.assert_array_equal(weight, np.asarray(heads.todense()).reshape(64, 10).T)
    loaded = files.load(tmp_path / "m.gguf")
    assert isinstance(loaded["blk"], list) and loaded["blk"][0]["stack"].shape == (2, 6, 64)
    np.testing.assert_array_equal(loaded["blk"][0]["stack"].todense(), np.asarray(stack.todense()).swapaxes(1, 2))


def test_metadata_keeps_its_types(tmp_path):
    gguf = oracle("gguf")
    scalars = {f"s.{d}": np.dtype(d).type(3) for d in ("u1", "i1", "u2", "i2", "u4", "i4", "f4", "u8", "i8", "f8", "?")}
    vectors = {f"v.{d}": np.arange(3).astype(d) for d in ("u1", "i4", "f4", "f8", "?")}
    fields = {**scalars, **vectors, "text": "ü", "tokens": ["a", "", "é"], "nested": [["a"], ["b", "c"]]}
    fields |= {"int": 7, "float": 0.5, "bool": True, "list": [1, 2], "none": [], "general.alignment": np.uint32(64)}
    files.save(tmp_path / "m.gguf", {"a": jnp.ones(3), "b": jnp.ones(40)}, metadata=fields)
    back = files.metadata(tmp_path / "m.gguf")
    assert list(back) == list(fields)
    for name, value in fields.items():
        np.testing.assert_array_equal(back[name], value) if name not in ("nested", "tokens") else None
        if name[:2] in ("s.", "v."):
            assert back[name].dtype == value.dtype
    assert back["nested"] == fields["nested"] and back["tokens"] == fields["tokens"]
    files.save(tmp_path / "n.gguf", files.load(tmp_path / "m.gguf"), metadata=back)
    assert (tmp_path / "n.gguf").read_bytes() == (tmp_path / "m.gguf").read_bytes()
    read = gguf.GGUFReader(tmp_path / "m.gguf").fields
    assert read["int"].types == [gguf.GGUFValueType.UINT32] and read["text"].contents() == "ü"
    assert read["tokens"].contents() == fields["tokens"] and read["v.f4"].contents() == [0, 1, 2]
    assert gguf.GGUFReader(tmp_path / "m.gguf").tensors[1].data_offset % 64 == 0


def test_a_type_that_is_not_read_is_named(tmp_path):
    gguf = oracle("gguf")
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "test")
    kind = gguf.GGMLQuantizationType.IQ4_NL
    writer.add_tensor("blk.0.w", np.zeros((2, 18), np.uint8), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match=r"'blk.0.w' is of type IQ4_NL: F32.* are read"):
        files.load(tmp_path / "a.gguf")


def test_block_types_are_those_of_the_package():
    gguf = oracle("gguf")
    for name, (number, rows, nbytes) in container.BLOCK_TYPES.items():
        kind = gguf.GGMLQuantizationType[name]
        assert kind == number and gguf.GGML_QUANT_SIZES[kind] == (rows, nbytes)
    for number, name in container._OTHERS.items():
        assert gguf.GGMLQuantizationType(number).name == name


def test_scales_that_the_file_cannot_hold_are_refused(tmp_path):
    """Nothing is rounded in silence."""
    path = tmp_path / "m.gguf"
    for q, message in (
        (jw.quantize(normal(64, 4), jw.formats.integers(8, block=32)), "which no type of GGUF holds"),
        (jw.quantize(normal(48, 4), halves(8)), "with 48 inputs, which no type of GGUF holds"),
        (jw.quantize(normal(64, 4), halves(8, symmetric=False)), "'zero'"),
        (jw.quantize(normal(64, 4), "nf4"), "which no type of GGUF holds"),
    ):
        with pytest.raises(ValueError, match=message):
            files.save(path, {"w": q})
    assert not path.exists()
