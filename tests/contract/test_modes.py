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
def strict_without_jit():
    """Strict promotion, and no program: what is only right in a compiled one fails."""
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"), jax.disable_jit():
        yield


@contextlib.contextmanager
def otherwise():
    """64 bits, keys of another kind, and products of less precision, at once."""
    with enable_x64(), jax.default_prng_impl("rbg"), jax.default_matmul_precision("bfloat16"):
        yield


MODES = {
    "disable_jit": jax.disable_jit,
    "x64": enable_x64,
    "bfloat16 products": lambda: jax.default_matmul_precision("bfloat16"),
}
"""Modes that do not change the values of a weight in float32."""

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
@pytest.mark.parametrize(
    "mode", [pytest.param(mode, marks=[] if mode == "disable_jit" else [pytest.mark.slow]) for mode in MODES]
)
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
    """Eagerly, so that JAX sees each intermediate value. They are those of a program."""
    with raising():
        new, gradient = value_and_gradient(case, weight(case))
    assert np.isfinite(new).all() and np.isfinite(gradient).all()
    close(jax.jit(case.call)(weight(case)), new, 1e-5)


@pytest.mark.slow
@one_of_each_kind
def test_no_tracer_leaks(case):
    with jax.checking_leaks():
        jax.eval_shape(lambda w: value_and_gradient(case, w), jax.ShapeDtypeStruct(case.shape, jnp.float32))


@one_of_each_kind
def test_keys_may_be_of_any_kind(case):
    w = weight(case)
    key = jax.random.key(7, impl="rbg")
    for got in value_and_gradient(case, w, key):
        assert got.shape == w.shape and got.dtype == w.dtype and np.isfinite(got).all()


def run(example, checker):
    runner = doctest.DebugRunner(checker=checker, verbose=False)
    runner.run(
        doctest.DocTest(
            example.examples, dict(example.globs), example.name, example.filename, example.lineno, example.docstring
        )
    )


@pytest.mark.slow
@pytest.mark.parametrize("example", examples())
def test_examples_give_what_they_say_without_jit(example):
    """And where nothing may be promoted, unless the example does so itself."""
    with jax.disable_jit() if example.name.endswith(OWN_PROMOTION) else strict_without_jit():
        run(example, doctest.OutputChecker())


@pytest.mark.slow
@pytest.mark.parametrize("example", examples()[::3])
def test_examples_run_in_other_modes(example):
    """A third of them: few meet what these modes change."""
    with otherwise():
        run(example, AnyOutput())


class AnyOutput(doctest.OutputChecker):
    """Accepts every output: 64-bit floats print other dtypes and sizes. Only errors fail."""

    def check_output(self, want, got, optionflags):
        return True
