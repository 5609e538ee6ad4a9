"""Warnings of axes that are a guess: for which transforms, and once a path."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxweights as jw
from jaxweights.core.axes import Reading

KEY = jax.random.key(0)
STACK, CONV, HEADS = jw.Axes(batch=0), jw.axes.CONV, jw.axes.ATTENTION_IN
READINGS = {
    "transposed": ((4, 8), jw.axes.DENSE, jw.Axes(-1, -2)),
    "conv or stack": ((4, 8, 6), CONV, STACK),
    "conv or heads": ((4, 8, 6), CONV, HEADS),
    "rows in another order": ((4, 8, 6), CONV, jw.axes.dense_general(2, 1)),
    "depthwise": ((3, 3, 1, 8), CONV, jw.axes.depthwise(8)),
    "stack of one": ((1, 8, 6), CONV, STACK),
}
TRANSFORMS = {
    "clip": jw.ClipWeights(0.5),
    "weight norm": jw.WeightNorm(scale=2.0),
    "standardization": jw.WeightStandardization(scaled=True),
    "center": jw.projections.Center(),
    "clip norm": jw.ClipNorm(0.5),
    "bound norm": jw.projections.BoundNorm(1.0, 1.0),
    "bound sum": jw.projections.BoundSum(1.0, 1.0),
    "simplex": jw.projections.Simplex(),
    "spectral norm": jw.SpectralNorm(n_steps=20),
    "orthogonal": jw.projections.Orthogonalize(),
    "singular values": jw.projections.ClipSingularValues(0.5),
    "quantized": jw.FakeQuantize(4),
    "quantized by unit": jw.FakeQuantize(4, per_unit=True),
    "quantized to a format": jw.FakeQuantize("int4"),
    "quantized as a whole": jw.FakeQuantize(jw.formats.integers(4, per_tensor=True)),
    "quantized with a factor": jw.FakeQuantize("nvfp4"),
    "quantized with learned scales": jw.LSQ(4),
    "pruned": jw.Prune(0.5),
    "pattern": jw.Prune((2, 4)),
    "chain": jw.Chain(jw.ClipWeights(0.5), jw.WeightNorm(scale=2.0)),
    "around": jw.Around(jw.ClipNorm(0.5)),
    "with axes": jw.WeightNorm(jw.axes.WHOLE),
}


SLOW = ("center", "clip norm", "bound sum", "simplex", "singular values", "spectral norm", "around")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in TRANSFORMS])
def test_a_transform_tells_readings_apart_where_its_results_differ(name):
    t = TRANSFORMS[name]
    cases = dict(READINGS)
    if name == "pattern":  # needs multiples of four inputs
        cases = {case: cases[case] for case in ("transposed", "conv or heads", "rows in another order")}

    def result(w, axes):
        spec = t.with_axes(axes)
        return spec.apply(w, spec.update(w, spec.init(-w, KEY)))

    weights = {
        case: np.random.default_rng(1).normal(size=shape).astype(np.float32) for case, (shape, *_) in cases.items()
    }
    results = jax.jit(lambda ws: {case: [result(ws[case], axes) for axes in cases[case][1:]] for case in cases})(
        weights
    )
    for case, (shape, *readings) in cases.items():
        apart = t.tells_apart(*(Reading.of(axes, shape).squeezed(shape) for axes in readings))
        assert apart == (not np.allclose(*results[case], atol=1e-3)), case


def selected(transform, tree, **options):
    return jw.on_tree(transform, **options).selected({path: jnp.ones(shape) for path, shape in tree.items()})


def test_a_guess_is_named_once():
    lifted = jw.on_tree(jw.SpectralNorm())
    params = {f"once_{n}": {"kernel": jnp.ones((16, 2, 8))} for n in range(2)}
    with pytest.warns(jw.AxesWarning) as told:
        state = lifted.init(params, KEY)
    (message,) = (str(w.message) for w in told)
    for part in (
        "'once_0/kernel' (16, 2, 8)",
        "'once_1/kernel'",
        "'win in out' is taken",
        "'batch in out' or 'in out out'",
    ):
        assert part in message
    assert "layout=jaxweights.layout(f, params, *args)" in message and "axes=" in message
    jax.jit(lifted.apply)(params, lifted.update(params, state))
    with pytest.warns(jw.AxesWarning, match="once_2/kernel") as told:
        lifted.init(params | {"once_2": {"kernel": jnp.ones((16, 2, 8))}}, KEY)
    assert "once_0" not in str(told[0].message)


def test_many_guesses_are_counted():
    with pytest.warns(jw.AxesWarning, match=r"'many_07' \(4, 5, 6\) and 4 more are a guess"):
        selected(jw.WeightNorm(), {f"many_{n:02}": (4, 5, 6) for n in range(12)})


def test_an_error_is_raised_each_time():
    for _ in range(2):
        with warnings.catch_warnings(), pytest.raises(jw.AxesWarning):
            warnings.simplefilter("error")
            selected(jw.WeightNorm(), {"raised": (4, 5, 6)})


def test_no_warning_where_the_axes_are_known_or_do_not_matter():
    """Warnings are errors in tests."""
    selected(jw.SpectralNorm(), {"head": (3, 8)})
    selected(jw.Prune(0.5), {"head": (3, 8)})
    selected(jw.ClipWeights(1.0), {"experts": (4, 5, 6)})
    selected(jw.WeightNorm(STACK), {"experts": (4, 5, 6)})
    selected(jw.WeightNorm(), {"experts": (4, 5, 6)}, layout={"experts": STACK})
    params = {"experts": jnp.ones((4, 5, 6))}
    selected(jw.WeightNorm(), {"experts": (4, 5, 6)}, layout=jw.describe(params))
    selected(jw.Chain(jw.ClipWeights(1.0), jw.SpectralNorm()), {"experts": (4, 5, 6), "kernel": (5, 6)}, where="kernel")
    selected(jw.SpectralNorm(), {"conv1/kernel": (3, 3, 1, 32), "conv2/kernel": (3, 3, 32, 64), "fc/kernel": (64, 10)})
