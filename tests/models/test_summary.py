"""Summaries of trees, against NumPy."""

import io
import math

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from rich.console import Console

import jaxweights as jw
from jaxweights.models.summary_table import shortened


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_a_row_is_what_numpy_says():
    w = np.round(normal(8, 6), 1) * (normal(8, 6, seed=1) > 0)
    (row,) = jw.summarize({"layer": {"kernel": jnp.asarray(w)}}).rows
    assert row[:4] == ("layer/kernel", (8, 6), "float32", 192)
    assert row.density == np.mean(w != 0) and row.values == len(set(w.ravel().tolist()))
    assert row.sigma == pytest.approx(np.linalg.svd(np.float64(w))[1][0], rel=1e-6)
    assert row.norm == pytest.approx(math.sqrt((np.float64(w) ** 2).sum()))


@pytest.mark.parametrize(
    ("kept", "pattern"),
    [
        ([1, 0, 1, 0], "1:2"),
        ([1, 1, 0, 0], "2:4"),
        ([0, 0, 0, 1], "1:4"),
        ([1, 1, 1, 0], None),
        ([0, 0, 0, 0], None),
        ([1, 1, 0], None),
        ([1, 1, 1, 0, 0, 0, 0, 0], "3:8"),
    ],
)
def test_patterns_along_the_input(kept, pattern):
    w = np.repeat(np.float32(kept * 2)[:, None], 3, 1)
    assert jw.summarize([jnp.asarray(w)]).rows[0].pattern == pattern


def test_few_scattered_entries_have_no_pattern():
    """No 16 consecutive inputs have more than 8 entries, but 8:16 does not explain a density of 5%."""
    w = np.random.default_rng(0).random((320, 20)) < 0.05
    assert jw.summarize([jnp.asarray(w, jnp.float32)]).rows[0].pattern is None


def test_weights_are_read_as_the_tree_says():
    """Attention heads and stacked layers."""
    model = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=8)
    params = model.init(jax.random.key(0), jnp.ones((1, 3, 6)))["params"]
    rows = {r.path: r for r in jw.summarize(params).rows}
    for name, shape in (("query", (6, 8)), ("out", (8, 6))):
        w = np.asarray(params[name]["kernel"]).reshape(shape)
        assert rows[f"{name}/kernel"].sigma == pytest.approx(np.linalg.norm(w, 2), rel=1e-5)
    stack = {"kernel": jnp.asarray(normal(3, 4, 5)), "bias": jnp.zeros((3, 5))}
    largest = np.linalg.norm(np.asarray(stack["kernel"]), 2, (1, 2)).max()
    assert {r.path: r.sigma for r in jw.summarize(stack).rows}["kernel"] == pytest.approx(largest, rel=1e-5)


def test_a_depthwise_kernel_has_the_sigma_of_its_block_diagonal_matrix():
    """The matrix of a grouped convolution is block-diagonal; one (9, 24) matrix for all channels has a larger σ."""
    kernel = normal(3, 3, 1, 24)
    dense = np.zeros((9, 24, 24))
    dense[:, np.arange(24), np.arange(24)] = kernel.reshape(9, 24)
    expected = np.linalg.norm(dense.reshape(9 * 24, 24), 2)
    whole = np.linalg.norm(np.float64(kernel).reshape(9, 24), 2)
    assert whole > 1.3 * expected
    tree = {"depthwise": {"kernel": jnp.asarray(kernel)}, "unnamed": {"kernel": jnp.asarray(kernel)}}
    with pytest.warns(jw.AxesWarning, match=r"'unnamed/kernel' \(3, 3, 1, 24\) are a guess") as told:
        rows = jw.summarize(tree).rows
    assert len(told) == 1 and [r.guess for r in rows] == [False, True]
    assert [r.sigma for r in rows] == [pytest.approx(expected), pytest.approx(whole)]
    for axes, sigma in ((jw.axes.depthwise(24), expected), (jw.axes.CONV, whole)):
        (row,) = jw.summarize(tree, "unnamed/*", layout={"unnamed/kernel": axes}).rows
        assert row.sigma == pytest.approx(sigma) and row.axes == axes and not row.guess


def test_axes_may_be_those_of_the_program():
    """What `capture` and `layout` find tells a depthwise convolution from one of a single channel."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Conv(6, (3, 3), name="first")(x)
            return nn.Conv(6, (3, 3), feature_group_count=6, name="depthwise")(x)

    x = jnp.ones((1, 4, 4, 1))
    params = Model().init(jax.random.key(0), x)
    stats = jw.capture(Model().apply, params, [x], second_moment=False)
    rows = jw.summarize(params, "**/kernel", layout={path: s.axes for path, s in stats.items()}).rows
    by_layout = jw.summarize(params, "**/kernel", layout=jw.layout(Model().apply, params, x)).rows
    assert [r.sigma for r in by_layout] == [r.sigma for r in rows]
    matrices = {r.path.split("/")[1]: np.asarray(params["params"][r.path.split("/")[1]]["kernel"]) for r in rows}
    sigma = {r.path.split("/")[1]: r.sigma for r in rows}
    assert sigma["first"] == pytest.approx(np.linalg.norm(matrices["first"].reshape(9, 6), 2), rel=1e-5)
    assert sigma["depthwise"] == pytest.approx(np.linalg.norm(matrices["depthwise"].reshape(9, 6), axis=0).max())


def test_stored_weights_show_what_they_store():
    w = np.tile(np.float32([[1], [-2], [0], [0]]), (4, 32))
    tree = {
        "packed": jw.sparse.pack(jnp.asarray(w)),
        "blocks": jw.sparse.pack_blocks(jnp.asarray(w), block=(4, 4)),
        "codes": jw.quantize(jnp.asarray(w), 8),
        "coordinates": jw.sparse.to_bcoo(jnp.asarray(w)),
        "dense": jnp.asarray(w, jnp.bfloat16),
    }
    summary = jw.summarize(tree)
    rows = {r.path: r for r in summary.rows}
    for path, row in rows.items():
        assert row.nbytes == sum(a.nbytes for a in jax.tree.leaves(tree[path]))
        assert row[1] == (16, 32) and row.density == 0.5 and row.pattern == "2:4"
        assert row.values == 3 and row.sigma == pytest.approx(np.linalg.norm(w, 2), rel=0.01)
    assert rows["packed"].form == "PackedArray" and rows["dense"].form == "bfloat16" and rows["codes"].form == "int8"
    assert summary.nbytes == sum(r.nbytes for r in summary.rows)
    assert summary.size == 5 * 512 and summary.density == 0.5
    assert summary.norm == pytest.approx(np.linalg.norm(w) * math.sqrt(5), rel=0.01)


def test_any_tree_and_where():
    linear = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    assert [r.path for r in jw.summarize(nnx.state(linear)).rows] == ["bias", "kernel"]
    assert [r.path for r in jw.summarize(nnx.state(linear), "kernel").rows] == ["kernel"]
    module = eqx.nn.Linear(3, 4, key=jax.random.key(0))
    assert [r.path for r in jw.summarize((module, None, 3)).rows] == ["0/weight", "0/bias"]


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf, 1e30])
def test_any_values(value):
    (row,) = jw.summarize([jnp.full((4, 4), value)]).rows
    assert row.values == 1 and row.density == (value != 0)
    assert np.isfinite(row.sigma) == np.isfinite(value)
    (nothing,) = jw.summarize([jnp.zeros((0, 4))]).rows
    assert nothing[4:9] == (0, None, 0, 0, 0)


def test_it_prints_as_a_table():
    summary = jw.summarize({"kernel": jnp.asarray(normal(4, 3)), "bias": jnp.zeros(3)})
    out = io.StringIO()
    Console(file=out, width=100).print(summary)
    for text in (out.getvalue(), str(summary)):
        assert "kernel" in text and "4×3" in text and "80.0%" in text and "15 entries" in text
        assert "in out " in text and "?" not in text


def test_numbers_are_whole_in_80_columns_and_paths_are_told_apart(monkeypatch):
    shapes = {"query": (64, 4, 16), "key": (64, 4, 16), "value": (64, 4, 16), "output_projection": (4, 16, 64)}
    tree = {
        f"params/encoder/transformer_layer_{i}/multi_head_attention/{name}/kernel": normal(*shape, seed=i)
        for i in (1, 2, 11, 12)
        for name, shape in shapes.items()
    }
    tree["classifier/a_very_long_name_of_the_last_layer/kernel"] = np.repeat(np.eye(4, dtype=np.float32), 300, 1)
    with pytest.warns(jw.AxesWarning, match="and 8 more are a guess"):  # heads without query, key, value and out
        summary = jw.summarize(tree)
    monkeypatch.setenv("COLUMNS", "80")
    out = io.StringIO()
    Console(file=out, width=80).print(summary)
    for text in (str(summary), out.getvalue()):
        lines = [line for line in text.splitlines() if "…" in line]
        assert max(map(len, text.splitlines())) <= 80 and len(lines) == len(tree)
        assert len({line.split()[0] for line in lines}) == len(tree)
        for line, row in zip(lines, summary.rows, strict=True):
            for number in ("×".join(map(str, row.shape)), f"{row.density:.1%}", f"{row.sigma:.3g}", f"{row.norm:.3g}"):
                assert number in line.split()
            assert line.count("w i o?") == (len(row.shape) == 3)
            assert row.path.endswith(line.split()[0].rpartition("…")[2])
    monkeypatch.setenv("COLUMNS", "200")
    assert all(path in str(summary) for path in tree) and "win in out?" in str(summary)


def test_names_are_abbreviated_as_little_as_the_width_needs():
    paths = ["net/block_1/conv_in/kernel", "net/block_10/conv_out/kernel", "net/bias"]
    assert shortened(paths, 40) == paths
    assert shortened(paths, 24) == ["n…/b…1/conv_in/kernel", "n…/b…10/conv_out/kernel", "net/bias"]
    assert shortened(paths, 23) == ["n…/b…1/conv_in/kernel", "n…/b…10/conv_out/kernel", "net/bias"]
    assert [len(path) <= 8 for path in shortened(paths, 8)] == [True] * 3
    siblings = [f"a_long_name/{name}/w" for name in ("attention", "attribute", "bottleneck")]
    assert shortened(siblings, 12) == ["a…/atte…/w", "a…/attr…/w", "a…/b…/w"]
