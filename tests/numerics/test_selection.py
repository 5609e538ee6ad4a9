"""Exact selection against NumPy's stable argsort, its program on a mesh, and its memory use."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from x64 import enable_x64

from jaxweights.numerics.counts import count
from jaxweights.numerics.pool import Pool
from jaxweights.numerics.selection import Entries, by_magnitude, by_value, smallest_mask, smallest_masks

FLOATS = [jnp.float32, jnp.bfloat16, jnp.float16]
RANKS = [by_magnitude, by_value]
named = {"ids": lambda x: getattr(x, "__name__", str(x))}


def argsort_rule(x, k, rank=by_magnitude):
    """Mask of the k smallest of each row, ties by index, NaN last."""
    x = np.asarray(x, np.float64)
    order = np.argsort(np.abs(x) if rank is by_magnitude else x, axis=-1, kind="stable")
    places = np.empty_like(order)
    np.put_along_axis(places, order, np.broadcast_to(np.arange(x.shape[-1]), x.shape), -1)
    return places < np.reshape(k, (-1, 1))


def rows(dtype, n, cases=10_000):
    """Rows of every kind: normal at all scales, few distinct values, special values, constant."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(cases, n)) * 10.0 ** rng.integers(-3, 3, (cases, 1))
    x[cases // 4 :] = rng.integers(-2, 3, (len(x[cases // 4 :]), n))
    special = [np.nan, -np.nan, 0.0, -0.0, 1.0, -1.0, 2.0**-6]
    if dtype != jnp.float8_e4m3fn:
        special += [np.inf, -np.inf, float(jnp.finfo(dtype).smallest_subnormal)]
    x[cases // 2 : -99] = rng.choice(special, (len(x[cases // 2 : -99]), n))
    x[-99:] = rng.choice(special, (99, 1))
    k = rng.integers(0, n + 1, cases)
    k[::10], k[1::10] = 0, n
    return np.asarray(x).astype(dtype), k


@pytest.mark.parametrize("dtype", FLOATS, **named)
@pytest.mark.parametrize("rank", RANKS, **named)
def test_ten_thousand_cases_are_the_argsort_rule(dtype, rank):
    x, k = rows(dtype, 48)
    expected = argsort_rule(x, k, rank)
    got = jax.jit(jax.vmap(lambda x, k: smallest_mask(x, k, rank=rank)))(jnp.asarray(x), jnp.asarray(k))
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("n", [1, 8, 37])
def test_along_axes_is_one_selection_for_each_index_of_the_others(n):
    """Few entries, which are compared pairwise, and more; 8-bit floats; axes in any position."""
    cases = [rows(dtype, n, 500) for dtype in (jnp.float32, jnp.float8_e4m3fn)]
    last, first, apart = lambda a: a, lambda a: a.T, lambda a: a.reshape(10, 50, -1, 1).transpose(0, 2, 1, 3)

    @jax.jit
    def select(cases):
        along = lambda x, k, place, axis, rank: smallest_mask(place(x), place(k[:, None]), axis=axis, rank=rank)
        inner = [[along(x, k, last, (1,), rank) for rank in RANKS] for x, k in cases]
        return inner, [along(*cases[0], place, axis, by_value) for place, axis in ((first, (0,)), (apart, (1, -1)))]

    inner, others = select([(jnp.asarray(x), jnp.asarray(k)) for x, k in cases])
    for (x, k), masks in zip(cases, inner, strict=True):
        for rank, mask in zip(RANKS, masks, strict=True):
            np.testing.assert_array_equal(mask, argsort_rule(x, k, rank), err_msg=f"{x.dtype} {rank.__name__}")
    for place, mask in zip((first, apart), others, strict=True):
        np.testing.assert_array_equal(mask, place(argsort_rule(*cases[0], by_value)))


@pytest.mark.parametrize("shape", [(40, 256), (3, 3, 16, 256), (7, 1, 129), (4096,)], ids=str)
def test_of_arrays_whose_axes_are_split(shape):
    x = np.random.default_rng(0).normal(size=shape).round(2)  # many ties
    ks = np.array([1, x.size // 3, x.size - 1])
    select = jax.jit(lambda x, ks: jax.lax.map(lambda k: smallest_mask(x, k), ks))
    for dtype in FLOATS:
        a = x.astype(dtype)
        expected = argsort_rule(np.broadcast_to(a.reshape(1, -1), (len(ks), a.size)), ks)
        found = select(jnp.asarray(a), ks)
        np.testing.assert_array_equal(np.reshape(found, expected.shape), expected, err_msg=dtype.__name__)


def test_of_several_arrays_is_that_of_one():
    rng = np.random.default_rng(0)
    xs = [rng.normal(size=(3, 4)), rng.integers(-2, 3, (2, 5)), rng.normal(size=()), np.zeros((0, 3)), np.ones(7)]
    dtypes = [np.float32, jnp.bfloat16, np.float32, np.float16, np.float16]
    xs = [np.asarray(x, d) for x, d in zip(xs, dtypes, strict=True)]
    every = np.concatenate([np.asarray(x, np.float32).ravel() for x in xs])
    ks = np.arange(len(every) + 1)
    for rank in RANKS:
        select = lambda k, rank=rank: smallest_masks(list(map(jnp.asarray, xs)), k, rank=rank)
        masks = jax.jit(lambda ks, select=select: jax.lax.map(select, ks))(ks)
        assert [m.shape[1:] for m in masks] == [x.shape for x in xs]
        found = np.concatenate([np.reshape(m, (len(ks), -1)) for m in masks], 1)
        np.testing.assert_array_equal(found, argsort_rule(np.tile(every, (len(ks), 1)), ks, rank))
    assert smallest_masks([], 0) == []
    half, brain = jnp.float16([1.0, 300.0]), jnp.bfloat16([1.0078125, 2.0])
    np.testing.assert_array_equal(smallest_masks([half, brain], 3), [[True, False], [True, True]])


def test_arrays_that_are_alike_are_stacked_and_tie_in_order():
    rng = np.random.default_rng(0)
    shapes, alike = [(3, 5), (7,), (3, 5), (2, 2), (7,), (3, 5)], "abacbd"
    xs = [rng.integers(-2, 3, s).astype(np.float32) for s in shapes]
    every = np.concatenate([x.ravel() for x in xs])
    ks = np.arange(len(every) + 1)
    select = lambda k: smallest_masks(list(map(jnp.asarray, xs)), k, alike=alike)
    found = np.concatenate([np.reshape(m, (len(ks), -1)) for m in jax.jit(jax.vmap(select))(ks)], 1)
    np.testing.assert_array_equal(found, argsort_rule(np.tile(every, (len(ks), 1)), ks))


@pytest.mark.parametrize("dtype", [*FLOATS, jnp.float8_e4m3fn], **named)
@pytest.mark.parametrize("n", [12, 40])
def test_entries_that_come_first_or_last_whatever_their_values(dtype, n):
    """Infinity and NaN of either sign among them; along an axis of few entries, of more, and of several arrays."""
    x, k = rows(dtype, n, 400)
    first, last = np.random.default_rng(1).random((2, *x.shape)) < [[[0.3]], [[0.4]]]
    last &= ~first
    # The places of the values, with those that come first or last moved to either end; they tie among themselves.
    order = np.where(first, -1.0, np.where(last, n, np.float64(rank_places(x))))
    expected = argsort_rule(order, k, by_value)
    along = lambda x, first, last, k: smallest_mask(Entries(x, first, last), k[:, None], axis=(1,), rank=by_value)
    np.testing.assert_array_equal(jax.jit(along)(x, first, last, k), expected)
    joint = lambda x, first, last, k: smallest_masks(
        [Entries(a, b, c) for a, b, c in zip(*(jnp.split(a, 2) for a in (x, first, last)), strict=True)],
        k,
        rank=by_value,
    )
    found = np.concatenate(jax.jit(jax.vmap(joint))(x[:50], first[:50], last[:50], k[:50]), 1)
    np.testing.assert_array_equal(found, expected[:50])


def rank_places(x):
    """For each entry of a row, how many distinct values are below it; NaN of either sign is one, above infinity."""
    x = np.where(np.isnan(np.float64(x)), np.nan, np.float64(x))
    return np.stack([np.unique(row, return_inverse=True)[1] for row in x])


def test_float64():
    with enable_x64(True):
        x = np.concatenate([1 + np.random.default_rng(0).normal(size=50) * 1e-12, [0, 0, np.nan, np.inf]])
        for k in (0, 1, 3, 25, 53, 54):
            np.testing.assert_array_equal(smallest_mask(jnp.asarray(x), k), argsort_rule(x[None], k)[0])


def test_scalars_nothing_and_counts_out_of_range():
    assert not smallest_mask(jnp.float32(2), 0) and smallest_mask(jnp.float32(2), 1)
    assert smallest_mask(jnp.zeros((0, 3)), 0).shape == (0, 3)
    assert smallest_mask(jnp.zeros((3, 0)), 0, axis=(1,)).shape == (3, 0)
    x = jnp.array([3.0, jnp.nan, 1.0])
    assert smallest_mask(x, 9).all() and not smallest_mask(x, jnp.int32(-1)).any()


# Size


def test_counts_past_32_bits(optimizing):
    """Counts in a virtual array of 70,000 x 65,536 entries, using only its indices and storing none."""

    def counts():
        pool = Pool(jnp.zeros((70_000, 65_536)), (0, 1))
        row = jax.lax.broadcasted_iota(jnp.uint32, pool.x.shape, 0)  # sixteenths of the rows
        return pool.count([row < 15, row < 16])

    # Fast compilation yields a scalar loop that takes 15 seconds.
    fewer, every = jax.jit(counts, compiler_options=optimizing)()
    assert int(every.hi) * 2**32 + int(every.lo) == 70_000 * 65_536
    assert int(fewer.hi) * 2**32 + int(fewer.lo) == 70_000 * 65_536 * 15 // 16


@pytest.mark.parametrize("shape", [(3_000_000_000,), (99_999, 65_535), (2**20, 2**17)], ids=str)
def test_arrays_past_32_bits_compile(shape):
    x = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    k = count(2**31 + 5)
    compiled = jax.jit(lambda x: smallest_mask(x, k)).lower(x).compile()
    assert compiled.memory_analysis().temp_size_in_bytes <= 2 * 2 * x.size


# Programs


@pytest.mark.parametrize(
    ("rank", "dtype"),
    [
        (by_magnitude, jnp.float32),
        (by_value, jnp.bfloat16),
        pytest.param(by_magnitude, jnp.bfloat16, marks=pytest.mark.slow),
        pytest.param(by_value, jnp.float32, marks=pytest.mark.slow),
    ],
    **named,
)
@pytest.mark.parametrize("shape", [(1024, 1025), (3, 3, 512, 256)], ids=str)
def test_temporary_memory_is_at_most_twice_the_array(shape, rank, dtype):
    x = jax.ShapeDtypeStruct(shape, dtype)
    compiled = jax.jit(lambda x: smallest_mask(x, 1000, rank=rank)).lower(x).compile()
    assert compiled.memory_analysis().temp_size_in_bytes <= 2 * x.size * x.dtype.itemsize


def collectives(hlo):
    """(kind, shape) of each collective operation."""
    kinds = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter|collective-broadcast"
    return [(kind, shape) for shape, kind in re.findall(rf"= (\S+|\([^)]*\)) ({kinds})(?:-start)?\(", hlo)]


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_on_a_mesh_only_sums_of_counts_cross_devices(kind):
    """Their number and size do not depend on the size of the array."""
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(jax.sharding.AxisType[kind],) * 2)
    found = []
    for shape in [(128, 512), (512, 1024)]:
        x = np.random.default_rng(0).normal(size=shape).astype(np.float32).round(2)
        placed = jax.device_put(x, NamedSharding(mesh, PartitionSpec("x", "y")))
        compiled = jax.jit(lambda x: smallest_mask(x, x.size // 2)).lower(placed).compile()
        found.append(collectives(compiled.as_text()))
        mask = np.asarray(compiled(placed)).ravel()
        np.testing.assert_array_equal(mask, argsort_rule(x.reshape(1, -1), x.size // 2)[0])
        assert compiled.output_shardings.is_equivalent_to(placed.sharding, 2)
    assert {kind for kind, _ in found[0]} == {"all-reduce"}
    assert sorted(found[0]) == sorted(found[1])
