"""The ten tasks of the site are short, use public names alone, and do what they ask for."""

import ast
import re
import shutil
import subprocess
import warnings
from pathlib import Path

import numpy as np
import pytest
from pages import blocks, execute

PAGE = Path(__file__).parents[2] / "docs" / "ten_tasks.md"
SHORTER = {"steps=200": "steps=20", "begin=50, end=150": "begin=5, end=15"}
"""What would take long. Schedules are shortened alike."""
TEXT = PAGE.read_text()
SET_UP, *TASKS = blocks(TEXT)


@pytest.fixture(scope="module")
def start():
    pytest.importorskip("sklearn", reason="the page trains on the digits of scikit-learn")
    return run(SET_UP, {"__name__": "page"})


@pytest.fixture
def task(start, tmp_path, monkeypatch):
    """Runs the block of a task after the set-up, in an empty folder; returns what it leaves."""
    monkeypatch.chdir(tmp_path)
    return lambda number: run(TASKS[number - 1], dict(start))


def run(block, namespace):
    code = block.code
    for long, short in SHORTER.items():
        code = code.replace(long, short)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        execute(block._replace(code=code), namespace, str(PAGE))
    return namespace


def logits(page, first, second):
    """The classifier in NumPy, in evaluation: `first` and `second` are (kernel, bias)."""
    hidden = np.maximum(np.float64(page["x"]) @ first[0] + first[1], 0)
    return hidden @ second[0] + second[1]


def dense(params, *, kernel=lambda w: w):
    """The two layers as NumPy arrays, with a function on the kernels."""
    layers = [params["Dense_0"], params["Dense_1"]]
    return [(kernel(np.float64(layer["kernel"])), np.float64(layer["bias"])) for layer in layers]


def close(found, expected, tolerance=1e-4):
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def sigma(w):
    return np.linalg.svd(w, compute_uv=False)[0]


def leaves(tree):
    import jax

    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def rounded(w, block):
    """4 bits: a scale of absmax/7 for `block` inputs of a unit."""
    parts = w.reshape(-1, block, w.shape[-1])
    scale = np.abs(parts).max(1, keepdims=True) / 7
    return (np.round(parts / scale) * scale).reshape(w.shape)


def test_the_page_has_ten_tasks_of_a_title_a_sentence_and_a_block():
    tasks = re.split(r"^## ", TEXT, flags=re.M)[1:]
    assert [task.split(".")[0] for task in tasks] == [str(n) for n in range(1, 11)]
    for task in tasks:
        title, before = task.split("```python")[0].split("\n", 1)
        assert len(title) < 100 and re.fullmatch(r"[A-Z`][^.]*(\.\w[^.]*)*\.", before.strip()), before
        assert task.count("```") == 2


@pytest.mark.parametrize("number", range(1, 11))
def test_a_task_takes_twelve_lines_public_names_and_no_loop_over_leaves(number):
    code = TASKS[number - 1].code
    tree = ast.parse(code)
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    names |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert len(code.splitlines()) <= 12
    assert not any(name.startswith("_") for name in names)
    loops = (ast.For, ast.While, ast.comprehension, ast.FunctionDef, ast.Lambda)
    assert not any(isinstance(node, loops) for node in ast.walk(tree))
    assert not names & {"tree", "tree_util", "map"}


@pytest.mark.skipif(not shutil.which("ruff"), reason="ruff is not installed")
def test_the_blocks_are_formatted(tmp_path):
    for i, block in enumerate((SET_UP, *TASKS)):
        (tmp_path / f"{i}.py").write_text(block.code)
    command = ["ruff", "format", "--check", "--isolated", "--line-length", "120", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
def test_spectral_norm_of_a_classifier_with_dropout(task):
    page = task(1)
    assert leaves(page["restored"]["params"]).keys() == leaves(page["trained"]["params"]).keys()
    saved, restored = leaves(page["variables"]), leaves(page["restored"])
    assert saved.keys() == restored.keys() and len(saved) == 8  # four parameters; two singular bases of each kernel
    assert all(np.array_equal(restored[path], saved[path]) for path in saved)
    layers = dense(page["restored"]["params"], kernel=lambda w: 4 * w / sigma(w))
    close(page["logits"], logits(page, *layers), 1e-3)


@pytest.mark.slow
def test_weight_norm_in_nnx_exported_as_a_plain_module(task):
    import jax.numpy as jnp
    from flax import nnx

    page = task(2)
    plain, state = page["plain"], nnx.to_pure_dict(nnx.state(page["net"]))
    assert all(type(plain.layers[i]) is nnx.Linear for i in (0, 2))
    for i in (0, 2):
        kernel = np.float64(state["layers"][i]["kernel"])
        scale = np.float64(state["weight_transform"]["learned"]["layers"][i]["kernel"]["scale"])
        norms = np.linalg.norm(kernel, axis=0)
        close(plain.layers[i].kernel[...], scale * kernel / norms, 1e-6)
        assert (abs(scale / norms - 1) > 1e-3).any()  # the lengths have been trained
    loaded = page["jw"].files.load("plain.safetensors")
    other = nnx.Sequential(nnx.Linear(64, 32, rngs=nnx.Rngs(1)), nnx.relu, nnx.Linear(32, 10, rngs=nnx.Rngs(1)))
    nnx.update(other, loaded)
    x = jnp.asarray(page["x"])
    np.testing.assert_array_equal(other(x), plain(x))
    close(page["net"](x), plain(x), 1e-5)


@pytest.mark.slow
def test_pruning_to_ninety_percent(task):
    page = task(3)
    for name, size in (("Dense_0", 64 * 64), ("Dense_1", 64 * 10)):
        kernel, before = np.asarray(page["pruned"][name]["kernel"]), page["trained"]["params"][name]["kernel"]
        kept = kernel != 0
        assert abs(np.count_nonzero(kept) - 0.1 * size) <= 1
        assert (kernel != before)[kept].all()  # the rest has been trained on
    picture = page["panel"].images[0].get_array()
    np.testing.assert_array_equal(np.float32(picture) != 0, np.asarray(page["pruned"]["Dense_0"]["kernel"]) != 0)
    assert Path("mask.png").stat().st_size > 1000


def test_quantizing_to_four_bits(task):
    page = task(4)
    close(page["logits"], logits(page, *dense(page["trained"]["params"], kernel=lambda w: rounded(w, 32))))
    small, loaded = leaves(page["small"]), leaves(page["loaded"])
    assert small.keys() == loaded.keys() and all(np.array_equal(small[path], loaded[path]) for path in small)
    entries, scales, biases = 64 * 64 + 64 * 10, 2 * 64 + 2 * 10, 64 + 10
    assert page["jw"].summarize(page["small"]).nbytes == entries // 2 + 4 * scales + 4 * biases
    header = int.from_bytes(Path("small.safetensors").read_bytes()[:8], "little")
    assert Path("small.safetensors").stat().st_size == 8 + header + entries // 2 + 4 * scales + 4 * biases


@pytest.mark.slow
def test_clustering_a_layer_and_fine_tuning_its_codebook(task):
    page = task(5)
    stored = page["clustered"]["params"]["Dense_0"]["kernel"]
    kernel, first = np.asarray(stored.todense()), np.asarray(page["trained"]["params"]["Dense_0"]["kernel"])
    values, group = np.unique(kernel, return_inverse=True)
    group = group.reshape(kernel.shape)
    assert len(values) == 16
    # k-means: every trained weight is in the cluster whose mean is nearest. Then the values have moved.
    means = np.array([first[group == i].mean(dtype=np.float64) for i in range(16)])
    assert (abs(first - means[group]) <= abs(first[..., None] - means).min(-1) + 1e-5).all()
    assert abs(values - means).max() > 1e-3
    assert stored.nbytes == 64 * 64 // 2 + 16 * 4
    layers = {**page["clustered"]["params"], "Dense_0": {**page["clustered"]["params"]["Dense_0"], "kernel": kernel}}
    close(page["logits"], logits(page, *dense(layers)))


def test_pruning_with_data(task):
    page = task(6)
    trained = page["trained"]["params"]

    def smallest(w):
        return np.where(abs(w) >= np.median(abs(w)), w, 0)

    for name in ("Dense_0", "Dense_1"):
        half, repaired = (np.asarray(page[tree]["params"][name]["kernel"]) for tree in ("half", "repaired"))
        assert np.count_nonzero(half) == half.size / 2
        np.testing.assert_array_equal(half != 0, repaired != 0)
        assert (half != repaired).any()
    target = logits(page, *dense(trained))
    by_data = np.linalg.norm(logits(page, *dense(page["half"]["params"])) - target)
    assert by_data < 0.8 * np.linalg.norm(logits(page, *dense(trained, kernel=smallest)) - target)


@pytest.mark.slow
def test_mup_scales_initial_weights_and_updates(task):
    import jax
    import jax.numpy as jnp

    page = task(7)
    drawn, params = page["wide"].init(page["key"], page["x"])["params"], page["params"]
    ratio = 512 / 16
    np.testing.assert_array_equal(params["Dense_0"]["kernel"], drawn["Dense_0"]["kernel"])
    close(params["Dense_1"]["kernel"], drawn["Dense_1"]["kernel"] / np.sqrt(ratio), 1e-6)
    tx = page["tx"]
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
    close(updates["Dense_0"]["kernel"], -1e-2 * np.ones((64, 512)))
    close(updates["Dense_1"]["kernel"], -1e-2 / ratio * np.ones((512, 10)))
    assert (np.asarray(page["variables"]["params"]["Dense_1"]["kernel"]) != params["Dense_1"]["kernel"]).any()


def test_rows_that_are_not_negative_and_sum_to_one(task):
    page = task(8)
    kernel = np.asarray(page["mixed"])
    assert kernel.shape == (64, 10) and kernel.min() == 0 and (kernel > 0).sum() > 64
    np.testing.assert_allclose(kernel.sum(1, dtype=np.float64), 1, rtol=0, atol=1e-6)


def test_how_each_weight_is_read(task):
    page = task(9)
    layout = page["layout"]
    inputs = {"query": ((0,), (1, 2)), "key": ((0,), (1, 2)), "value": ((0,), (1, 2)), "out": ((0, 1), (2,))}
    assert {path: (axes.input, axes.output) for path, axes in layout.items()} == {
        f"{name}/kernel": axes for name, axes in inputs.items()
    }
    assert set(layout.skipped) == {f"{name}/bias" for name in inputs}
    for table in (str(layout), str(page["jw"].describe(page["variables"]["params"]))):
        told = dict(re.findall(r"^(\S+/\S+) .* (all|entrywise) ", table, re.M))
        assert told == {f"{n}/kernel": "all" for n in inputs} | {f"{n}/bias": "entrywise" for n in inputs}


@pytest.mark.slow
def test_the_same_on_a_mesh(task):
    import jax

    page = task(10)
    assert jax.device_count() == 8
    before, after = leaves(page["on_mesh"]), leaves(page["pruned"])
    assert len(before["['params']['Dense_0']['kernel']"].addressable_shards) == 8
    assert before["['params']['Dense_0']['kernel']"].addressable_shards[0].data.shape == (64, 8)
    assert all(after[path].sharding.is_equivalent_to(a.sharding, a.ndim) for path, a in before.items())
    for name in ("Dense_0", "Dense_1"):
        kernel = np.asarray(page["pruned"]["params"][name]["kernel"])
        assert abs(np.count_nonzero(kernel) - 0.1 * kernel.size) <= 1
        assert abs(sigma(kernel) - 1) < 0.01
        sharding = after[f"['params']['{name}']['kernel']"].sharding
        assert page["small"]["params"][name]["kernel"].words.sharding.is_equivalent_to(sharding, 2)
    close(page["y_small"], logits(page, *dense(page["trained"]["params"], kernel=lambda w: rounded(w, 8))))
