"""Training on a grid: what it sees is what is stored, gradients, moving ranges, learned scales, schedules, zeros."""

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from trained_formats import DTYPES, FORMATS, KEY, READINGS, normal, same_bits

import jaxweights as jw

# What training sees is what is stored.


SOME = [("dense", jnp.float32), ("conv", jnp.bfloat16), ("batch last", jnp.float16), ("depthwise", jnp.float32)]
ALL = [(name, dtype) for name in READINGS for dtype in DTYPES]


@pytest.mark.parametrize("cases", [pytest.param(SOME, id="some"), pytest.param(ALL, id="all", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", FORMATS)
def test_what_training_sees_is_what_is_stored(name, cases):
    """In one program with other work around it, and stored in another."""
    format = FORMATS[name]
    weights = {(n, d.__name__): normal(*READINGS[n][0], dtype=d) for n, d in cases}
    axes = {key: READINGS[key[0]][1] for key in weights}

    @jax.jit
    def trained(weights, step):
        moved = jax.tree.map(lambda w: w - step.astype(w.dtype) * jnp.sin(w), weights)
        return moved, {k: jw.fake_quantize(w, format, axes=axes[k]) for k, w in moved.items()}

    moved, seen = trained(weights, jnp.float32(0.1))
    stored = jax.jit(lambda ws: {k: jw.quantize(w, format, axes=axes[k]) for k, w in ws.items()})(moved)
    dense = jax.jit(lambda stored: jax.tree.map(jw.dequantize, stored, is_leaf=is_stored))(stored)
    for key, found in seen.items():
        same_bits(found, dense[key], f"{name} {key}")


def is_stored(leaf):
    return isinstance(leaf, jw.QuantizedArray)


RANGES = {
    "percentile": jw.ranges.Percentile(99.0),
    "mean": jw.ranges.AbsMean(),
    "mse": jw.ranges.MSE(steps=20),
    "hqq": jw.ranges.HQQ(steps=5),
}


@pytest.mark.parametrize("name", RANGES)
def test_every_range_is_the_same_in_training(name):
    formats = [
        jw.formats.integers(3, block=block, symmetric=name != "hqq" and s) for block in (None, 8) for s in (0, 1)
    ]
    if name == "mean":
        formats = [f for f in formats if not f.zero_point]
    w = normal(48, 20)

    @jax.jit
    def both(w):
        seen = [jw.fake_quantize(w, f, range=RANGES[name]) for f in formats]
        return seen, [jw.dequantize(jw.quantize(w, f, range=RANGES[name])) for f in formats]

    for found, expected, apart in zip(*both(w), [jw.quantize(w, f, range=RANGES[name]) for f in formats], strict=True):
        if name == "percentile":  # interpolates, with a fused multiply-add in one program and not in another
            np.testing.assert_allclose(found, expected, rtol=1e-6)
            continue
        same_bits(found, expected)
        same_bits(found, jw.dequantize(apart))


def trained_state(t, w):
    """The state after three updates on other weights."""
    state = t.init(w, KEY)
    for i in range(3):
        state = t.update(w * (1.0 + 0.1 * i), state)
    return state


MOVING = {
    "symmetric": jw.FakeQuantize("int4", decay=0.9),
    "blocks": jw.FakeQuantize("mxfp4", decay=0.9),
    "double": jw.FakeQuantize(jw.formats.NF4_DOUBLE, decay=0.5),
    "zero points": jw.FakeQuantize(jw.formats.integers(4, block=8, symmetric=False), decay=0.9),
    "a number": jw.FakeQuantize(4, keep_zeros=True, decay=0.9),
    "by unit": jw.FakeQuantize(4, per_unit=True, keep_zeros=True, decay=0.9),
    "without averages": jw.FakeQuantize(5, keep_zeros=True),
}
LEARNED = {name: jw.LSQ(FORMATS[name]) for name in FORMATS}
SLOW = LEARNED.keys() - {"int4", "nf4", "mxfp8", "zero points of blocks", "double"}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in MOVING | LEARNED]
)
def test_a_trained_state_is_stored_bit_for_bit(name):
    t = (MOVING | LEARNED)[name]
    readings = {n: READINGS[n] for n in ("dense", "conv", "batch last")}
    cases = {n: (normal(*shape), t.with_axes(axes)) for n, (shape, axes) in readings.items()}

    @jax.jit
    def run(weights):
        states = {n: trained_state(spec, weights[n]) for n, (_, spec) in cases.items()}
        if name in LEARNED:
            states = jax.tree.map(lambda a: a * -0.7 if a.ndim else a * 0.7, states)
        return states, {n: spec.apply(weights[n], states[n]) for n, (_, spec) in cases.items()}

    states, seen = run({n: w for n, (w, _) in cases.items()})
    for n, (w, spec) in cases.items():
        q = spec.store(w, states[n])
        assert is_stored(q)
        same_bits(q.todense(), seen[n], f"{name} {n}")
        assert not np.array_equal(seen[n], w)


# Gradients.


def test_the_gradient_passes_to_clipped_weights_too():
    w, cotangent = normal(32, 6), normal(32, 6, seed=1)
    clipping = [
        jw.FakeQuantize("int4", range=jw.ranges.Percentile(50.0)),
        jw.FakeQuantize("nf4"),
        jw.FakeQuantize("mxfp8"),
    ]
    for t in (*clipping, jw.FakeQuantize(3, keep_zeros=True), jw.FakeQuantize(3, decay=0.9)):
        state = jax.tree.map(lambda a: a / 4, t.init(w, KEY))
        _, transpose = jax.vjp(lambda w, t=t, state=state: t.apply(w, state), w)
        np.testing.assert_array_equal(transpose(cotangent)[0], cotangent)


# Moving averages.


def test_moving_averages_follow_the_range():
    decay, ws = 0.75, [np.float64(normal(30, 4, seed=i)) * (i + 1) for i in range(3)]
    cases = {
        jw.FakeQuantize(4, decay=decay): (lambda w: w.min(keepdims=True), lambda w: w.max(keepdims=True)),
        jw.FakeQuantize(4, per_unit=True, decay=decay): (
            lambda w: w.min(0, keepdims=True),
            lambda w: w.max(0, keepdims=True),
        ),
        jw.FakeQuantize("int8", decay=decay): (None, lambda w: np.abs(w).max(0, keepdims=True)),
        jw.FakeQuantize("int8", range=jw.ranges.Percentile(90.0), decay=decay): (
            None,
            lambda w: np.percentile(np.abs(w), 90, axis=0, keepdims=True),
        ),
    }
    for t, (low, high) in cases.items():
        state = t.init(jnp.float32(ws[0]), KEY)
        expected = {n: f(ws[0]) for n, f in (("low", low), ("high", high)) if f}
        for w in ws[1:]:
            state = t.update(jnp.float32(w), state)
            expected = {n: decay * e + (1 - decay) * {"low": low, "high": high}[n](w) for n, e in expected.items()}
        assert state.keys() == expected.keys()
        for n, e in expected.items():
            np.testing.assert_allclose(state[n], e, rtol=1e-5)
        out = np.asarray(t.apply(jnp.float32(10 * ws[0]), state))  # beyond the range: clipped to it
        np.testing.assert_allclose(out.max(0), np.broadcast_to(expected["high"], out.shape)[0], rtol=1e-5)


# Schedules.


def test_bits_fall_on_a_schedule():
    w = normal(40, 30)
    schedule = optax.piecewise_constant_schedule(8.0, {1: 0.5, 2: 0.5})  # 8, 4, 2
    for keep_zeros in (False, True):
        t = jw.FakeQuantize(schedule, keep_zeros=keep_zeros)
        update, apply = jax.jit(t.update), jax.jit(t.apply)
        state = t.init(w, KEY)
        for bits in (8, 4, 2):
            state = update(w, state)
            out = apply(w, state)
            fixed = jw.fake_quantize(w, bits, keep_zeros=keep_zeros)
            np.testing.assert_allclose(out, fixed, atol=1e-6)
            assert len(np.unique(out)) <= 2**bits
        if keep_zeros:
            last = dataclasses.replace(t, bits=2)
            same_bits(last.store(w, {}).todense(), out)


def test_a_delay_leaves_weights_until_it_is_over():
    w = normal(16, 4)
    for t in (jw.FakeQuantize(3, delay=2), jw.FakeQuantize("nf4", delay=2, decay=0.9)):
        state, seen = t.init(w, KEY), []
        for _ in range(4):
            state = t.update(w, state)
            seen.append(bool((t.apply(w, state) == w).all()))
        assert seen == [True, True, False, False]
        restarted = t.apply(w, t.init(w, KEY))
        np.testing.assert_array_equal(restarted, w)


# Zeros.


KEEPING = {name: jw.FakeQuantize(f) for name, f in FORMATS.items() if name != "binary"} | {
    "keep_zeros": jw.FakeQuantize(8, keep_zeros=True),
    "keep_zeros by unit": jw.FakeQuantize(2, per_unit=True, keep_zeros=True),
    "percentile": jw.FakeQuantize(jw.formats.integers(4, symmetric=False), range=jw.ranges.Percentile(99.0)),
    "mse": jw.FakeQuantize(jw.formats.integers(4, symmetric=False), range=jw.ranges.MSE(steps=9)),
    "moving": jw.FakeQuantize(4, keep_zeros=True, decay=0.9),
    "lsq": jw.LSQ(4),
    "lsq+": jw.LSQ(jw.formats.integers(4, symmetric=False)),
}
LOSING = {
    "min-max": jw.FakeQuantize(8),
    "a schedule": jw.FakeQuantize(lambda step: 8),
    "binary": jw.FakeQuantize("binary"),
    "hqq": jw.FakeQuantize(jw.formats.integers(4, symmetric=False), range=jw.ranges.HQQ()),
    "lsq binary": jw.LSQ("binary"),
    "a chain": jw.Chain(jw.FakeQuantize(8), jw.ClipWeights(1.0)),
}


def test_pruned_weights_stay_pruned():
    w = normal(64, 32) + 0.3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        chains = {name: jw.Chain(jw.Prune(0.9), t) for name, t in KEEPING.items()}

    @jax.jit
    def run(w):
        return {name: chain.apply(w, chain.init(w, KEY)) for name, chain in chains.items()}

    mask = np.asarray(jw.magnitude_mask(w, 0.9))
    for name, out in run(w).items():
        assert not np.asarray(out)[~mask].any() and np.asarray(out)[mask].any(), name


@pytest.mark.parametrize("name", LOSING)
def test_a_chain_says_so_where_zeros_are_lost(name):
    w, masks = normal(64, 32) + 0.3, [jw.Prune(0.9), jw.Sparsify(0.5), jw.KeepZeros(), jw.Regrow(jw.Prune(0.9))]
    for mask in (*masks, jw.Chain(jw.ClipWeights(1.0), masks[0])):
        with pytest.warns(UserWarning, match="moves the zeros of a mask"):
            chain = jw.Chain(mask, LOSING[name])
    state = chain.update(w, chain.init(w, KEY))
    assert (np.asarray(chain.apply(w, state)) == 0).mean() < 0.5  # it is so
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        chain.with_axes(jw.Axes())
        jw.Chain(LOSING[name], masks[0])
        jw.Chain(jw.ClipWeights(1.0), LOSING[name])
        jw.Chain(masks[0], jw.ClipWeights(1.0))


# Real use.


def test_a_model_trains_in_three_bits_and_is_stored():
    """Of ten classes, on a tree, with learned scales in the optimizer."""
    datasets = pytest.importorskip("sklearn.datasets")
    images, labels = datasets.load_digits(return_X_y=True)
    x, y = jnp.float32(images[:1200] / 16), jnp.asarray(labels[:1200])
    keys = jax.random.split(KEY, 2)
    params = {"a": {"kernel": jw.he_normal(keys[0], (64, 32))}, "b": {"kernel": jw.he_normal(keys[1], (32, 10))}}

    def logits(params, x):
        return jax.nn.relu(x @ params["a"]["kernel"]) @ params["b"]["kernel"]

    def loss(params):
        return optax.softmax_cross_entropy_with_integer_labels(logits(params, x), y).mean()

    for t in (jw.FakeQuantize("int3"), jw.LSQ("int3")):
        lifted, tx = jw.on_tree(t), optax.adam(1e-2)

        @jax.jit
        def train(params, lifted=lifted, tx=tx):
            state = lifted.init(params, KEY)

            def step(carry, _):
                params, learned, opt = carry
                with_learned = lambda p, s: loss(lifted.apply(p, jw.TreeState(s, state.fixed)))
                updates, opt = tx.update(jax.grad(with_learned, (0, 1))(params, learned), opt)
                return (*optax.apply_updates((params, learned), updates), opt), None

            start = (params, state.learned, tx.init((params, state.learned)))
            (params, learned, _), _ = jax.lax.scan(step, start, length=60)
            return params, jw.TreeState(learned, state.fixed)

        trained, state = train(params)
        stored = lifted.store(trained, state)
        seen = lifted.apply(trained, state)
        for n in trained:
            same_bits(stored[n]["kernel"].todense(), seen[n]["kernel"])
        test_x, test_y = jnp.float32(images[1200:] / 16), labels[1200:]
        accuracy = (np.asarray(jw.with_stored(logits)(stored, test_x)).argmax(1) == test_y).mean()
        assert accuracy > 0.8
