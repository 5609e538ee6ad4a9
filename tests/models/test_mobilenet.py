"""MobileNetV2 of the examples: loads weights without executing a pickle, matches torch, and folds."""

import importlib.util
import os
import pickle
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxweights as jw

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module", autouse=True)
def examples():
    """Makes the examples importable."""
    sys.path.insert(0, str(EXAMPLES))
    yield
    sys.path.remove(str(EXAMPLES))


@pytest.fixture(scope="module")
def weights(examples):
    """Path of the weights."""
    import mobilenet_v2

    spec = importlib.util.find_spec(mobilenet_v2.PACKAGE)
    if spec is None:
        pytest.skip(f"the weights of MobileNetV2 are not installed: {mobilenet_v2.INSTALL}")
    (path,) = (Path(spec.origin).parent / "weights").glob("*.pth")
    return path


@pytest.fixture(scope="module")
def outcome(weights):
    """The outcome of the example."""
    import mobilenet

    return mobilenet.main(["--quick"])


def torch():
    return pytest.importorskip("torch", reason="torch is not installed: pip install 'jaxweights[peers]'")


def save(tensors, path):
    torch().save(tensors, path, _use_new_zipfile_serialization=False)
    return path


def test_every_tensor_is_read_as_torch_reads_it(weights):
    import torch_pickle

    ours, theirs = torch_pickle.load(weights), torch().load(weights, weights_only=True)
    assert list(ours) == list(theirs)
    assert len(ours) == 314
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.numpy().dtype
        np.testing.assert_array_equal(ours[name], tensor.numpy())


def test_views_of_one_storage_scalars_and_nothing(tmp_path):
    import torch_pickle

    numbers = torch().arange(12.0).reshape(4, 3)
    tensors = {
        "all": numbers,
        "rows": numbers[1:3],
        "one": numbers[2, 1],
        "none": numbers[:0],
        "step": torch().tensor(7),
    }
    found = torch_pickle.load(save(tensors, tmp_path / "file"))
    assert list(found) == list(tensors)
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(found[name], tensor.numpy(), strict=True)
    with pytest.raises(ValueError, match=r"t has strides \(1, 3\), which are not row-major"):
        torch_pickle.load(save({"t": numbers.T}, tmp_path / "file"))


class Call:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("place", ["system information", "tensors"])
def test_a_pickle_that_calls_is_refused_before_it_does(place, tmp_path):
    import torch_pickle

    call, file = Call(os.mkdir, str(tmp_path / "made")), tmp_path / "file"
    information, tensors = (call, {}) if place == "system information" else ({"little_endian": True}, {"w": call})
    file.write_bytes(torch_pickle.HEADER + pickle.dumps(information, 2) + pickle.dumps(tensors, 2))
    with pytest.raises(pickle.UnpicklingError, match=r"asks for (posix|nt)\.mkdir.* refused"):
        torch_pickle.load(file)
    assert not (tmp_path / "made").exists()


def test_other_files_are_refused(tmp_path):
    import torch_pickle

    for name, content in {"newer": b"PK\x03\x04", "pickle": pickle.dumps([1]), "empty": b""}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match="no legacy torch checkpoint"):
            torch_pickle.load(tmp_path / name)


def test_every_norm_is_found_behind_its_convolution():
    import mobilenet_v2

    model, x = mobilenet_v2.MobileNetV2(), jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    folds = jw.linen.norm_folds(model, jax.eval_shape(model.init, jax.random.key(0), x), x)
    pairs = {f"{name}/norm": f"{name}/conv" for name in mobilenet_v2.torch_names()}
    assert {norm: fold.layer for norm, fold in folds.items()} == pairs
    assert {(fold.follows, fold.eps) for fold in folds.values()} == {(False, 1e-5)}


@pytest.mark.slow
def test_the_folded_model_is_the_model(outcome):
    assert outcome.error < 1e-5
    assert outcome.same_class == 1
    assert outcome.parameters[0] - outcome.parameters[1] == 3 * 17_056  # mean, variance and scale; the bias is kept
    assert sum(entry["channels"] for entry in outcome.channels.values()) == 17_056
    tiny = [outcome.channels[name] for name in ("denormal", "under 1e-8")]
    assert [entry["channels"] for entry in tiny] == [24, 11]
    for entry in tiny:
        assert entry["factor"] < 20
        assert entry["error"] < 1e-8


@pytest.mark.slow
def test_it_sees_the_palace_in_the_photo(outcome):
    (palace, p), (monastery, _) = outcome.top["china.jpg"][:2]
    assert (palace, monastery) == (698, 663)
    assert p > 0.5


@pytest.mark.slow
def test_the_logits_are_those_of_torch(outcome, weights):
    """Compares with a forward pass in torch, built from the names in the file."""
    import mobilenet
    import torch_pickle

    F = torch().nn.functional
    tensors = {name: torch().from_numpy(np.array(a)) for name, a in torch_pickle.load(weights).items()}
    images = [mobilenet.crops(mobilenet.load_sample_image(name), 3) for name in outcome.top]
    x = torch().from_numpy(np.concatenate(images).transpose(0, 3, 1, 2).copy())

    def layer(x, conv, norm, stride=1):
        w = tensors[f"{conv}.weight"]
        groups = x.shape[1] // w.shape[1]
        y = F.conv2d(x, w, stride=stride, padding=w.shape[-1] // 2, groups=groups)
        stats = (tensors[f"{norm}.{name}"] for name in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(y, *stats, eps=1e-5)

    halving = {2, 4, 7, 14}
    x = F.relu6(layer(x, "features.0.0", "features.0.1", 2))
    for i in range(1, 18):
        block = f"features.{i}.conv"
        y, last = x, 1 if i == 1 else 2
        for j in range(last):
            stride = 2 if j == last - 1 and i in halving else 1
            y = F.relu6(layer(y, f"{block}.{j}.0", f"{block}.{j}.1", stride))
        y = layer(y, f"{block}.{last}", f"{block}.{last + 1}")
        x = x + y if x.shape == y.shape else y
    x = F.relu6(layer(x, "features.18.0", "features.18.1")).mean((2, 3))
    expected = F.linear(x, tensors["classifier.1.weight"], tensors["classifier.1.bias"]).numpy()
    np.testing.assert_allclose(outcome.logits, expected, atol=2e-5 * np.abs(expected).max())
