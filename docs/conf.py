"""The documentation site. ``make docs`` builds it offline, with warnings as errors."""

from __future__ import annotations

import sys
from pathlib import Path

import pathnet

sys.path.insert(0, str(Path(__file__).parent))

project = "pathnet"
author = "The pathnet authors"
version = release = pathnet.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "extensions.mathml",
]
exclude_patterns = ["extensions"]

# Notebooks show the outputs that they are stored with; the tests execute them and compare.
nb_execution_mode = "off"
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

# Every reference must lead somewhere: `Tape` in a docstring is a link.
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(collections|numpy|pathlib|torch|typing)\..*")]
default_role = "py:obj"

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
napoleon_numpy_docstring = False
# "float64 [n + 1]: ..." describes a tensor, and is no name of a type.
napoleon_use_rtype = False
python_use_unqualified_type_names = True

html_theme = "furo"
html_title = "pathnet"
html_static_path = ["static"]
html_math_renderer = "mathml"
