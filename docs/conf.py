"""The documentation site: `make docs` builds it into docs/_build/html, and fetches nothing."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

project = "megatron_precision"
author = "The megatron_precision authors"
copyright = author

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build", "benchmarks"]

# Headings become link targets, so that a broken anchor fails the build.
myst_heading_anchors = 3

# The API is read from the docstrings; the engines are not imported for it.
autodoc_mock_imports = ["megatron", "torch", "transformers", "vllm"]
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False

html_theme = "furo"
html_title = "megatron_precision"
html_show_sphinx = False
html_copy_source = False
html_static_path = ["_static"]
html_css_files = ["site.css"]
copybutton_exclude = ".linenos, .gp, .go"
