"""Masks of every structure and distribution against brute force."""

import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxweights as jw
from jaxweights.techniques.sparsification.packed import packed_shape

NORMAL = np.random.default_rng(0).normal
STACK = jw.Axes(input=-2, output=-1, batch=0)
KEY = jax.random.key(0)


def rounded(x):
    return math.floor(x + 0.5)


def lowest(scores, zeros):
    """Mask that is False at the `zeros` lowest scores of a flat array, ties by index."""
    mask = np.ones(len(scores), bool)
    mask[np.argsort(scores, kind="stable")[:zeros]] = False
    return mask


# keep_largest


def test_scores_of_any_sign():
    scores, sparsities = NORMAL(size=(7, 9)).round(1).astype(np.float32), (0, 0.3, 0.5, 1.0)
    constant = jax.jit(lambda scores: [jw.pruning.keep_largest(scores, s) for s in sparsities])(scores)
    traced = jax.jit(jw.pruning.keep_largest)
    for mask, sparsity in zip(constant, sparsities, strict=True):
        expected = lowest(scores.ravel(), rounded(63 * sparsity)).reshape(7, 9)
        np.testing.assert_array_equal(mask, expected)
        np.testing.assert_array_equal(traced(scores, jnp.float32(sparsity)), expected)


def test_what_lies_outside_goes_first_and_counts():
    scores, within = np.float32([0, -np.inf, 5, 2, 3, 1]), np.array([True, True, False, True, False, True])
    masks = jax.jit(lambda: [jw.pruning.keep_largest(scores, zeros / 6, within=within) for zeros in range(7)])()
    order = [1, 2, 4, 0, 5, 3]  # entry 1 is -inf and ties with 2 and 4, which are outside
    for zeros, mask in enumerate(masks):
        assert set(np.flatnonzero(~np.asarray(mask))) == set(order[:zeros])


def test_each_layer_of_a_stack_has_its_own_count():
    w = NORMAL(size=(3, 8, 5)) * np.array([1, 10, 100])[:, None, None]
    mask = jw.magnitude_mask(np.float32(w), 0.35, axes=STACK)
    for layer, kept in zip(np.abs(w), mask, strict=True):
        np.testing.assert_array_equal(kept.ravel(), lowest(layer.ravel(), 14))


@pytest.mark.parametrize(
    ("shape", "axes", "axis"),
    [
        ((8, 6), None, 0),
        ((3, 3, 8, 5), None, 2),
        ((8, 2, 4), jw.axes.ATTENTION_IN, 0),
        ((2, 8, 5), jw.axes.ATTENTION_OUT, 1),
        ((3, 8, 5), STACK, 1),
        ((16,), None, 0),
        ((3, 3, 5, 8), jw.axes.CONV_TRANSPOSE_KERNEL, 3),
    ],
    ids=str,
)
def test_n_of_m_along_the_contraction_axis(shape, axes, axis):
    w, patterns = NORMAL(size=shape).round(1).astype(np.float32), ((2, 4), (1, 2), (0, 4), (8, 8))
    masks = jax.jit(lambda w: [jw.magnitude_mask(w, pattern, axes=axes) for pattern in patterns])(w)
    for mask, (n, m) in zip(masks, patterns, strict=True):
        mask = np.moveaxis(np.asarray(mask), axis, -1)
        groups = np.moveaxis(np.abs(w), axis, -1).reshape(-1, m)
        expected = np.stack([lowest(group, m - n) for group in groups])
        np.testing.assert_array_equal(mask.reshape(-1, m), expected, err_msg=f"{n}:{m}")


def tiles(shape, sizes):
    """The slices of each tile, in order."""
    counts = [d // t for d, t in zip(shape, sizes, strict=True)]
    return [
        tuple(slice(i * t, (i + 1) * t) for i, t in zip(index, sizes, strict=True)) for index in np.ndindex(*counts)
    ]


GROUPED = jw.axes.depthwise(4)
STRUCTURES = [
    (jw.pruning.Blocks(2, 3), (8, 9), None, (2, 3)),
    (jw.pruning.Blocks(4, 2), (3, 3, 8, 6), None, (1, 1, 4, 2)),
    (jw.pruning.Blocks(1, 4), (8, 2, 4), jw.axes.ATTENTION_IN, (1, 1, 4)),
    (jw.pruning.Blocks(1, 2), (3, 3, 1, 8), GROUPED, (1, 1, 1, 2)),
    (jw.pruning.OutputUnits(), (8, 9), None, (8, 1)),
    (jw.pruning.OutputUnits(), (3, 3, 4, 6), None, (3, 3, 4, 1)),
    (jw.pruning.OutputUnits(), (2, 4, 6), jw.axes.ATTENTION_OUT, (2, 4, 1)),
    (jw.pruning.InputUnits(), (8, 9), None, (1, 9)),
    (jw.pruning.InputUnits(), (3, 3, 4, 6), None, (3, 3, 1, 6)),
    (jw.pruning.InputUnits(), (6, 2, 4), jw.axes.ATTENTION_IN, (1, 2, 4)),
    (jw.pruning.InputUnits(), (3, 3, 2, 8), GROUPED, (3, 3, 1, 2)),
]


@pytest.mark.parametrize(("structure", "shape", "axes", "sizes"), STRUCTURES, ids=str)
def test_structures_keep_the_tiles_of_largest_norm(structure, shape, axes, sizes):
    w = NORMAL(size=shape)
    norms = np.array([np.linalg.norm(w[where]) for where in tiles(shape, sizes)])
    of_sparsity = jax.jit(lambda w, sparsity: jw.magnitude_mask(w, sparsity, structure=structure, axes=axes))
    for sparsity in (0.3, 0.5):
        mask = np.asarray(of_sparsity(np.float32(w), sparsity))
        kept = lowest(norms, rounded(len(norms) * sparsity))
        for where, expected in zip(tiles(shape, sizes), kept, strict=True):
            assert (mask[where] == expected).all(), (sparsity, where)


def test_n_of_m_blocks():
    w = NORMAL(size=(8, 6))
    mask = np.asarray(jw.magnitude_mask(np.float32(w), (1, 2), structure=jw.pruning.Blocks(2, 3)))
    norms = np.array([np.linalg.norm(w[where]) for where in tiles((8, 6), (2, 3))]).reshape(4, 2)
    expected = np.stack([lowest(pair, 1) for pair in norms.T.reshape(-1, 2)]).reshape(2, 4).T
    np.testing.assert_array_equal(mask[::2, ::3], expected)
    np.testing.assert_array_equal(mask, np.kron(expected, np.ones((2, 3), bool)))


# Distributions

SHAPES = {"b/kernel": (40, 30), "a/kernel": (3, 3, 8, 10), "c/kernel": (6, 5), "stack/kernel": (3, 20, 7)}
AXES = {"stack/kernel": STACK}
WEIGHTS = {p: NORMAL(size=s).round(1).astype(np.float32) for p, s in SHAPES.items()}
SCORES = {p: np.abs(w) for p, w in WEIGHTS.items()}
TOTAL = sum(w.size for w in WEIGHTS.values())


def test_global_is_one_argsort_of_all_weights():
    @jax.jit
    def of_sparsity(sparsity):
        masks = jw.pruning.Global().masks(SCORES, sparsity)
        assert list(masks) == list(SCORES)
        return masks

    order = sorted(SCORES)
    for sparsity in (0.0, 0.1, 0.5, 0.77, 0.99, 1.0):
        masks = of_sparsity(sparsity)
        expected = lowest(np.concatenate([SCORES[p].ravel() for p in order]), rounded(sparsity * TOTAL))
        found = np.concatenate([np.ravel(masks[p]) for p in order])
        np.testing.assert_array_equal(found, expected, err_msg=f"{sparsity}")


def test_global_units():
    scores = {"a": NORMAL(size=(5, 8)), "b": 3 * NORMAL(size=(7, 4))}
    of_scores = lambda scores: jw.pruning.Global().masks(scores, 0.5, structure=jw.pruning.OutputUnits())
    masks = jax.jit(of_scores)({p: np.float32(s) for p, s in scores.items()})
    norms = np.concatenate([np.linalg.norm(s, axis=0) for s in scores.values()])
    expected = lowest(norms, 6)
    np.testing.assert_array_equal(np.concatenate([masks["a"][0], masks["b"][0]]), expected)
    assert all((m == m[:1]).all() for m in masks.values())


def erdos_renyi(sizes, dims, keep):
    """Densities by the published rule: clip densities above 1 until none remain."""
    dense = set()
    while True:
        rest = [i for i in range(len(sizes)) if i not in dense]
        left = keep - sum(sizes[i] for i in dense)
        epsilon = Fraction(left, sum(dims[i] for i in rest)) if rest else 0
        over = {i for i in rest if epsilon * dims[i] > sizes[i]}
        if not over:
            return [1.0 if i in dense else float(epsilon * dims[i] / sizes[i]) for i in range(len(sizes))]
        dense |= over


@pytest.mark.parametrize("traced", [False, True])
def test_erdos_renyi_densities_and_exact_total(traced):
    dims = {"b/kernel": 70, "a/kernel": 3 + 3 + 8 + 10, "c/kernel": 11, "stack/kernel": 27}
    layers = [(p, i) for p in SHAPES for i in range(3 if p == "stack/kernel" else 1)]
    sizes = [WEIGHTS[p].size // (3 if p == "stack/kernel" else 1) for p, _ in layers]
    run = jax.jit(lambda s: jw.pruning.ErdosRenyi().masks(SCORES, s, axes=AXES))
    for sparsity in (0.0, 0.05, 0.3, 0.5, 0.8, 0.95, 0.999, 1.0):
        masks = run(sparsity) if traced else jw.pruning.ErdosRenyi().masks(SCORES, sparsity, axes=AXES)
        zeros = rounded(float(np.float32(sparsity) if traced else sparsity) * TOTAL)
        assert sum(int((~m).sum()) for m in masks.values()) == zeros
        densities = erdos_renyi(sizes, [dims[p] for p, _ in layers], TOTAL - zeros)
        for (path, i), size, density in zip(layers, sizes, densities, strict=True):
            mask, scores = (np.asarray(a[path]).reshape(-1, size)[i] for a in (masks, SCORES))
            kept = int(mask.sum())
            assert abs(kept - density * size) <= 1.5, (path, kept, density * size)
            np.testing.assert_array_equal(mask, lowest(scores, size - kept))


def test_a_thousand_layers_compile_as_one():
    """The number of operations does not grow with the number of stacked layers."""

    def n_lines(n_layers):
        scores = {"stack": jax.ShapeDtypeStruct((n_layers, 8, 8), jnp.float32)}
        masks = jax.jit(lambda s: jw.pruning.ErdosRenyi().masks(s, 0.5, axes={"stack": STACK}))
        return len(masks.lower(scores).as_text().splitlines())

    assert n_lines(10) == n_lines(1000)


# Packed masks


@pytest.mark.parametrize(
    "shape", [(), (0,), (3, 0), (0, 5), (1,), (9,), (64, 32), (3, 5), (1, 1025), (4, 8, 16)], ids=str
)
def test_packing(shape):
    mask = np.random.default_rng(0).random(shape) < 0.5
    packed = jax.jit(jw.sparse.pack_mask)(mask)
    assert packed.dtype == jnp.uint8 and packed.shape == packed_shape(shape)
    np.testing.assert_array_equal(jw.sparse.unpack_mask(packed, shape), mask)
    batch = jnp.stack([mask, ~mask])
    np.testing.assert_array_equal(
        jax.vmap(lambda m: jw.sparse.unpack_mask(jw.sparse.pack_mask(m), shape))(batch), batch
    )


FORMAT_1 = {  # shape: (packed axis, bytes)
    (11,): (0, [205, 3]),
    (8, 9): (0, [[1, 2, 4, 8, 16, 32, 64, 128, 0]]),  # not the last axis, although it is longer
    (16, 3): (0, [[1, 2, 4], [8, 16, 255]]),
    (8, 8): (0, [[0, 1, 3, 7, 15, 31, 63, 127]]),
    (3, 16): (1, [[13, 1], [0, 128], [85, 170]]),
    (3, 20): (1, [[255, 0, 15], [170, 85, 10], [1, 2, 4]]),  # no multiple of 8: the longest axis
    (9, 5): (0, [[1, 2, 4, 8, 16], [1, 0, 1, 0, 1]]),
    (1, 10, 10): (1, [[[9, 8, 7, 6, 5, 4, 3, 2, 1, 0], [3, 2, 1, 0, 3, 2, 1, 0, 3, 2]]]),  # a tie: the first
    (8, 16, 2): (1, 8 * [[[1, 200], [30, 4]]]),  # two multiples of 8: the longest
    (16, 2, 3): (0, [[[1, 2, 3], [4, 5, 6]], [[7, 8, 9], [10, 11, 12]]]),  # attention, query
    (2, 8, 3): (1, [[[250, 251, 252]], [[1, 0, 77]]]),  # attention, out
    (2, 1, 8, 3): (2, [[[[1, 2, 3]]], [[[4, 5, 254]]]]),  # convolution
    (1, 2, 3, 10): (3, [[[[1, 2], [3, 1], [5, 0]], [[7, 3], [9, 2], [255, 3]]]]),
}
"""The layout documented by `pack_mask`. Changing it makes old checkpoints unreadable."""


@pytest.mark.parametrize("shape", FORMAT_1, ids=str)
def test_bytes_of_format_1_are_read_and_written(shape):
    axis, written = FORMAT_1[shape]
    packed = np.array(written, np.uint8)
    mask = np.unpackbits(packed, axis=axis, count=shape[axis], bitorder="little").astype(bool)
    assert mask.shape == shape
    np.testing.assert_array_equal(jw.sparse.unpack_mask(packed, shape), mask)
    np.testing.assert_array_equal(jw.sparse.pack_mask(mask), packed)


def test_masks_of_format_1_entry_by_entry():
    rows = ["10", "01", "11", "00", "00", "00", "00", "10", "11", "00", "00", "00", "00", "00", "00", "01"]
    mask = np.array([[c == "1" for c in row] for row in rows])
    np.testing.assert_array_equal(jw.sparse.unpack_mask(np.uint8([[133, 6], [1, 129]]), (16, 2)), mask)
    row = np.array([[c == "1" for c in "101100001"]])
    np.testing.assert_array_equal(jw.sparse.unpack_mask(np.uint8([[13, 1]]), (1, 9)), row)
    for value in (0, 1):
        assert jw.sparse.unpack_mask(np.uint8(value), ()) == bool(value)
        assert jw.sparse.pack_mask(jnp.bool_(value)) == np.uint8(value)


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_on_a_mesh_masks_are_packed_where_they_lie(kind):
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(jax.sharding.AxisType[kind],) * 2)
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x", "y"))
    mask = jax.device_put(NORMAL(size=(64, 32)) > 0, sharding)
    pack = jax.jit(jw.sparse.pack_mask).lower(mask).compile()
    packed = pack(mask)
    assert packed.sharding.is_equivalent_to(sharding, 2)
    unpack = jax.jit(lambda p: jw.sparse.unpack_mask(p, mask.shape)).lower(packed).compile()
    np.testing.assert_array_equal(unpack(packed), mask)
    for program in (pack, unpack):
        assert not any(f" {kind}(" in program.as_text() for kind in ("all-gather", "all-to-all", "collective-permute"))
