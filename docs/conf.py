"""Sphinx: `make docs` builds docs/_build/html."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import generate  # noqa: E402

import ghm_d2  # noqa: E402

generate.write_all(HERE / "generated")

project = "ghm_d2"
author = "ghm_d2 authors"
version = release = ghm_d2.__version__
html_theme = "sphinx_rtd_theme"
html_show_copyright = False
html_static_path = ["static"]
html_css_files = ["ghm_d2.css"]
html_theme_options = {"navigation_depth": 3}

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "generated"]
myst_heading_anchors = 4

add_module_names = False
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
# The arguments are described below the signature of __init__ or forward.
autodoc_default_options = {"members": True, "show-inheritance": True}
autoclass_content = "both"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
# Docstrings use Markdown's single backticks for names.
default_role = "code"
