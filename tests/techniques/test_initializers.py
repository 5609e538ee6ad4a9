"""Random initializers: the moments of 250,000 draws against the distribution's own, within six standard errors."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.nnx.nn import activations
from scipy import stats
from x64 import enable_x64

import jaxweights as jw
from jaxweights.core.axes import ATTENTION_IN, Axes, depthwise

init = jw.initializers
SHAPE = (400, 625)  # 250,000 draws
N_IN, N_OUT = SHAPE
MEAN = {
    "fan_in": N_IN,
    "fan_out": N_OUT,
    "fan_avg": (N_IN + N_OUT) / 2,
    "fan_geo_avg": math.sqrt(N_IN * N_OUT),
}


def normal(k):
    """E[zᵏ] of a standard normal variable."""
    return 0 if k % 2 else math.prod(range(1, k, 2))


def uniform(low, high):
    """k -> E[zᵏ] of a uniform variable on [low, high]."""
    return lambda k: (high ** (k + 1) - low ** (k + 1)) / ((k + 1) * (high - low))


def cut(low, high):
    """k -> E[zᵏ] of a standard normal variable truncated to [low, high], by integration by parts."""
    density = lambda x: math.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)
    mass = (math.erf(high / math.sqrt(2)) - math.erf(low / math.sqrt(2))) / 2

    def moment(k):
        if k < 1:
            return 1 + k  # E[z⁰] = 1, and the E[z⁻¹] term is 0
        return (k - 1) * moment(k - 2) - (high ** (k - 1) * density(high) - low ** (k - 1) * density(low)) / mass

    return moment


UNIT = uniform(-math.sqrt(3), math.sqrt(3))
CUT = 0.87962566103423978  # standard deviation of a normal distribution truncated at ±2
# name: (initializer, mean, std, E[zᵏ] of z = (w − mean)/std, bounds of z)
DRAWS = {
    "normal": (functools.partial(init.normal, mean=0.5, std=2.0), 0.5, 2.0, normal, None),
    "uniform": (functools.partial(init.uniform, low=-1.0, high=3.0), 1.0, 2 / math.sqrt(3), UNIT, math.sqrt(3)),
    "truncated_normal": (functools.partial(init.truncated_normal, std=0.02), 0.0, 0.02, cut(-2, 2), 2),
    "truncated_normal on one side": (
        functools.partial(init.truncated_normal, mean=1.0, std=3.0, low=-0.5, high=2.5),
        1.0,
        3.0,
        cut(-0.5, 2.5),
        (-0.5, 2.5),
    ),
}
for mode, n in MEAN.items():
    scaled = functools.partial(init.variance_scaling, scale=3.0, mode=mode)
    DRAWS[f"variance_scaling {mode}"] = (scaled, 0.0, math.sqrt(3 / n), normal, None)
    DRAWS[f"he_normal {mode}"] = (functools.partial(init.he_normal, mode=mode), 0.0, math.sqrt(2 / n), normal, None)
for name, std in {
    "xavier": math.sqrt(1 / MEAN["fan_avg"]),
    "he": math.sqrt(2 / N_IN),
    "lecun": math.sqrt(1 / N_IN),
}.items():
    drawn, flat = getattr(jw.initializers, f"{name}_normal"), getattr(jw.initializers, f"{name}_uniform")
    DRAWS[f"{name}_normal"] = (drawn, 0.0, std, normal, None)
    DRAWS[f"{name}_normal truncated"] = (functools.partial(drawn, truncated=True), 0.0, std / CUT, cut(-2, 2), 2)
    DRAWS[f"{name}_uniform"] = (flat, 0.0, std, UNIT, math.sqrt(3))
DRAWS |= {
    "xavier_normal gain": (functools.partial(jw.xavier_normal, gain=2.0), 0.0, 2 / math.sqrt(512.5), normal, None),
    "xavier_uniform gain": (
        functools.partial(jw.xavier_uniform, gain=2.0),
        0.0,
        2 / math.sqrt(512.5),
        UNIT,
        math.sqrt(3),
    ),
    "he_uniform leaky": (
        functools.partial(jw.he_uniform, negative_slope=0.5, mode="fan_out"),
        0.0,
        math.sqrt(2 / 1.25 / N_OUT),
        UNIT,
        math.sqrt(3),
    ),
    "fixup": (
        functools.partial(init.fixup, n_branches=16, n_layers=3),
        0.0,
        math.sqrt(2 / N_IN) * 16 ** (-1 / 4),
        normal,
        None,
    ),
}


def draw(initializer, shape=SHAPE, **options):
    return np.float64(jax.jit(lambda key: initializer(key, shape, **options))(jax.random.key(7)))


def check_moments(z, moment):
    """Checks mean, variance, skewness and kurtosis within six standard errors; `moment(k)` is E[zᵏ]."""
    power = 1
    for k in range(1, 5):
        power = power * z
        error = math.sqrt((moment(2 * k) - moment(k) ** 2) / z.size)
        assert abs(power.mean() - moment(k)) < 6 * error, k


@pytest.mark.parametrize("name", DRAWS)
def test_moments_and_limits_of_many_draws(name):
    initializer, mean, std, moment, bounds = DRAWS[name]
    z = (draw(initializer) - mean) / std
    check_moments(z, moment)
    if bounds is None:
        assert np.abs(z).max() > 4  # tails are not truncated
        return
    low, high = bounds if isinstance(bounds, tuple) else (-bounds, bounds)
    slack = 1e-3 * (high - low)
    assert low - 1e-6 * abs(low) <= z.min() < low + slack
    assert high - slack < z.max() <= high * (1 + 1e-6)


def test_the_constant_of_the_truncation():
    assert math.sqrt(cut(-2, 2)(2)) == pytest.approx(CUT, rel=1e-12)


TRUNCATIONS = [
    (-100, 100),
    (-math.inf, math.inf),
    (-2, 2),
    (-1, 20),
    (0.9, math.inf),
    (-40, -1.5),
    (5, 6),
    (-6, -5),
    (4.9, 5.2),
    (10, 30),
    (10, math.inf),
    (-math.inf, -8),
    (0.3, 0.3001),
    (-0.012, -0.001),
    (3, 3.011),
    (40, 40.1),
    (100, math.inf),
]


def check_truncations(dtype, n):
    """Checks the distribution of `n` draws in every range against SciPy, and that they are as fine as the dtype."""
    draw = jax.jit(lambda low, high: init.truncated_normal(jax.random.key(7), (n,), dtype, low=low, high=high))
    uniform = np.random.default_rng(0).uniform(size=n)
    for low, high in np.asarray(TRUNCATIONS, dtype):
        z, exact = np.asarray(draw(low, high)), stats.truncnorm(np.float64(low), np.float64(high))
        assert (low <= z).all() and (z <= high).all(), (low, high)
        assert stats.kstest(np.float64(z), exact.cdf).pvalue > 1e-3, (low, high)
        ideal = np.unique(exact.ppf(uniform).astype(dtype)).size
        assert np.unique(z).size > 0.9 * ideal, (low, high)


def test_truncated_normal_in_every_range():
    check_truncations(np.float32, 2**15)


def test_no_draw_is_at_a_limit_that_is_no_limit():
    """One uniform draw in 2²³ is 0, where the inverse of the CDF is infinite: with this key there is one."""
    key, n = jax.random.key(46), 2**16
    assert jax.random.uniform(key, (n,)).min() == 0
    for limit in (100.0, math.inf):
        z = init.truncated_normal(key, (n,), low=-limit, high=limit)
        assert jnp.abs(z).max() < 5.5


@pytest.mark.slow
def test_truncated_normal_in_every_range_of_float64():
    with enable_x64(True):
        check_truncations(np.float64, 2**17)


def test_a_truncation_far_from_the_mean_keeps_small_values():
    """N(−0.5, 0.05²) on [0, 1]: the limits are 10 and 30 standard deviations above the mean."""
    w = draw(init.truncated_normal, mean=-0.5, std=0.05, low=10.0, high=30.0).ravel()
    exact = stats.truncnorm(10, 30, -0.5, 0.05)
    assert stats.kstest(w, exact.cdf).pvalue > 1e-3 and (w >= 0).all()
    assert np.unique(w).size > 0.9 * w.size
    w = draw(init.truncated_normal, mean=0.25, std=0.0, low=-math.inf)
    assert (w == 0.25).all()


def test_fans_follow_the_axes():
    key = jax.random.key(7)
    cases = [
        ((3, 3, 4, 8), None, 36, 72),
        ((3, 3, 1, 32), None, 9, 288),
        ((3, 3, 1, 32), depthwise(32), 9, 9),
        ((3, 3, 4, 8), depthwise(2), 36, 36),
        ((9, 4, 8), ATTENTION_IN, 9, 32),
        ((9, 4, 8), Axes(batch=0), 4, 8),
        ((9, 4, 8), Axes(input=1, output=0, batch=2), 4, 9),
        ((288,), None, 288, 1),
    ]
    initializers = jw.xavier_normal, functools.partial(jw.he_normal, mode="fan_out"), init.lecun_normal
    draw_all = lambda shape, axes: [f(key, shape, axes=axes) for f in initializers]
    drawn = jax.jit(lambda: [(init.normal(key, shape), draw_all(shape, axes)) for shape, axes, _, _ in cases])()
    for (unit, weights), case in zip(drawn, cases, strict=True):  # the same draw
        *_, n_in, n_out = case
        for w, variance in zip(weights, (2 / (n_in + n_out), 2 / n_out, 1 / n_in), strict=True):
            np.testing.assert_allclose(w, unit * math.sqrt(variance), rtol=1e-6, err_msg=f"{case}")


ONE_OF_EACH = {
    "zeros": init.zeros,
    "ones": init.ones,
    "constant": functools.partial(init.constant, value=0.3),
    "normal": init.normal,
    "uniform": init.uniform,
    "truncated_normal": init.truncated_normal,
    "variance_scaling": init.variance_scaling,
    "he_uniform": init.he_uniform,
    "orthogonal": init.orthogonal,
    "delta_orthogonal": init.delta_orthogonal,
    "identity": init.identity,
    "dirac": init.dirac,
    "sparse": functools.partial(init.sparse, sparsity=0.5),
    "fixup": functools.partial(init.fixup, n_branches=4, n_layers=2),
}


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_half_precision_rounds_the_float32_draw(name):
    """Runs without jit, which may fuse a product and a sum into one rounding."""
    with jax.numpy_dtype_promotion("strict"):
        draws = [ONE_OF_EACH[name](jax.random.key(0), (20, 30), t) for t in (jnp.float32, jnp.bfloat16, jnp.float16)]
    assert [w.dtype for w in draws] == [jnp.float32, jnp.bfloat16, jnp.float16]
    for w in draws:
        np.testing.assert_array_equal(w, np.asarray(draws[0]).astype(w.dtype))


def test_float64():
    names = ("normal", "uniform", "truncated_normal", "he_uniform", "orthogonal")
    with enable_x64(True):
        drawn = jax.jit(lambda: [ONE_OF_EACH[name](jax.random.key(0), (20, 30), jnp.float64) for name in names])()
    for name, w in zip(names, drawn, strict=True):
        assert w.dtype == np.float64 and (np.asarray(w) != np.float32(w)).any(), name


def test_parameters_may_be_traced():
    options = {
        "constant": {"value": 0.5},
        "normal": {"mean": 0.5, "std": 0.5},
        "truncated_normal": {"mean": 0.5, "std": 0.5, "low": -1.0, "high": 1.0},
        "uniform": {"low": -0.5, "high": 0.5},
        "variance_scaling": {"scale": 0.5},
        "xavier_normal": {"gain": 0.5},
        "he_normal": {"negative_slope": 0.5},
        "orthogonal": {"gain": 0.5},
        "dirac": {"gain": 0.5},
        "sparse": {"sparsity": 0.5, "std": 0.5},
    }
    draw = lambda name, options: getattr(init, name)(jax.random.key(0), (6, 8), **options)
    draw_all = lambda options: {name: draw(name, of) for name, of in options.items()}
    traced, constant = jax.jit(draw_all)(options), jax.jit(lambda: draw_all(options))()
    for name, w in traced.items():
        np.testing.assert_allclose(w, constant[name], rtol=1e-6, atol=1e-7, err_msg=name)


# Gains


@pytest.mark.parametrize(
    ("activation", "expected"),
    [
        (jax.nn.relu, math.sqrt(2)),
        (lambda x: jax.nn.leaky_relu(x, 0.2), math.sqrt(2 / 1.04)),
        (lambda x: x, 1),
        (lambda x: x**2, 1 / math.sqrt(3)),
        (jnp.cos, 1 / math.sqrt((1 + math.exp(-2)) / 2)),
        (jax.nn.selu, 1),
        ("relu6", math.sqrt(2)),  # to eight digits: z > 6 has probability 1e-9
        ("identity", 1),
    ],
)
def test_gain_of_a_function(activation, expected):
    assert init.gain(activation) == pytest.approx(expected, rel=1e-6)
    assert jax.jit(lambda: init.gain(activation))() == pytest.approx(expected, rel=1e-6)


def test_gain_takes_the_names_of_flax():
    """Those of torch have values of their own."""
    of_several_entries = {"glu", "log_softmax", "logsumexp", "one_hot", "softmax", "standardize"}
    names = set(activations.__all__) - of_several_entries - {"PReLU", "relu", "selu", "sigmoid", "tanh"}
    assert {"gelu", "silu", "swish", "leaky_relu"} <= names
    for name in names:
        assert init.gain(name) == pytest.approx(init.gain(getattr(activations, name)), rel=1e-6), name


def test_gain_keeps_the_size_of_activations():
    n = 400

    @jax.jit
    def run(z, keys):
        weight = lambda key: init.gain(jnp.tanh) * init.lecun_normal(key, (n, n))
        return jax.lax.scan(lambda z, key: (jnp.tanh(z) @ weight(key), None), z, keys)[0]

    z = run(jax.random.normal(jax.random.key(0), (n, n)), jax.random.split(jax.random.key(1), 5))
    assert jnp.mean(z**2) == pytest.approx(1, abs=0.05)
