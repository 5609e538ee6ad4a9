"""The page of errors and warnings quotes them as they are."""

import inspect
import re
import sys
import warnings
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from bad_input import compression, files, formats, modules, shapes, sparsity, specs, trees, weights
from bad_input.vocabulary import W
from flax import nnx

import jaxweights as jw

DOCS = Path(__file__).parents[2] / "docs"
sys.path.append(str(DOCS))

from messages import GROUPS, WARNINGS  # noqa: E402

TABLES = (weights, sparsity, shapes, specs, trees, modules, formats, files, compression)
CASES = {case[0]: case[1] for table in TABLES for case in table.CASES}
KEY = jax.random.key(0)


def fits(quoted: str, text: str) -> bool:
    """Whether a text is the quoted one, up to what … stands for and the path in front."""
    text = re.sub(r"^\w+ at '[^']*': ", "", text)
    parts = map(re.escape, quoted.split("…"))
    return re.fullmatch(".*".join(parts), text, re.S) is not None


ERRORS = [message for name, group in GROUPS.items() if name != "warnings" for message in group]


@pytest.mark.parametrize("message", ERRORS, ids=lambda m: m.case)
def test_errors_are_as_quoted(message):
    f = CASES[message.case]
    with pytest.raises((ValueError, TypeError)) as info:
        f(W) if inspect.signature(f).parameters.get("w") else f()
    assert fits(message.says, str(info.value)), str(info.value)


@pytest.mark.parametrize("message", WARNINGS, ids=lambda m: m.says)
def test_warnings_are_as_quoted(message):
    model, x = jw.linen.Transformed(nn.Dense(3), jw.SpectralNorm()), jnp.ones((2, 6))
    names = {"jw": jw, "jax": jax, "jnp": jnp, "nn": nn, "nnx": nnx, "key": KEY, "model": model, "x": x}
    if "variables" in message.case:
        names["variables"] = model.init(KEY, x)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        eval(message.case, names)
    assert any(fits(message.says, str(w.message)) for w in caught), [str(w.message) for w in caught]


def test_every_warning_of_the_library_is_there():
    page = " ".join(m.means for m in WARNINGS)
    for name in ("jw.AxesWarning", "jw.StaleStateWarning", "jw.nnx.StoredWeightsWarning"):
        assert name in page
