"""Bad input: the error type, and the part of the message that says what to do."""

import inspect
import re
from pathlib import Path

import jax
import pytest
from bad_input import compression, files, formats, modules, recipes, shapes, sparsity, specs, trees, weights
from bad_input.vocabulary import W

import jaxweights as jw

TABLES = (weights, sparsity, shapes, specs, trees, modules, formats, files, compression, recipes)
CASES = [case for table in TABLES for case in table.CASES]
TRACED = [case for case in CASES if inspect.signature(case[1]).parameters.get("w")]
OTHERS = [case for case in CASES if case not in TRACED]


def parametrized(cases):
    return pytest.mark.parametrize(("function", "error", "remedy"), [pytest.param(*c[1:], id=c[0]) for c in cases])


def check(function, error, remedy):
    """Checks that `function` raises exactly `error`, not a subclass, with `remedy` in the message."""
    with pytest.raises(error) as info:
        function()
    assert type(info.value) is error
    assert remedy in str(info.value)


@parametrized(OTHERS)
def test_error_names_the_remedy(function, error, remedy):
    check(function, error, remedy)


@parametrized(TRACED)
def test_error_under_jit_names_the_remedy(function, error, remedy):
    check(lambda: jax.jit(lambda w: function(w))(W), error, remedy)


@pytest.mark.slow
@parametrized(TRACED)
def test_error_is_the_same_without_jit(function, error, remedy):
    check(lambda: function(W), error, remedy)


def test_ids_are_unique():
    names = [case[0] for case in CASES]
    assert sorted(set(names)) == sorted(names)


def test_every_public_name_has_a_case():
    table = "".join(Path(t.__file__).read_text().partition("\nCASES = [")[2] for t in TABLES)
    parts = [jw, *(m for n in jw.__all__ if inspect.ismodule(m := getattr(jw, n)) and m not in (jw.axes, jw.typing))]
    names = {name for part in parts for name in part.__all__}
    names = {name for name in names if not name.isupper()}  # without constants
    # Made by functions that are covered.
    without = {"BlockSparseArray", "Initializer", "MupScales", "TransformVariable"}
    without |= {"AxesWarning", "StaleStateWarning", "StoredWeightsWarning"}
    assert {name for name in names if not re.search(rf"\b{name}\b", table)} == without
