"""Every public name is in the reference, once, and has an example."""

import inspect
import re
from collections import Counter
from pathlib import Path

import jaxweights as jw

FOLDER = Path(__file__).parents[2] / "docs" / "reference"
PAGES = {page.stem: page.read_text() for page in FOLDER.glob("*.md")}
MODULES = {name: value for name in jw.__all__ if inspect.ismodule(value := getattr(jw, name))}
LISTED = Counter(
    name for page in PAGES.values() for name in re.findall(r"^\.\. auto(?:function|class):: (\w+)$", page, re.M)
)
WITHOUT_EXAMPLE = {
    # What functions return or take, protocols to subclass, warnings.
    *("Fold", "InputStats", "JointTransform", "Method", "MixedBits", "MupScales", "QuantizedArray", "Range", "Scales"),
    *(
        "BlockSparseArray",
        "ClusteredArray",
        "PackedArray",
        "Transform",
        "TransformVariable",
        "TreeState",
        "UnitGroup",
        "UnitSlot",
    ),
    *("AxesWarning", "StaleStateWarning", "StoredWeightsWarning", "dense_general"),
    # Linen modules with the attributes of Flax's, and structures without arguments.
    *("BatchNorm", "GroupNorm", "InstanceNorm", "LayerNorm", "RMSNorm", "InputUnits", "OutputUnits"),
}


def test_every_submodule_has_a_page():
    """If this fails: add docs/reference/NAME.md, as those beside it are, and NAME to index.md there."""
    shown = Counter(
        name for page in PAGES.values() for name in re.findall(r"^\.\. automodule:: jaxweights\.(\w+)$", page, re.M)
    )
    assert shown == dict.fromkeys(MODULES, 1)


def test_every_name_of_the_package_is_listed_once():
    """If this fails: add the name to the page of its technique in docs/reference."""
    elsewhere = {id(getattr(module, name)) for module in MODULES.values() for name in module.__all__}
    own = [name for name in jw.__all__ if name not in MODULES and id(getattr(jw, name)) not in elsewhere]
    assert dict(LISTED) == dict.fromkeys(own, 1)


def test_every_constant_is_described():
    """What has no docstring is described in the page of its module: `.. py:data::`. If this fails, add it there."""
    told = Counter(name for page in PAGES.values() for name in re.findall(r"^\.\. py:data:: (\w+)$", page, re.M))
    ours = lambda v: (inspect.isclass(v) or inspect.isfunction(v)) and v.__module__.startswith("jaxweights")
    constants = {n for module in MODULES.values() for n in module.__all__ if not ours(getattr(module, n))}
    assert told == dict.fromkeys(constants, 1)


def test_every_page_is_in_the_index():
    toctrees = re.findall(r"^```\{toctree\}\n(.*?)^```", PAGES["index"], re.S | re.M)
    shown = [line for tree in toctrees for line in tree.split() if re.fullmatch(r"[a-z]\w*", line)]
    assert sorted(set(shown) & set(PAGES)) == sorted(PAGES.keys() - {"index"})


def test_functions_and_classes_have_examples():
    missing = set()
    for part in [jw, *(module for name, module in MODULES.items() if name != "typing")]:
        for name in part.__all__:
            value = getattr(part, name)
            ours = (inspect.isfunction(value) or inspect.isclass(value)) and value.__module__.startswith("jaxweights")
            if ours and ">>> " not in (value.__doc__ or ""):
                missing.add(name)
    assert not missing - WITHOUT_EXAMPLE
