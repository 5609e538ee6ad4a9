"""Every case of `cases.py`, and the example of every docstring, under the modes of JAX that users switch on."""

import contextlib
import doctest
import importlib
import pkgutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES, KEY
from contract.table import close, each_kind, weight
from x64 import enable_x64

import jaxweights as jw


@contextlib.contextmanager
def raising():
    """All modes that turn what usually passes into an error."""
    with (
        jax.numpy_rank_promotion("raise"),
        jax.numpy_dtype_promotion("strict"),
        jax.debug_nans(True),
        jax.debug_infs(True),
    ):
        yield


@contextlib.contextmanager
def tracing_otherwise():
    """What changes how a program is traced, but not what an example prints, at once."""
    with jax.checking_leaks(), jax.default_matmul_precision("bfloat16"), jax.default_prng_impl("rbg"):
        yield


MODES = {
    "raising": raising,
    "disable_jit": jax.disable_jit,
    "checking_leaks": jax.checking_leaks,
    "x64": enable_x64,
    "bfloat16 products": lambda: jax.default_matmul_precision("bfloat16"),
    "tracing otherwise": tracing_otherwise,
}

TRACED = ["checking_leaks", "x64", "bfloat16 products"]
"""Modes that change how a program is traced, but not its values."""

EXAMPLE_MODES = ["raising", "disable_jit", "x64", "tracing otherwise"]

OWN_PROMOTION = (
    "bias_correction.correct_biases",
    "equalize.equalize",
    "smooth.smooth",
    "models.capture.capture",
    "data_init.data_dependent_init",
    "inference.unit_groups",
    "models.layout.layout",
    "models.norm_folds.norm_folds",
    "one_shot.one_shot",
    "linen.transformed.Transformed",
    "nnx.transformed.transformed",
)
"""Their examples have models that promote ranks themselves, as `x @ w + b` does, or optax promote dtypes."""


def over(modes, slow=()):
    return pytest.mark.parametrize(
        "mode", [pytest.param(m, marks=[pytest.mark.slow] if m in slow else []) for m in modes]
    )


one_of_each_kind = pytest.mark.parametrize("case", [pytest.param(c, id=c.name) for c in CASES if c.kind])


def value_and_gradient(case, w, key=KEY):
    new, transpose = jax.vjp(lambda w: case.call(w, key), w)
    return new, *transpose(jnp.ones_like(new))


def examples():
    finder = doctest.DocTestFinder(exclude_empty=True)
    names = ["jaxweights", *(m.name for m in pkgutil.walk_packages(jw.__path__, "jaxweights."))]
    found = {t.name: t for name in names for t in finder.find(importlib.import_module(name), name) if t.examples}
    return [pytest.param(t, id=name.removeprefix("jaxweights.")) for name, t in found.items()]


@one_of_each_kind
@over(["disable_jit", *TRACED], slow=TRACED)
def test_values_and_gradients_are_the_same(case, mode):
    w = weight(case)
    expected = value_and_gradient(case, w)
    with MODES[mode]():
        got = value_and_gradient(case, w)
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype
        close(a, b, 1e-4)


@each_kind
def test_nothing_is_promoted_or_left_undefined(case):
    """Eagerly, so that JAX sees each intermediate value."""
    with raising():
        new, gradient = value_and_gradient(case, weight(case))
    assert np.isfinite(new).all() and np.isfinite(gradient).all()


@one_of_each_kind
def test_keys_may_be_of_any_kind(case):
    w = weight(case)
    key = jax.random.key(7, impl="rbg")
    for got in value_and_gradient(case, w, key):
        assert got.shape == w.shape and got.dtype == w.dtype and np.isfinite(got).all()


@over(EXAMPLE_MODES, slow=set(EXAMPLE_MODES) - {"raising"})
@pytest.mark.parametrize("example", examples())
def test_examples_give_what_they_say(example, mode):
    if mode == "raising" and example.name.endswith(OWN_PROMOTION):
        pytest.skip("the model or the optimizer of this example promotes by itself")
    # 64-bit floats print other dtypes and sizes.
    check = doctest.OutputChecker() if mode != "x64" else AnyOutput()
    runner = doctest.DebugRunner(checker=check, verbose=False)
    fresh = doctest.DocTest(
        example.examples, dict(example.globs), example.name, example.filename, example.lineno, example.docstring
    )
    with MODES[mode]():
        runner.run(fresh)


class AnyOutput(doctest.OutputChecker):
    """Accepts every output: only errors fail."""

    def check_output(self, want, got, optionflags):
        return True
