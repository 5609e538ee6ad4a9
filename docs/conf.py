"""Settings of the documentation. Build it from the root of the repository, with the extra `docs` installed:

    sphinx-build -W docs docs/_build

Nothing is fetched: formulas are MathML, pictures come from pictures.py, links to other packages from inventories.py.
"""

import os
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE / "extensions")]
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import inventories  # noqa: E402

import jaxweights  # noqa: E402

project = "jaxweights"
author = "the authors of jaxweights"
version = release = jaxweights.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.intersphinx",
    "sphinx_copybutton",
    # In extensions/.
    "docstrings",
    "drawn",
    "inserts",
    "links",
    "mathml",
]
exclude_patterns = ["_build", "extensions"]
nitpicky = False

html_theme = "furo"
html_title = f"jaxweights {release}"
html_static_path = ["_static"]
html_css_files = ["style.css"]
html_copy_source = False
html_show_sourcelink = False
html_show_copyright = False
html_math_renderer = "mathml"
templates_path = []

# Markdown. tests/docs/test_pages.py runs the code blocks, tests/test_examples.py the notebooks, and the build neither.
myst_enable_extensions = ["dollarmath", "deflist", "colon_fence"]
myst_heading_anchors = 3
nb_execution_mode = "off"
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

# The reference: signatures without types, which the docstrings have, and with defaults as they are written.
autodoc_typehints = "none"
autodoc_preserve_defaults = True
autodoc_member_order = "groupwise"
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_custom_sections = [("Attributes", "params_style")]
add_module_names = False
toc_object_entries_show_parents = "hide"
python_use_unqualified_type_names = True

intersphinx_mapping = inventories.mapping(HERE / "_build" / "inventories")
