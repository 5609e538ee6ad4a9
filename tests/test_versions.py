"""The versions agree, and a checkpoint of 0.1 is converted as docs/versions.md says."""

import re
import tomllib
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

import jaxweights as jw

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CITATION = dict(re.findall(r"^([\w-]+): +(\S.*)$", (ROOT / "CITATION.cff").read_text(), re.M))


def test_versions_and_dates_agree():
    version, date = re.search(r"^## (\S+) \((.*)\)$", (ROOT / "CHANGELOG.md").read_text(), re.M).groups()
    assert version == PROJECT["version"] == jw.__version__ == CITATION["version"]
    assert date == CITATION["date-released"]
    assert PROJECT["license"] == CITATION["license"]


def test_the_classifiers_name_the_lowest_python():
    pythons = [c.rpartition(" ")[2] for c in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", c)]
    assert f">={pythons[0]}" == PROJECT["requires-python"]


def test_a_flat_state_of_0_1_is_converted_as_the_error_says():
    model = jw.linen.Transformed(nn.Sequential([nn.Dense(4), nn.Dense(3)]), jw.Prune(0.5))
    x = jax.random.normal(jax.random.key(0), (2, 5))
    variables = model.init(jax.random.key(1), x)
    masks = variables["weight_transform"]
    state = {f"{layer}/kernel": masks[layer]["kernel"] for layer in ("layers_0", "layers_1")}
    with pytest.raises(ValueError, match=r"flax\.traverse_util: ") as error:
        model.apply({**variables, "weight_transform": state}, x)
    remedy = str(error.value).partition("flax.traverse_util: ")[2]
    assert f"`{remedy}`" in (ROOT / "docs/versions.md").read_text()
    names = {"unflatten_dict": unflatten_dict, "flatten_dict": flatten_dict, "state": state}
    converted = {**variables, "weight_transform": eval(remedy, names)}
    np.testing.assert_array_equal(model.apply(converted, x), model.apply(variables, x))
