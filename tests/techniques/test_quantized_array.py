"""`QuantizedArray` as a pytree and as a weight: every field, every format, any axes."""

import copy
import dataclasses
import pickle
import re

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from stored_weights import READINGS, slow_unless

import jaxweights as jw
from jaxweights.core.axes import Reading
from jaxweights.core.layer import Layer
from jaxweights.formats import MXFP4, NF4_DOUBLE, NVFP4, Format, Integers, ScaleFormat, integers

FORMATS = {
    "int8": integers(8),
    "int3 in blocks": integers(3, block=8),
    "int5, zero points": integers(5, block=16, symmetric=False, scale="bfloat16"),
    "nf4, doubly": dataclasses.replace(NF4_DOUBLE, block=8, scale=ScaleFormat("uint8", 2)),
    "mxfp4": MXFP4,
    "nvfp4": NVFP4,
    "fp8": jw.formats.FP8_E4M3,
    "per tensor": integers(4, per_tensor=True),
    "binary": jw.formats.BINARY,
}
K_QUANTS = Format(Integers(4, 0, 15), 8, ScaleFormat("uint8", 2))
"""As Q4_K of llama.cpp has it: value(code)·scale − minimum."""


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def with_all(q, seed=0):
    """The array with an order of its rows, a scale for each of them, and minima if there are no zero points."""
    rng = np.random.default_rng(seed)
    lead = q.words.shape[:-2]
    order = rng.permuted(np.broadcast_to(np.arange(q.rows, dtype=np.int32), (*lead, q.rows)), axis=-1)
    input_scale = jnp.asarray(rng.uniform(0.5, 2, (*lead, q.rows)), jnp.float32)
    minimum = jax.tree.map(lambda a: a[..., ::-1], q.scale) if q.zero is None else None
    return dataclasses.replace(q, order=jnp.asarray(order), input_scale=input_scale, minimum=minimum)


def dense_of(q):
    """The weight in NumPy, by the description of the class, from `codes`."""
    lead, rows = q.words.shape[:-2], q.rows
    _, block = q.format.blocks(rows)
    over = lambda a: np.repeat(np.float64(a), block, -2)[..., :rows, :] if a.shape[-2] > 1 else np.float64(a)
    table = np.float64(q.format.grid.decode(jnp.arange(2**q.format.grid.bits)))
    w = table[np.asarray(q.codes)] - (0 if q.zero is None else over(q.zero))
    w = w * over(q.scale.values()) - (0 if q.minimum is None else over(q.minimum.values()))
    if q.order is not None:
        in_order = np.zeros_like(w)
        for at in np.ndindex(*lead):
            in_order[at][np.asarray(q.order[at])] = w[at]
        w = in_order
    if q.input_scale is not None:
        w = w * np.float64(q.input_scale)[..., None]
    return np.asarray(q.axes.weight(jnp.asarray(w, jnp.float32), q.shape))


def close(found, expected, name=""):
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max(initial=1), err_msg=name)


def bits(tree):
    return [(a.dtype, np.asarray(a).tobytes()) for a in jax.tree.leaves(tree)]


MOST = ("dense", "output first", "depthwise stack")


@pytest.mark.parametrize("reading", [slow_unless(name in MOST, name) for name in READINGS])
def test_every_field_means_what_it_says(reading):
    """The weight, its transposes, another dtype, its rows and a stack of its slices, with each field and without."""
    shape, axes = READINGS[reading]
    w = normal(*shape)
    names = FORMATS if reading in ("dense", "output first") else ["int3 in blocks", "int5, zero points", "nvfp4"]
    stored = {name: jw.quantize(w, FORMATS[name], axes=axes) for name in names}
    stored |= {f"{name}, all": with_all(q) for name, q in stored.items()}
    permutation = (*range(1, len(shape)), 0)
    index = jnp.array([[1, 0], [shape[0] - 1, 1]])

    @jax.jit
    def run(stored):
        out = {}
        for name, q in stored.items():
            moved, some = q.transpose(permutation), q.take(index)
            out[name] = q.todense(), None if moved is None else moved.todense(), some, q.astype(jnp.bfloat16).todense()
        return out

    r = Reading.of(axes, shape)
    for name, (found, moved, some, half) in run(stored).items():
        q, expected = stored[name], dense_of(stored[name])
        assert q.shape == shape == found.shape and q.dtype == jnp.float32
        close(found, expected, name)
        np.testing.assert_array_equal(half, found.astype(jnp.bfloat16))
        assert (moved is None) == (0 in r.contracted and len(r.contracted) > 1)
        if moved is not None:
            np.testing.assert_array_equal(moved, found.transpose(permutation))
        assert (some is None) == ((0,) not in (r.contracted, r.output) or bool(r.batch))
        if some is not None:
            close(some, found[index], name)
        assert q.read_as(q.axes) is q and q.transpose(range(len(shape))).axes is not None
    assert jax.tree.structure(stored) == jax.tree.structure(jax.tree.map(lambda a: a, stored))


def test_a_minimum_is_subtracted():
    q = with_all(jw.quantize(jnp.abs(normal(20, 5)), K_QUANTS))
    close(q.todense(), dense_of(q))


FIRST_AXES = {
    "rows": ((3, 32, 4), jw.Axes(input=1, output=2, window=0), True),
    "rows that are no whole words": ((3, 5, 4), jw.Axes(input=1, output=2, window=0), False),
    "rows beside a stack": ((3, 2, 32, 4), jw.Axes(input=2, output=3, batch=1, window=0), True),
    "columns": ((3, 24, 4), jw.Axes(input=1, output=(0, 2)), True),
    "table": ((6, 24), jw.Axes(input=1, output=0), True),
    "groups": ((3, 3, 4, 6), jw.axes.depthwise(3), False),
}


@pytest.mark.parametrize("name", FIRST_AXES)
def test_the_first_axis_becomes_one_of_a_stack(name):
    """Where a slice is whole words and blocks, so that a loop over it sees codes."""
    shape, axes, fits = FIRST_AXES[name]
    w, r = normal(*shape), Reading.of(axes, shape)
    left = [tuple(a for a in of if a != 0) for of in (r.input, r.output, r.window)]
    stack_axes = jw.Axes(left[0], left[1], (0, *r.batch), left[2], r.groups)
    names = ["int8", "int3 in blocks", "int5, zero points", "nf4, doubly", "nvfp4", "per tensor"]

    @jax.jit
    def run(w):
        out = {}
        for format in names:
            q = dataclasses.replace(with_all(jw.quantize(w, FORMATS[format], axes=axes)), order=None)
            stack = q.read_as(stack_axes)
            assert (stack is not None) == fits, format
            if stack is not None:
                assert stack.shape == shape and Reading.of(stack.axes, shape).batch[0] == 0
                out[format] = q.todense(), stack.todense(), jax.tree.map(lambda a: a[2], stack).todense()
        return out

    for found, whole, third in run(w).values():
        close(whole, found)
        close(third, found[2])
    ordered = jax.eval_shape(lambda: with_all(jw.quantize(w, 8, axes=axes)))
    assert (jax.eval_shape(lambda q: q.read_as(stack_axes), ordered) is not None) == (0 in r.output and fits)


def test_a_loop_over_the_first_axis_sees_codes():
    """Without batch axes: experts that share the scales of an output unit."""
    w, x = jw.quantize(normal(3, 8, 8), "int4"), normal(2, 8, seed=1)
    f = lambda w, x: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), x @ w), x, w)
    program = str(jax.make_jaxpr(jw.with_stored(f))(w, x))
    assert "i32[3,1,8]" in program and "f32[3,8,8]" not in program
    found, expected = jax.jit(jw.with_stored(f))(w, x), f(w.todense(), x)
    jax.tree.map(lambda a, b: close(a, b), found, expected)


# A pytree


def trees():
    """Every format, and every field."""
    stored = {name: jw.quantize(normal(24, 6), format) for name, format in FORMATS.items()}
    return {**stored, "all": with_all(stored["int8"]), "stack": jw.quantize(normal(2, 24, 6), 4, axes=jw.Axes(batch=0))}


def same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected) and bits(found) == bits(expected)


def test_copies_are_the_same_bit_for_bit(tmp_path):
    """pickle, copy.deepcopy, tree.map, jit with and without donation, and Orbax."""
    tree = trees()
    for copied in (pickle.loads(pickle.dumps(tree)), copy.deepcopy(tree), jax.tree.map(lambda a: a + 0, tree)):
        same(copied, tree)
    same(jax.jit(lambda tree: tree)(tree), tree)
    given = jax.tree.map(jnp.copy, tree)
    same(jax.jit(lambda tree: tree, donate_argnums=0)(given), tree)
    assert all(a.is_deleted() for a in jax.tree.leaves(given))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "orbax", tree)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "orbax", jax.tree.map(ocp.utils.to_shape_dtype_struct, tree))
    same(restored, tree)


def test_plain_tensors_hold_it_bit_for_bit(tmp_path):
    """As safetensors has them: by the names of the arrays."""
    numpy = pytest.importorskip("safetensors.numpy", reason="safetensors is not installed")
    tree = trees()
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree)
    as_bytes = {jax.tree_util.keystr(p): np.asarray(a) for p, a in leaves if a.dtype.name != "float8_e4m3fn"}
    as_bytes |= {jax.tree_util.keystr(p): np.asarray(a).view(np.uint8) for p, a in leaves if a.dtype.itemsize == 1}
    numpy.save_file(as_bytes, tmp_path / "weights.safetensors")
    read = numpy.load_file(tmp_path / "weights.safetensors")
    arrays = [read[jax.tree_util.keystr(p)].view(a.dtype) for p, a in leaves]
    same(jax.tree.unflatten(treedef, map(jnp.asarray, arrays)), tree)


def test_names_of_the_arrays_are_stable():
    """Checkpoints are read by them."""
    q = with_all(jw.quantize(normal(24, 6), NVFP4))
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(q)]
    expected = [".words", ".scale.codes", ".scale.outer", ".minimum.codes", ".minimum.outer", ".order", ".input_scale"]
    assert names == expected
    asymmetric = jw.quantize(normal(24, 6), FORMATS["int5, zero points"])
    found = {jax.tree_util.keystr(path): a.dtype.name for path, a in jax.tree_util.tree_leaves_with_path(asymmetric)}
    assert found == {".words": "int32", ".scale.codes": "bfloat16", ".zero": "int8"}


def test_what_is_static_is_hashed_and_compared_by_value():
    """Equal formats never retrace."""
    traces = []

    @jax.jit
    def f(q):
        traces.append(q.format)
        return q.todense()

    for seed in range(2):
        f(jw.quantize(normal(24, 6, seed=seed), Format(Integers(4, -7, 7), 8)))
        f(jw.quantize(normal(24, 6, seed=seed), "int4", block=8))
    assert len(traces) == 1
    f(jw.quantize(normal(24, 6), "int4", block=12))
    assert len(traces) == 2


def test_it_prints_in_a_line():
    q = jw.quantize(normal(24, 6), 4, block=8)
    assert repr(q) == f"QuantizedArray(24×6 float32 as int4, block 8; {24 * 6 // 2 + 4 * 3 * 6} bytes)"
    assert str(jw.formats.NF4_DOUBLE) == "nf4, block 64, uint8 scales times a factor per 256"
    assert "×" not in repr(jax.tree.map(lambda a: None, q)) and "24×6" in repr(jax.eval_shape(lambda: q))


def test_vmap_and_scan_quantize_as_a_stack_does():
    """Of every format: `vmap` of `quantize`, a loop that quantizes, and batch axes give the same codes."""
    w = normal(3, 24, 6)

    def run(w):
        mapped = {n: jax.vmap(lambda w, f=f: jw.quantize(w, f))(w) for n, f in FORMATS.items()}
        _, scanned = jax.lax.scan(lambda _, w: (None, {n: jw.quantize(w, f) for n, f in FORMATS.items()}), None, w)
        return mapped, scanned, {n: jw.quantize(w, f, axes=jw.Axes(batch=0)) for n, f in FORMATS.items()}

    mapped, scanned, stacked = jax.jit(run)(w)
    assert jax.tree.structure(mapped) == jax.tree.structure(stacked) == jax.tree.structure(scanned)
    assert all(q.shape == (3, 24, 6) for q in mapped.values())
    same(mapped, stacked)
    same(scanned, stacked)


def test_gradients_reach_what_is_not_stored():
    """Through every format, with every field."""
    x, b = normal(3, 24, seed=1), normal(6, seed=2)
    stored = {name: with_all(q) for name, q in trees().items() if name not in ("stack", "all")}

    def loss(b, x, ws):
        return sum(jnp.sum(jnp.tanh(x @ w + b)) for w in ws.values())

    gradients = jax.jit(jax.grad(jw.with_stored(loss), (0, 1)))(b, x, stored)
    for found, expected in zip(gradients, jax.jit(jax.grad(loss, (0, 1)))(b, x, jw.densify(stored)), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


# Meshes


def gathered(hlo):
    """Number of elements of each array that a compiled program gathers."""
    found = re.findall(r"= (\([^)]*\)|\S+) all-gather(?:-start)?\(", hlo)
    return [int(np.prod([int(d) for d in s.split(",") if d])) for r in found for s in re.findall(r"\[([\d,]*)\]", r)]


MESH_FORMATS = ["int8", "int3 in blocks", "int5, zero points", "nf4, doubly", "mxfp4", "nvfp4", "per tensor"]


@pytest.mark.parametrize(
    ("spec", "kind"),
    [
        slow_unless(spec == ("x", "y") or kind == "Auto", spec, kind)
        for spec in [("x", None), (None, "x"), ("x", "y")]
        for kind in ("Auto", "Explicit")
    ],
    ids=str,
)
def test_a_sharded_weight_is_quantized_and_used_where_it_lies(spec, kind):
    """No weight is gathered, the codes are spread as the weight is, and they are those of one device."""
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(jax.sharding.AxisType[kind],) * 2)
    w = normal(256, 32)
    placed = jax.device_put(w, NamedSharding(mesh, PartitionSpec(*spec)))
    quantize = jax.jit(lambda w: {name: jw.quantize(w, FORMATS[name]) for name in MESH_FORMATS})
    compiled = quantize.lower(placed).compile()
    stored, expected = compiled(placed), quantize(w)
    same(jax.device_get(stored), jax.device_get(expected))
    assert all(n < w.size / 2 for n in gathered(compiled.as_text())), gathered(compiled.as_text())
    for name, q in stored.items():
        words = q.words.sharding.shard_shape(q.words.shape)
        assert np.prod(words) < q.words.size, (name, words)


@pytest.mark.parametrize("axis", [0, 1])
def test_codes_may_be_sharded_along_any_axis(axis):
    """What was quantized on one device is placed on eight; the product and its gradient in x are the same."""
    mesh = jax.make_mesh((8,), ("x",))
    w, x = normal(512, 64), normal(3, 512, seed=1)
    stored = {name: jw.quantize(w, FORMATS[name]) for name in MESH_FORMATS}

    def place(a):
        divides = a.ndim == 2 and a.shape[axis] % 8 == 0
        spec = [None] * a.ndim
        if divides:
            spec[axis] = "x"
        return jax.device_put(a, NamedSharding(mesh, PartitionSpec(*spec)))

    @jax.jit
    def run(x, stored):
        return {name: (x @ q, jax.grad(lambda x, q=q: jnp.sum(jnp.square(x @ q)))(x)) for name, q in stored.items()}

    placed = jax.tree.map(place, stored)
    assert all(q.words.sharding.shard_shape(q.words.shape)[axis] * 8 == q.words.shape[axis] for q in placed.values())
    on_mesh = jax.device_put(x, NamedSharding(mesh, PartitionSpec()))  # or JAX cannot tell where the gradient goes
    for name, (y, gradient) in run(on_mesh, placed).items():
        w = np.float64(stored[name].todense())
        close(y, np.float64(x) @ w, name)
        close(gradient, 2 * np.float64(x) @ w @ w.T, name)


def test_slices_of_layers():
    """`Layer` and arrays: batch axes in any place, and slices of them."""
    w = normal(4, 24, 3, 6)
    axes = jw.Axes(input=1, output=3, batch=(0, 2))
    q = with_all(jw.quantize(w, FORMATS["int5, zero points"], axes=axes))
    assert q.layer == Layer.of(axes, w.shape) and q.words.shape[:2] == (4, 3)
    found = np.asarray(q.todense())
    close(found, dense_of(q))
    one = jax.tree.map(lambda a: a[2], q)
    np.testing.assert_array_equal(one.todense(), found[2])
    np.testing.assert_array_equal(jax.tree.map(lambda a: a[1], one).todense(), found[2, :, 1])
