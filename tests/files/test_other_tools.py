"""GPTQ, AWQ, compressed-tensors, bitsandbytes and MXFP4: what they write is read bit for bit, and the other way round.

The oracles are the packages where they run on a CPU, else loops over the documented layouts.
"""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from files.oracles import dense, halves, normal, oracle, write

import jaxweights as jw
from jaxweights import files
from jaxweights.files import safetensors

RNG = np.random.default_rng(0)


def tensors_of(path):
    return {name: np.array(t) for name, t in safetensors.read(path).tensors.items()}


def assert_same_tensors(found, expected):
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        got = found[name]
        assert (got.dtype, got.shape, got.tobytes()) == (tensor.dtype, tensor.shape, tensor.tobytes()), name


def into_words(codes, bits):
    """Integers along the first axis as int32 words, bit by bit: bit j of code i is bit i·bits + j of the column."""
    codes = np.asarray(codes)
    words = np.zeros((-(-len(codes) * bits // 32), *codes.shape[1:]), np.uint32)
    for i, code in enumerate(codes):
        for j in range(bits):
            at = i * bits + j
            words[at // 32] |= ((code >> j) & 1).astype(np.uint32) << np.uint32(at % 32)
    return words.view(np.int32)


def gptq(bits, rows, n, group, version, act_order):
    """(tensors, the dense weight (out, in) in float16) of a random layer, by GPTQ's own layout."""
    groups = rows // group
    codes = RNG.integers(0, 2**bits, (rows, n))
    zeros = RNG.integers(version == 1, 2**bits + (version == 1), (groups, n))
    scales = RNG.uniform(0.01, 0.1, (groups, n)).astype(np.float16)
    g_idx = np.arange(rows) // group
    g_idx = (RNG.permutation(g_idx) if act_order else g_idx).astype(np.int32)
    tensors = {
        "l.qweight": into_words(codes, bits),
        "l.qzeros": np.ascontiguousarray(into_words((zeros - (version == 1)).T, bits).T),
        "l.scales": scales,
        "l.g_idx": g_idx,
        "l.bias": np.ones(n, np.float16),
    }
    weight = np.zeros((n, rows), np.float16)
    for k in range(rows):
        value = (codes[k] - zeros[g_idx[k]]) * np.float64(scales[g_idx[k]])
        weight[:, k] = value.astype(np.float16)
    return tensors, weight


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq(bits, tmp_path):
    for version, act_order in ((1, False), (2, True)):
        tensors, weight = gptq(bits, 64, 32, 16, version, act_order)
        if bits == 8:
            tensors["l.qzeros"] &= 0x3F3F3F3F  # zero points that int8 holds in version 1 too
            zeros = tensors["l.qzeros"].view(np.uint8).astype(np.int64) + (version == 1)
            codes = tensors["l.qweight"].reshape(16, 1, 32).repeat(4, 1).view(np.uint32)
            codes = (codes >> (8 * np.arange(4, dtype=np.uint32))[:, None] & 255).reshape(64, 32).astype(np.int64)
            g = tensors["l.g_idx"]
            weight = ((codes - zeros[g]) * np.float64(tensors["l.scales"][g])).astype(np.float16).T
        config = {"quant_method": "gptq", "bits": bits, "group_size": 16, "desc_act": act_order}
        config |= {"checkpoint_format": "gptq_v2"} if version == 2 else {}
        path = write(tmp_path, tensors, config)
        layer = files.load(path)["l"]
        q = layer["weight"]
        assert set(layer) == {"weight", "bias"} and q.dtype == jnp.float16 and q.shape == (32, 64)
        np.testing.assert_array_equal(q.todense(), weight)
        assert (q.order is not None) == act_order
        files.save(tmp_path / "n.safetensors", {"l": layer}, format="gptq" if version == 1 else "gptq_v2")
        assert_same_tensors(tensors_of(tmp_path / "n.safetensors"), tensors)
        (tmp_path / "config.json").unlink()  # the file itself tells what it is
        np.testing.assert_array_equal(files.load(tmp_path / "n.safetensors")["l"]["weight"].todense(), weight)


def test_symmetric_gptq_has_no_zero_points_and_no_g_idx_is_in_order(tmp_path):
    q = jw.quantize(normal(64, 32), halves(4))
    files.save(tmp_path / "m.safetensors", {"l": {"kernel": q}}, format="gptq")
    tensors = tensors_of(tmp_path / "m.safetensors")
    # What AutoGPTQ stores for symmetric weights: 8 less 1 in every nibble; and its words are ours.
    np.testing.assert_array_equal(tensors["l.qzeros"].view(np.uint32), 0x77777777)
    np.testing.assert_array_equal(tensors["l.qweight"], q.words)
    del tensors["l.g_idx"]
    loaded = files.load(write(tmp_path, tensors))["l"]["weight"]
    assert loaded.zero is None and loaded.order is None and loaded.format.block == 32
    np.testing.assert_array_equal(loaded.astype(jnp.float32).todense().T, q.todense())
    channel = jw.quantize(normal(64, 32), halves(4, None))
    files.save(tmp_path / "c.safetensors", {"l": {"kernel": channel}}, format="gptq")
    assert json.loads(files.metadata(tmp_path / "c.safetensors")["quantization_config"])["group_size"] == -1
    loaded = files.load(tmp_path / "c.safetensors")["l"]["weight"]
    assert loaded.format.block is None
    np.testing.assert_array_equal(loaded.astype(jnp.float32).todense().T, channel.todense())


def test_awq(tmp_path):
    rows, n, group = 48, 16, 16
    codes, zeros = RNG.integers(0, 16, (rows, n)), RNG.integers(0, 16, (rows // group, n))
    scales = RNG.uniform(0.01, 0.1, (rows // group, n)).astype(np.float16)

    def packed(values):
        words = np.zeros((len(values), n // 8), np.uint32)
        for column in range(n):
            nibble = [0, 2, 4, 6, 1, 3, 5, 7].index(column % 8)
            words[:, column // 8] |= values[:, column].astype(np.uint32) << np.uint32(4 * nibble)
        return words.view(np.int32)

    tensors = {"a.l.qweight": packed(codes), "a.l.qzeros": packed(zeros), "a.l.scales": scales}
    group_of = np.arange(rows) // group
    weight = ((codes - zeros[group_of]) * np.float64(scales[group_of])).astype(np.float16).T
    config = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}
    for settings in (config, None):
        folder = tmp_path / str(settings is None)
        folder.mkdir()
        tree = files.load(write(folder, tensors, settings))
        np.testing.assert_array_equal(tree["a"]["l"]["weight"].todense(), weight)
        files.save(folder / "n.safetensors", tree, format="awq")
        assert_same_tensors(tensors_of(folder / "n.safetensors"), tensors)
        assert json.loads(files.metadata(folder / "n.safetensors")["quantization_config"]) == config


def test_compressed_tensors_by_its_layout(tmp_path):
    """Words of each output, lowest bits first, codes + 4; zero points as words along the outputs."""
    n, rows, bits = 20, 48, 3
    codes, zeros = RNG.integers(-4, 4, (n, rows)), RNG.integers(-4, 4, (n, 3))
    scales = RNG.uniform(0.01, 0.1, (n, 3)).astype(np.float32)
    tensors = {
        "l.weight_packed": np.ascontiguousarray(into_words(codes.T + 4, bits).T),
        "l.weight_scale": scales,
        "l.weight_shape": np.array([n, rows]),
        "l.weight_zero_point": into_words(zeros + 4, bits),
    }
    group = np.arange(rows) // 16
    weight = (codes - zeros[:, group]) * scales[:, group]
    tree = files.load(write(tmp_path, tensors))
    np.testing.assert_array_equal(tree["l"]["weight"].todense(), weight.astype(np.float32))
    files.save(tmp_path / "n.safetensors", tree, format="compressed-tensors")
    assert_same_tensors(tensors_of(tmp_path / "n.safetensors"), tensors)


def test_bitsandbytes_by_its_layout(tmp_path):
    """The high nibble first, blocks of the flat weight; scale = table[code]·outer + offset in double quantization."""
    n, rows = 6, 128
    codes, absmax = RNG.integers(0, 16, n * rows), RNG.integers(0, 256, n * rows // 64, dtype=np.uint8)
    table, outer = np.sort(RNG.uniform(-1, 1, 256)).astype(np.float32), np.array([0.5, 0.25], np.float32)
    values = np.asarray(jw.formats.NF4.grid.values, np.float32)
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [n, rows]}
    state |= {"nested_blocksize": 8, "nested_dtype": "float32", "nested_offset": 0.75}
    tensors = {
        "l.weight": (codes[::2] * 16 + codes[1::2]).astype(np.uint8)[:, None],
        "l.weight.absmax": absmax,
        "l.weight.quant_map": values,
        "l.weight.nested_absmax": outer,
        "l.weight.nested_quant_map": table,
        "l.weight.quant_state.bitsandbytes__nf4": np.frombuffer(json.dumps(state).encode(), np.uint8),
    }
    scales = table[absmax] * outer[np.arange(12) // 8] + np.float32(0.75)
    weight = (values[codes] * scales[np.arange(n * rows) // 64]).reshape(n, rows)
    tree = files.load(write(tmp_path, tensors))
    np.testing.assert_array_equal(tree["l"]["weight"].todense(), weight)
    files.save(tmp_path / "n.safetensors", tree, format="bitsandbytes")
    written = tensors_of(tmp_path / "n.safetensors")
    assert written["l.weight"].tobytes() == tensors["l.weight"].tobytes()
    np.testing.assert_array_equal(written["l.weight.absmax"], scales)
    np.testing.assert_array_equal(files.load(tmp_path / "n.safetensors")["l"]["weight"].todense(), weight)


@pytest.mark.slow  # the package takes a while to import
@pytest.mark.parametrize("all_bits", [(3, 4, 8), (2, 5, 6, 7)])
def test_compressed_tensors(all_bits, tmp_path):
    torch, ct = oracle("torch"), oracle("compressed_tensors.quantization")
    compressor = oracle("compressed_tensors.compressors.pack_quantized.base").PackedQuantizationCompressor
    save_file, load_file = (getattr(oracle("safetensors.torch"), name) for name in ("save_file", "load_file"))
    torch.manual_seed(0)
    n, rows = 20, 96
    weights, schemes, expected, packed = {}, {}, {}, {}
    for bits in all_bits:
        for strategy, symmetric in (("group", True), ("group", False), ("channel", False), ("tensor", True)):
            dtype = {3: torch.float32, 4: torch.bfloat16}.get(bits, torch.float16)
            groups = 3 if strategy == "group" else 1
            shape = (1,) if strategy == "tensor" else (n, groups)
            layer = {"weight": torch.randn(n, rows, dtype=dtype), "weight_scale": (torch.rand(shape) + 0.2).to(dtype)}
            if not symmetric:
                ends = -(2 ** (bits - 1)), 2 ** (bits - 1)
                layer["weight_zero_point"] = torch.randint(*ends, (n, groups), dtype=torch.int8)
            size = 32 if strategy == "group" else None
            args = ct.QuantizationArgs(num_bits=bits, symmetric=symmetric, strategy=strategy, group_size=size)
            name = f"b{bits}.{strategy}{symmetric}"
            schemes[name] = ct.QuantizationScheme(targets=[name], weights=args)
            packed[name] = compressor.compress(layer, schemes[name])
            expected[name] = compressor.decompress(dict(packed[name]), schemes[name])["weight"].float().numpy()
            weights |= {f"{name}.{end}": t.contiguous() for end, t in packed[name].items()}
    save_file(weights, tmp_path / "m.safetensors")
    tree = files.load(tmp_path / "m.safetensors")
    found = dense(tree)
    for name, weight in expected.items():
        bits, layer = name.split(".")
        np.testing.assert_array_equal(found[bits][layer]["weight"], weight, err_msg=name)
    files.save(tmp_path / "n.safetensors", tree, format="compressed-tensors")
    written = load_file(tmp_path / "n.safetensors")
    assert set(written) == set(weights)
    for name, tensor in weights.items():
        assert written[name].dtype == tensor.dtype and torch.equal(written[name], tensor), name
    # The config says of each layer what the package needs to read it.
    config = json.loads(files.metadata(tmp_path / "n.safetensors")["quantization_config"])
    for group in ct.QuantizationConfig.model_validate(config).config_groups.values():
        for name in group.targets:
            layer = {end: written[f"{name}.{end}"] for end in packed[name]}
            got = compressor.decompress(layer, group)["weight"].float().numpy()
            np.testing.assert_array_equal(got, expected[name], err_msg=name)


@pytest.mark.slow  # the package takes a while to import
def test_bitsandbytes(tmp_path):
    torch, bnb = oracle("torch"), oracle("bitsandbytes.functional")
    save_file, load_file = (getattr(oracle("safetensors.torch"), name) for name in ("save_file", "load_file"))
    torch.manual_seed(0)
    weights, expected, codes = {}, {}, {}
    for kind, nested, dtype in (
        ("nf4", False, torch.float32),
        ("nf4", True, torch.bfloat16),
        ("fp4", False, torch.float16),
        ("fp4", True, torch.float32),
    ):
        name = f"{kind}{nested}.weight"
        codes[name], state = bnb.quantize_4bit(
            torch.randn(48, 256).to(dtype), quant_type=kind, compress_statistics=nested, blocksize=64
        )
        expected[name] = bnb.dequantize_4bit(codes[name], state)
        weights |= {name: codes[name], **{f"{name}.{end}": t for end, t in state.as_dict(packed=True).items()}}
    save_file(weights, tmp_path / "m.safetensors")
    tree = files.load(tmp_path / "m.safetensors")
    found = dense(tree)
    for kind in ("nf4", "fp4"):
        part = {name: layer for name, layer in tree.items() if name.startswith(kind)}
        files.save(tmp_path / "n.safetensors", part, format="bitsandbytes")
        written = load_file(tmp_path / "n.safetensors")
        for layer in part:
            name = f"{layer}.weight"
            assert str(part[layer]["weight"].dtype) == str(expected[name].dtype).removeprefix("torch.")
            np.testing.assert_array_equal(found[layer]["weight"], expected[name].float().numpy(), err_msg=name)
            state = {end: t for end, t in written.items() if end.startswith(name + ".")}
            state = bnb.QuantState.from_dict(state, torch.device("cpu"))
            assert torch.equal(written[name], codes[name])
            assert torch.equal(bnb.dequantize_4bit(written[name], state), expected[name])
    # A weight that was quantized here.
    q = jw.quantize(normal(128, 6), "nf4")
    files.save(tmp_path / "q.safetensors", {"l": {"kernel": q}}, format="bitsandbytes")
    written = load_file(tmp_path / "q.safetensors")
    packed = written.pop("l.weight")
    state = bnb.QuantState.from_dict(written, torch.device("cpu"))
    np.testing.assert_array_equal(bnb.dequantize_4bit(packed, state).numpy().T, q.todense())


def test_mxfp4(tmp_path):
    """The layout of gpt-oss: the low nibble first; value = ±{0, .5, 1, 1.5, 2, 3, 4, 6}·2^(scale − 127)."""
    blocks = RNG.integers(0, 256, (2, 6, 3, 16), dtype=np.uint8)
    scales = RNG.integers(100, 140, (2, 6, 3), dtype=np.uint8)
    values = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    values = np.concatenate([values, -values])
    weight = np.zeros((2, 6, 96))
    for k in range(96):
        byte = blocks[..., k // 32, k % 32 // 2]
        code = byte >> 4 if k % 2 else byte & 15
        weight[..., k] = values[code] * 2.0 ** (scales[..., k // 32].astype(int) - 127)
    tensors = {
        "mlp.experts.up_blocks": blocks,
        "mlp.experts.up_scales": scales,
        "mlp.experts.up_bias": np.ones(3, "f4"),
    }
    tree = files.load(write(tmp_path, tensors))
    q = tree["mlp"]["experts"]["up"]
    assert q.dtype == jnp.bfloat16 and q.format == jw.formats.MXFP4
    np.testing.assert_array_equal(np.float64(q.todense()), weight)
    files.save(tmp_path / "n.safetensors", tree, format="mxfp4")
    assert_same_tensors(tensors_of(tmp_path / "n.safetensors"), tensors)


def test_sparse_24(tmp_path):
    """The values of the kept weights in order, and a bit for each weight, the first in the lowest."""
    n, rows = 5, 20
    kept = np.array([[RNG.permutation([1, 1, 0, 0]) for _ in range(rows // 4)] for _ in range(n)]).reshape(n, rows) == 1
    weight = np.where(kept, RNG.normal(size=(n, rows)), 0).astype(np.float16)
    bits = np.pad(kept, [(0, 0), (0, 4)]).reshape(n, 3, 8)
    tensors = {
        "l.compressed": np.array([row[k] for row, k in zip(weight, kept, strict=True)]),
        "l.bitmask": (bits * 2 ** np.arange(8)).sum(-1).astype(np.uint8),
        "l.shape": np.array([[n], [rows]]),
    }
    tree = files.load(write(tmp_path, tensors))
    p = tree["l"]["weight"]
    assert isinstance(p, jw.sparse.PackedArray)
    np.testing.assert_array_equal(p.todense(), weight)
    files.save(tmp_path / "n.safetensors", tree, format="sparse-24-bitmask")
    assert_same_tensors(tensors_of(tmp_path / "n.safetensors"), tensors)
    # A kernel (in, out) that was packed here, with groups that keep fewer than two.
    sparse = jw.sparse.pack(jnp.asarray(weight.T).at[0].set(0))
    files.save(tmp_path / "n.safetensors", {"l": {"kernel": sparse}}, format="sparse-24-bitmask")
    np.testing.assert_array_equal(files.load(tmp_path / "n.safetensors")["l"]["weight"].todense().T, sparse.todense())
    tensors["l.bitmask"][0, 0] ^= 1
    with pytest.raises(ValueError, match="must keep 2 of every 4 inputs"):
        files.load(write(tmp_path, tensors))
    with pytest.raises(ValueError, match=r"has no tensor '\.shape'"):
        files.load(write(tmp_path, {k: v for k, v in tensors.items() if k != "l.shape"}))


def test_a_layout_of_gptq_that_is_not_read_is_named(tmp_path):
    tensors, _ = gptq(4, 64, 32, 32, 1, False)
    with pytest.raises(ValueError, match="layout 'marlin' of GPTQ"):
        files.load(write(tmp_path, tensors, {"quant_method": "gptq", "checkpoint_format": "marlin"}))


def test_what_a_format_cannot_hold_is_refused(tmp_path):
    """Nothing is rounded in silence, and no file is made."""
    w = normal(64, 32)
    scaled = dataclasses.replace(jw.quantize(w, halves(4)), input_scale=jnp.ones(64))
    wide = jw.quantize(w, jw.formats.integers(4, block=32))
    five, zero = jw.quantize(w, halves(5)), jw.quantize(w, halves(4, symmetric=False))
    zero = dataclasses.replace(zero, zero=jnp.full_like(zero.zero, -8))  # the code 0, which version 1 cannot write
    floating = dataclasses.replace(zero, zero=zero.zero + 0.5)
    stack = jw.quantize(normal(2, 64, 32), halves(4), axes=jw.Axes(batch=0))
    ordered = dataclasses.replace(jw.quantize(w, halves(4)), order=jnp.arange(64, dtype=jnp.int32)[::-1])
    uneven = jw.quantize(normal(48, 32), halves(4))
    for q, format, message in (
        (wide, "gptq", "float16 cannot hold"),
        (wide, "awq", "float16 cannot hold"),
        (five, "gptq", "has 5 bits"),
        (five, "awq", "has 5 bits"),
        (zero, "gptq", "format='gptq_v2'"),
        (floating, "gptq_v2", "no integers"),
        (floating, "compressed-tensors", "no integers"),
        (scaled, "gptq", "'input_scale'"),
        (scaled, "bitsandbytes", "NF4"),
        (stack, "compressed-tensors", "a stack"),
        (ordered, "awq", "in another order"),
        (ordered, "compressed-tensors", "in another order"),
        (uneven, "awq", "whole blocks"),
        (uneven, "compressed-tensors", "whole blocks"),
        (jw.quantize(normal(62, 32), halves(4)), "gptq", "multiples of 8"),
        (jw.quantize(w, "nf4"), "gptq", "is of Levels"),
        (wide, "bitsandbytes", "NF4"),
        (jw.quantize(normal(96, 2), "nf4"), "bitsandbytes", "divide the inputs"),
        (wide, "mxfp4", "cannot be saved as MXFP4"),
    ):
        with pytest.raises(ValueError, match=message):
            files.save(tmp_path / "m.safetensors", {"l": {"kernel": q}}, format=format)
    assert not list(tmp_path.iterdir())
