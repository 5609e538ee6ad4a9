"""One-shot quantization against float64 references: the published algorithms, brute force, round to nearest."""

import functools
import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from quantization_references import FORMATS, absmax, factor_of, gptq, integer_grid, nearest, squared_error
from x64 import enable_x64

import jaxweights as jw
from jaxweights.calibration import InputStats
from jaxweights.core.axes import axes_or_default
from jaxweights.formats import integers
from jaxweights.methods import AWQ, GPTQ, HQQ, RoundToNearest
from jaxweights.techniques.quantization.formats import format_of

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6.0])
E4M3 = np.arange(127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
NF4 = np.array(jw.formats.NF4.grid.values)


@functools.cache
def problem(rows=256, columns=128, n=1024, seed=6):
    """(w, x) with correlated inputs of different norms."""
    rng = np.random.default_rng(seed)
    i = np.arange(rows)
    w = rng.normal(size=(rows, columns)) * np.exp(0.3 * rng.normal(size=(rows, columns)))
    x = rng.normal(size=(n, rows)) @ np.linalg.cholesky(0.8 ** np.abs(i[:, None] - i)).T
    return w, x * np.exp(0.7 * rng.normal(size=rows))


def moment(x):
    return x.T @ x / len(x)


def statistics(x, dtype=jnp.float32, axes=None):
    """The statistics of inputs (..., n, rows), summed up in float64."""
    sums = np.abs(x).sum(-2), np.square(x).sum(-2), np.swapaxes(x, -1, -2) @ x
    absolute, squares, products = (jnp.asarray(a, dtype) for a in sums)
    count = jnp.full(x.shape[:-2], x.shape[-2], jnp.int32)
    return InputStats(count=count, absolute=absolute, squares=squares, products=products, axes=axes)


def error(w, new, x):
    """‖X(W' − W)‖² / ‖XW‖², in float64."""
    return np.sum((x @ (np.asarray(new, np.float64) - w)) ** 2) / np.sum((x @ w) ** 2)


@pytest.fixture(scope="module")
def small():
    """A problem with an input that never occurs, and weights that are pruned."""
    w, x = problem(100, 12, 300, 0)
    w = np.where(np.random.default_rng(1).random(w.shape) < 0.1, 0, w)
    return w, np.where(np.arange(100) == 30, 0, x)


def run(methods, w, x, dtype=jnp.float32):
    """The dequantized weights of each method, from one program, in float64."""
    fit_all = jax.jit(lambda w, stats: [m.fit(w, stats).matrix() for m in methods])
    return [np.float64(a) for a in fit_all(jnp.asarray(w, dtype), statistics(x, dtype))]


def block_of(format):
    return format_of(format).block


# GPTQ


def test_gptq_is_the_published_algorithm_in_every_format(small):
    w, x = small
    with enable_x64():
        found = run([GPTQ(format) for format, _ in FORMATS.values()], w, x, jnp.float64)
    for new, (name, (format, fit)) in zip(found, FORMATS.items(), strict=True):
        np.testing.assert_allclose(new, gptq(w, moment(x), fit, block_of(format)), rtol=1e-6, err_msg=name)


OPTIONS = [{"act_order": True}, {"static_groups": True}, {"act_order": True, "static_groups": True}]
SQUARED = {"range": jw.ranges.MSE()}
WITH_OPTIONS = [
    *(("int3 of bf16 in 20", options) for options in OPTIONS),
    *(("int4 in 16, asymmetric", options) for options in OPTIONS),
    *(("nvfp4", options) for options in OPTIONS),
    ("int4", {"act_order": True, "damping": 0.1}),
    ("nf4 double", {"act_order": True}),
    ("mse", SQUARED),
    ("mse", SQUARED | {"act_order": True}),
]


def test_gptq_is_the_published_algorithm_with_every_option(small):
    w, x = small
    formats = FORMATS | {"mse": (integers(4, block=32), squared_error(4))}
    with enable_x64():
        found = run([GPTQ(formats[name][0], **options) for name, options in WITH_OPTIONS], w, x, jnp.float64)
    for new, (name, options) in zip(found, WITH_OPTIONS, strict=True):
        format, fit = formats[name]
        options = {n: value for n, value in options.items() if n != "range"}
        expected = gptq(w, moment(x), fit, block_of(format), **options)
        np.testing.assert_allclose(new, expected, rtol=1e-6, err_msg=f"{name} {options}")


def test_gptq_in_float32_makes_the_codes_of_float64():
    w, x = problem(128, 32, 400, 0)
    (new,) = run([GPTQ(4, block=32)], w, x)
    expected = gptq(np.float64(np.float32(w)), moment(x), absmax(integer_grid(4)), 32)
    assert np.mean(~np.isclose(new, expected, rtol=1e-4)) < 0.002  # halves are rounded either way


def test_blocks_follow_the_order_of_visits_unless_they_are_static():
    w, x = problem(64, 8, 300, 0)
    stats = statistics(x)
    options = [("follow", {}), ("static", {"static_groups": True}), ("one", {"block": 64})]
    fit_all = jax.jit(lambda w: [GPTQ(4, **{"block": 16} | o, act_order=True).fit(w, stats) for _, o in options])
    follow, static, one = fit_all(jnp.float32(w))
    assert static.order is None and one.order is None
    np.testing.assert_array_equal(follow.order, np.argsort(-np.square(x).sum(0)))
    by_hand = np.zeros_like(w)
    values = (np.float64(follow.codes) - 8) * np.repeat(np.float64(follow.scale.values()), 16, 0)
    by_hand[follow.order] = values
    np.testing.assert_allclose(follow.todense(), by_hand, rtol=1e-6)


def test_gptq_of_unrelated_inputs_is_round_to_nearest():
    """Also where no input ever occurs."""
    w = jnp.float32(problem(72, 12, 300, 0)[0])
    names = ("int3 of bf16 in 20", "int4 in 16, asymmetric", "nf4 double", "nvfp4", "binary")
    formats = [FORMATS[name][0] for name in names]

    @jax.jit
    def both(w, products):
        stats = InputStats(count=jnp.int32(1), products=products)
        return [(GPTQ(f).fit(w, stats).matrix(), RoundToNearest(f).fit(w, stats).matrix()) for f in formats]

    for products in (jnp.eye(72), jnp.zeros((72, 72))):
        for name, (new, expected) in zip(names, both(w, products), strict=True):
            np.testing.assert_allclose(new, expected, rtol=1e-6, err_msg=name)


def joint(w, h, n, m, fit):
    """SparseGPT's joint form as published: in one pass, chosen weights become 0 and the others are rounded."""
    h = h + 0.01 * np.mean(np.diag(h)) * np.eye(len(h))
    u, w, new = np.linalg.cholesky(np.linalg.inv(h)).T, w.copy(), np.zeros_like(w)
    grid, scale, zero = fit(w, None)
    for i in range(len(w)):
        if i % m == 0:
            scores = w[i : i + m] ** 2 / np.diag(u)[i : i + m, None] ** 2
            kept = np.argsort(np.argsort(scores, 0), 0) >= m - n
        new[i] = np.where(kept[i % m], nearest(w[i], grid, scale, zero), 0)
        w[i + 1 :] -= np.outer(u[i, i + 1 :], (w[i] - new[i]) / u[i, i])
    return new


def test_gptq_on_a_mask_is_as_good_as_the_joint_form():
    w, x = problem(96, 64, 500, 3)
    stats, masked = statistics(x), jw.methods.SparseGPT((2, 4))
    rounded = GPTQ(4, range=jw.ranges.MSE())
    pruned, new = jax.jit(lambda w: (p := masked.fit(w, stats), rounded.fit(p, stats).todense()))(jnp.float32(w))
    assert np.mean(pruned == 0) == 0.5
    np.testing.assert_array_equal(new[pruned == 0], 0)
    nearest_of_pruned = RoundToNearest(4).fit(pruned, stats).todense()
    expected = error(w, joint(w, moment(x), 2, 4, absmax(integer_grid(4))), x)
    assert error(w, new, x) < min(1.02 * expected, 0.9 * error(w, nearest_of_pruned, x))


# AWQ


def clipped_range(w, x, fit, block, fractions):
    """The weight with each block of each unit clipped by the fraction with the least error of the block's outputs."""
    block = min(block or len(w), len(w))
    starts = range(0, len(w), block)
    tops = np.concatenate([np.broadcast_to(np.abs(w[i : i + block]).max(0), w[i : i + block].shape) for i in starts])
    new, least = w.copy(), np.full((len(starts), w.shape[1]), np.inf)
    for fraction in fractions:
        clipped = np.clip(w, -fraction * tops, fraction * tops)
        rounded = rounded_in_blocks(w, clipped, fit, block)
        for j, i in enumerate(starts):
            here = slice(i, i + block)
            errors = np.sum((x[:, here] @ (rounded - w)[here]) ** 2, 0)
            better = errors < least[j] * (1 - 1e-9)
            new[here][:, better], least[j] = clipped[here][:, better], np.where(better, errors, least[j])
    return new


def rounded_in_blocks(w, range_of, fit, block):
    block = min(block or len(w), len(w))
    blocks = [range_of[i : i + block] for i in range(0, len(w), block)]
    factor = factor_of(fit, blocks, max(np.abs(b).max() for b in blocks))
    starts = range(0, len(w), block)
    return np.concatenate([nearest(w[i : i + block], *fit(b, factor)) for i, b in zip(starts, blocks, strict=True)])


def awq(w, x, fit, block, clip):
    """AWQ as published, by the outputs on the data, in float64."""
    mean = np.abs(x).mean(0)
    mean = np.where(mean == 0, mean[mean > 0].min(), mean)

    def scale(alpha):
        s = mean**alpha
        return (s / np.sqrt(s.max() * s.min()))[:, None]

    def error_of(s, range_of):
        return np.sum((x @ (rounded_in_blocks(w * s, range_of, fit, block) / s - w)) ** 2)

    scales = [scale(i / 20) for i in range(20)]
    s = scales[np.argmin([error_of(s, w * s) for s in scales])]
    range_of = w * s
    if clip:
        clipped = clipped_range(w * s, x / s.T, fit, block, [1 - i / 20 for i in range(10)])
        range_of = clipped if error_of(s, clipped) < error_of(s, range_of) else range_of
    return rounded_in_blocks(w * s, range_of, fit, block) / s


@pytest.mark.parametrize(
    "cases",
    [
        [("int3 of bf16 in 20", True), ("int4 in 16, asymmetric", True), ("nvfp4", True), ("int8", False)],
        pytest.param(
            [(name, clip) for name in ("int8", "int4 in 16", "nf4", "ternary") for clip in (True, False)],
            marks=pytest.mark.slow,
        ),
    ],
    ids=["some", "more"],
)
def test_awq_finds_what_brute_force_finds(small, cases):
    w, x = small
    with enable_x64():
        found = run([AWQ(FORMATS[name][0], clip=clip) for name, clip in cases], w, x, jnp.float64)
    for new, (name, clip) in zip(found, cases, strict=True):
        format, fit = FORMATS[name]
        expected = awq(w, x, fit, block_of(format), clip)
        np.testing.assert_allclose(new, expected, rtol=1e-6, err_msg=f"{name}, clip={clip}")


# HQQ


def test_hqq_has_smaller_errors_than_the_range_it_starts_from():
    """In the norm with p = .7, in each block."""
    w, _ = problem(128, 32, 400, 0)
    w[::50] *= 5  # outliers
    q = HQQ(3, block=32).fit(jnp.float32(w), InputStats())
    assert q.zero is not None and q.format == integers(3, block=32, symmetric=False)
    blocks = w.reshape(4, 32, 32)
    low, high = blocks.min(1, keepdims=True), blocks.max(1, keepdims=True)
    scale = (high - low) / 7
    of_range = np.clip(np.round((blocks - low) / scale), 0, 7) * scale + low
    norms = [np.sum(np.abs(new - blocks) ** 0.7, 1) for new in (np.float64(q.todense()).reshape(4, 32, 32), of_range)]
    assert (norms[0] <= norms[1] * (1 + 1e-5)).all()
    assert norms[0].sum() < 0.97 * norms[1].sum()


# All methods

METHODS = (RoundToNearest, GPTQ, AWQ)


@pytest.mark.parametrize(
    ("block", "widths"),
    [
        (32, (4, 2)),
        pytest.param(32, (8, 6, 3), marks=pytest.mark.slow),
        pytest.param(None, (8, 6, 4, 3, 2), marks=pytest.mark.slow),
    ],
)
def test_data_helps_at_the_same_bytes(block, widths):
    """Output errors of correlated inputs."""
    w, x = problem(128, 64)
    cases = list(itertools.product(widths, METHODS))
    found = run([method(bits, block=block) for bits, method in cases], w, x)
    errors = {case: error(w, new, x) for case, new in zip(cases, found, strict=True)}
    for bits in widths:
        assert errors[bits, GPTQ] < 0.8 * errors[bits, RoundToNearest], bits
        assert errors[bits, AWQ] < 0.98 * errors[bits, RoundToNearest], bits
    of_nearest, of_gptq, of_awq = (jax.eval_shape(m(4, block=block).fit, w, statistics(x)).nbytes for m in METHODS)
    assert of_gptq == of_nearest and of_awq == of_nearest + 4 * 128  # 1/s


LAYOUTS = {  # matrices of one shape, compiled once
    "attention out": ((2, 8, 6), jw.axes.ATTENTION_OUT),
    "conv": ((2, 2, 4, 6), None),
    "depthwise": ((16, 1, 1, 18), jw.axes.depthwise(3)),
    "two batch axes": ((3, 16, 2, 6), jw.Axes(1, 3, (2, 0))),
}
SLOW = ("attention out", "conv")


@jax.jit
def all_methods(w, stats):
    methods = [GPTQ(4, block=6, act_order=True), AWQ("nvfp4"), GPTQ(jw.formats.NF4_DOUBLE)]
    return [m.fit(w, stats).todense() for m in methods]


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in LAYOUTS])
def test_every_matrix_of_a_weight_is_quantized_alone(name):
    shape, axes = LAYOUTS[name]
    w = jnp.float32(np.random.default_rng(0).normal(size=shape))
    read = axes_or_default(axes, len(shape)).matrix
    matrix = read(w)
    lead, rows = matrix.shape[:-2], matrix.shape[-2]
    rng = np.random.default_rng(1)
    x = rng.normal(size=(*lead, 50, rows)) * np.exp(rng.normal(size=(*lead, 1, rows)))
    whole = [read(a) for a in all_methods(w, statistics(x, axes=axes))]
    assert [a.shape for a in all_methods(w, statistics(x, axes=axes))] == [shape] * len(whole)
    for i in np.ndindex(*lead):
        for a, b in zip(whole, all_methods(matrix[i], statistics(x[i])), strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_values_are_finite_and_errors_small(dtype):
    rng = np.random.default_rng(0)
    w = rng.normal(size=(16, 4))
    kinds = {"zero": 0 * w, "constant": np.full((16, 4), 0.5), "huge": 1e30 * np.sign(w), "tiny": 1e-30 * np.sign(w)}
    x = rng.normal(size=(50, 16))
    for name, kind in kinds.items():
        kind = jnp.asarray(kind, dtype)
        for inputs in (x, 0 * x, np.ones_like(x), 1e-15 * x, 1e15 * x):
            for new in all_methods(kind, statistics(inputs)):
                assert new.dtype == dtype and np.isfinite(np.float32(new)).all(), name
                scale = np.abs(np.float64(kind)).max() or 1
                assert np.abs(np.float64(new) - np.float64(kind)).max() <= (0 if name == "zero" else 0.35) * scale, name


@pytest.mark.parametrize("shape", [(0, 3), (4, 0)])
def test_weights_of_no_size(shape):
    stats = statistics(np.ones((5, shape[0])))
    assert all(m(4).fit(jnp.zeros(shape), stats).shape == shape for m in (*METHODS, HQQ))


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_a_weight_sharded_over_its_output_units_stays_so(kind):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType[kind],))
    w, x = problem(32, 64, 100, 0)
    w, stats = jnp.float32(w), statistics(x)
    placed = jax.device_put(w, NamedSharding(mesh, PartitionSpec(None, "x")))
    stats = jax.device_put(stats, NamedSharding(mesh, PartitionSpec()))
    for method in (GPTQ(4, block=8, act_order=True), AWQ("nvfp4")):
        q, expected = jax.jit(method.fit)(placed, stats), method.fit(w, statistics(x))
        np.testing.assert_allclose(q.matrix(), expected.matrix(), rtol=1e-5)
        assert q.words.sharding.spec[-1] == "x"


def test_a_model_is_quantized_by_rules_and_runs_stored():
    rng = np.random.default_rng(0)
    params = {f"layer_{i}": {"kernel": jnp.float32(rng.normal(size=(64, 64)) / 8)} for i in range(3)}
    batches = [jnp.float32(rng.normal(size=(200, 24)) @ rng.normal(size=(24, 64)))] * 2

    def f(params, x):
        for i in range(3):
            x = jax.nn.relu(x @ params[f"layer_{i}"]["kernel"])
        return x

    def distance(rules):
        new = jw.compress(f, params, batches, rules, sequential=True)
        y = f(params, batches[0])
        return new, float(jnp.sum((jw.with_stored(f)(new, batches[0]) - y) ** 2) / jnp.sum(y**2))

    new, of_methods = distance(
        {"layer_0/*": GPTQ(4), "layer_1/*": AWQ(4), "**": (jw.methods.SparseGPT(0.1), GPTQ("nf4"))}
    )
    kernel = new["layer_1"]["kernel"]
    assert isinstance(kernel, jw.QuantizedArray) and kernel.input_scale.shape == (64,)
    assert of_methods < 0.5 * distance(RoundToNearest(4))[1]
