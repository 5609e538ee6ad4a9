"""Masks of every structure and distribution against brute force."""

import itertools
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxweights as jw
from jaxweights.techniques.sparsification.tiles import Tiles

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
    order = [2, 4, 1, 0, 5, 3]  # entry 1 is -inf, but 2 and 4 are outside
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


def tiles(shape, sizes, groups=1):
    """The slices of each tile, in order. The last axis is cut into groups first."""
    runs = [groups if a == len(shape) - 1 else 1 for a in range(len(shape))]
    cuts = [
        [
            slice(start, min(start + t, end))
            for end in range(d // n, d + 1, d // n)
            for start in range(end - d // n, end, t)
        ]
        for d, t, n in zip(shape, sizes, runs, strict=True)
    ]
    return list(itertools.product(*cuts))


POOLS = {
    "l2": np.linalg.norm,
    "l1": lambda s: np.abs(s).sum(),
    "mean": np.mean,
    "max": np.max,
}
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
    # Other scores, and blocks that do not divide the weight.
    (jw.pruning.OutputUnits(pool="l1"), (3, 3, 4, 6), None, (3, 3, 4, 1)),
    (jw.pruning.InputUnits(pool="max"), (8, 9), None, (1, 9)),
    (jw.pruning.Blocks(2, 3, pool="mean"), (8, 9), None, (2, 3)),
    *((jw.pruning.Blocks(3, 4, pool=pool), (8, 9), None, (3, 4)) for pool in POOLS),
    (jw.pruning.Blocks(3, 4, pool="mean"), (2, 2, 5, 6), None, (1, 1, 3, 4)),
    (jw.pruning.Blocks(1, 2, pool="l1"), (3, 3, 1, 12), GROUPED, (1, 1, 1, 2)),
    (jw.pruning.Blocks(99, 99), (8, 9), None, (8, 9)),
    (jw.pruning.Blocks(1, 3), (8,), None, (1,)),
]


@pytest.mark.parametrize(("structure", "shape", "axes", "sizes"), STRUCTURES, ids=str)
def test_structures_keep_the_tiles_of_largest_norm(structure, shape, axes, sizes):
    w, pool, cut = NORMAL(size=shape), POOLS[structure.pool], tiles(shape, sizes, axes.groups if axes else 1)
    of_sparsity = jax.jit(lambda w, sparsity: jw.pruning.keep_largest(w, sparsity, structure=structure, axes=axes))
    by_magnitude = jax.jit(lambda w: jw.magnitude_mask(w, 0.3, structure=structure, axes=axes))(np.float32(w))
    masks = {0.3: of_sparsity(np.float32(w), 0.3), 0.5: of_sparsity(np.float32(w), 0.5)}
    cases = [(w, sparsity, mask) for sparsity, mask in masks.items()] + [(np.abs(w), 0.3, by_magnitude)]
    for scores, sparsity, mask in cases:
        kept = lowest(np.array([pool(scores[where]) for where in cut]), rounded(len(cut) * sparsity))
        for where, expected in zip(cut, kept, strict=True):
            assert (np.asarray(mask)[where] == expected).all(), (sparsity, where)


def test_a_whole_tile_goes_first_where_all_of_it_is_outside():
    w, within = np.float32(NORMAL(size=(5, 7))), np.ones((5, 7), bool)
    within[3:, 6:] = within[:3, :3] = False  # two of the 2 x 3 tiles, one of them smaller
    within[0, 3] = False
    keep = lambda w, within: jw.pruning.keep_largest(w, 2 / 6, structure=jw.pruning.Blocks(3, 3), within=within)
    mask = np.asarray(jax.jit(keep)(w, within))
    expected = np.ones((5, 7), bool)
    expected[3:, 6:] = expected[:3, :3] = False
    np.testing.assert_array_equal(mask, expected)


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


CAPPED = {  # path: (weight, axes, how to number the matrix of each entry)
    "b": (np.float32(SCORES["b/kernel"]), None, np.zeros((40, 30), int)),
    "c/small": (jnp.bfloat16(SCORES["b/kernel"] / 100), None, np.zeros((40, 30), int)),
    "a/stack": (SCORES["stack/kernel"] / 4, STACK, np.arange(3)[:, None, None]),
    "middle": (
        np.swapaxes(SCORES["stack/kernel"], 0, 1),
        jw.Axes(input=0, output=2, batch=1),
        np.arange(3)[:, None],
    ),
}


def greedy(scores, numbers, caps, zeros):
    """Flat mask that is False at the `zeros` lowest scores, one at a time, unless that matrix is at its cap."""
    mask, counts = np.ones(len(scores), bool), np.zeros_like(caps)
    for i in np.argsort(scores, kind="stable"):
        if counts.sum() < zeros and counts[numbers[i]] < caps[numbers[i]]:
            mask[i], counts[numbers[i]] = False, counts[numbers[i]] + 1
    return mask, counts


def test_global_with_a_cap_is_greedy_pruning_by_rank():
    """Ties, stacks whose batch axis is anywhere, two dtypes, and masks within others; the total is exact."""
    paths, axes = sorted(CAPPED), {p: a for p, (_, a, _) in CAPPED.items() if a}
    scores = {p: w for p, (w, *_) in CAPPED.items()}
    within = {p: NORMAL(size=w.shape) > -1.5 for p, w in scores.items()}
    capped = jw.pruning.Global(max_sparsity=0.65)
    of_sparsity = jax.jit(lambda s, within: capped.masks(scores, s, axes=axes, within=within))
    flat, numbers, start = [], [], 0
    for p in paths:
        w, _, number = CAPPED[p]
        flat.append(np.where(within[p], np.float64(w), -np.inf).ravel())
        numbers.append(np.broadcast_to(start + number, w.shape).ravel())
        start += number.max() + 1
    flat, numbers = np.concatenate(flat), np.concatenate(numbers)
    caps = np.floor(0.65 * np.bincount(numbers)).astype(int)
    for sparsity in (0.0, 0.125, 0.5, 0.625, 0.75):  # at .75 there is room for .65 only
        masks = of_sparsity(sparsity, within)
        expected, counts = greedy(flat, numbers, caps, rounded(sparsity * len(flat)))
        np.testing.assert_array_equal(np.concatenate([np.ravel(masks[p]) for p in paths]), expected)
        at_cap = capped.capped(masks, axes=axes)
        for p in paths:
            matrices = np.unique(numbers[np.concatenate([np.full(scores[q].size, q == p) for q in paths])])
            assert bool(at_cap[p]) == any(counts[m] == caps[m] for m in matrices), (sparsity, p)
    static = jax.jit(lambda: capped.masks(scores, 0.625, axes=axes, within=within))()
    for p, mask in of_sparsity(0.625, within).items():
        np.testing.assert_array_equal(static[p], mask)


def test_a_cap_keeps_nan_longest_and_counts_units():
    scores = {"a": np.float32([[1, 2, np.nan, np.inf]]), "b": np.float32([[np.nan, 8, 9]])}
    units, capped = jw.pruning.OutputUnits(pool="max"), jw.pruning.Global(max_sparsity=0.8)
    run = jax.jit(lambda: [[capped.masks(scores, n / 7, structure=s) for s in (None, units)] for n in (3, 4, 5)])
    kept = {3: ([0, 0, 1, 1], [1, 0, 1]), 4: ([0, 0, 1, 1], [1, 0, 0]), 5: ([0, 0, 1, 0], [1, 0, 0])}
    for n, pair in zip(kept, run(), strict=True):
        for mask in pair:
            np.testing.assert_array_equal(mask["a"], np.array([kept[n][0]], bool))
            np.testing.assert_array_equal(mask["b"], np.array([kept[n][1]], bool))


def test_caps_are_exact_at_any_size():
    a, b = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((2**17, 2**16), (99_999, 65_535)))
    capped = jw.pruning.Global(max_sparsity=0.29)
    for shape, cap in (((10, 10), 29), ((2**20, 100 * 2**20), 29 * 2**40), (b.shape, 99_999 * 65_535 * 29 // 100)):
        assert capped._cap(Tiles(shape, None, None)) == cap
    masks = jax.jit(lambda a, b: capped.masks({"a": a, "b": b}, 0.28)).lower(a, b).compile()
    assert masks.memory_analysis().temp_size_in_bytes <= 8 * (math.prod(a.shape) + math.prod(b.shape))


def test_blocks_of_several_weights_are_counted_exactly():
    structure = jw.pruning.Blocks(7, 4, pool="mean")
    distributions = (jw.pruning.Global(), jw.pruning.Global(max_sparsity=0.7), jw.pruning.ErdosRenyi())
    run = jax.jit(lambda: [d.masks(SCORES, 0.6, structure=structure, axes=AXES) for d in distributions])
    n_tiles = 6 * 8 + 9 * 2 * 3 + 1 * 2 + 3 * 3 * 2
    for masks in run():
        zeros = 0
        for mask in masks.values():
            sizes = (1,) * (mask.ndim - 2) + (7, 4)
            parts = [np.asarray(mask)[where] for where in tiles(mask.shape, sizes)]
            assert all(part.all() == part.any() for part in parts)
            zeros += sum(not part.all() for part in parts)
        assert zeros == rounded(0.6 * n_tiles)


def test_the_program_does_not_grow_with_the_number_of_weights_that_are_alike():
    """Only layers of one shape and role are in one batch, so two shapes make two of everything."""

    def n_loops(n_layers, distribution):
        shapes = {f"layer_{i}/{n}": s for i in range(n_layers) for n, s in (("q", (16, 24)), ("up", (24, 32)))}
        params = {p: {"kernel": jax.ShapeDtypeStruct(s, jnp.float32)} for p, s in shapes.items()}
        tx = jw.confine(optax.sgd(0.1), jw.Regrow(jw.Prune(0.5, score=jw.scores.random, distribution=distribution)))
        state = jax.eval_shape(tx.init, params)
        return [
            jax.jit(f).lower(*a).as_text().count("stablehlo.while")
            for f, a in ((tx.init, (params,)), (tx.update, (params, state, params)))
        ]

    for distribution in (jw.pruning.ErdosRenyi(), jw.pruning.Global(), jw.pruning.Global(max_sparsity=0.9)):
        assert n_loops(2, distribution) == n_loops(6, distribution)


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
