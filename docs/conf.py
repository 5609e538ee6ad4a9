"""Settings of the documentation. Build it from the root of the repository, with the extra `docs` installed:

    sphinx-build -W --keep-going -j 2 docs docs/_build/html

Nothing is fetched: formulas are MathML, pictures come from pictures.py, links to other packages from inventories.py.
The notebooks of guides/ are executed. docs/_build/.jupyter_cache keeps their outputs until their code changes:
delete it after a change of the library.
"""

import os
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE / "extensions")]
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Notebooks show their pictures, and `!jaxweights` is the command of this environment.
os.environ.pop("MPLBACKEND", None)
os.environ["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])

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
    "breaks",
    "described",
    "docstrings",
    "drawn",
    "executed",
    "inserts",
    "links",
    "mathml",
    "titles",
]
exclude_patterns = ["_build", "extensions"]
nitpicky = False

html_theme = "furo"
html_title = f"jaxweights {release}"
html_static_path = ["_static"]
html_css_files = ["style.css"]
html_favicon = "_static/icon.svg"
html_copy_source = False
html_show_sourcelink = False
html_show_copyright = False
html_domain_indices = False  # the reference is the index of modules
html_math_renderer = "mathml"
templates_path = []

# Markdown. tests/docs/test_pages.py runs the code blocks of pages.
myst_enable_extensions = ["dollarmath", "deflist", "colon_fence"]
myst_heading_anchors = 3

# The notebooks, which this build runs: each once, in a kernel of this environment. What fails is a warning, with its
# traceback, and so is anything that a cell writes to stderr.
nb_execution_mode = "cache"
nb_execution_in_temp = True
nb_execution_timeout = 300  # seconds a cell; on a busy machine they add up
nb_execution_show_tb = True
nb_kernel_rgx_aliases = {".*": "python3"}
nb_merge_streams = True
nb_output_stderr = "warn"

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
