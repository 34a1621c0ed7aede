"""The documentation site. ``make docs`` builds it offline, with warnings as errors."""

from __future__ import annotations

import sys
from pathlib import Path

import pathnet

sys.path.insert(0, str(Path(__file__).parent))

project = "pathnet"
author = "The pathnet authors"
copyright = author
version = release = pathnet.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "extensions.aliases",
    "extensions.commands",
    "extensions.mathml",
    "extensions.references",
    "extensions.signatures",
]
exclude_patterns = ["extensions"]
# Dashes alone: quotation marks and ellipses stay as they are typed.
smartquotes_action = "D"

# Notebooks show the outputs that they are stored with; the tests execute them and compare.
nb_execution_mode = "off"
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

# Every reference must lead somewhere: `Tape` in a docstring is a link.
nitpicky = True
nitpick_ignore_regex = [
    ("py:.*", r"(collections|contextlib|dataclasses|matplotlib|numpy|pathlib|rich|torch|typing)\..*"),
    ("py:class", r"Store|Tensor|Path|Any|Callable|Iterable|Mapping|Sequence|NDArray|nn\..*|np\..*|torch"),
    ("py:class", r"bool|u?int\d+|float\d+"),
]
default_role = "py:obj"

autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
# Defaults as they are written, not as they print.
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
# "float64 [n + 1]: ..." describes a tensor, and is no name of a type.
napoleon_use_rtype = False
napoleon_attr_annotations = True
python_use_unqualified_type_names = True
# A parameter a line, where all of them do not fit into one.
maximum_signature_line_length = 88
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

html_theme = "furo"
html_title = "pathnet"
html_static_path = ["static"]
html_css_files = ["pathnet.css"]
html_favicon = "static/pathnet.svg"
html_logo = "static/pathnet.svg"
html_math_renderer = "mathml"
html_show_copyright = False
pygments_style = "a11y-light"
pygments_dark_style = "github-dark"
html_theme_options = {
    "navigation_with_keys": True,
    "top_of_page_buttons": [],
    "light_css_variables": {"color-brand-primary": "#1f5a94", "color-brand-content": "#1f5a94"},
    "dark_css_variables": {"color-brand-primary": "#8fbce6", "color-brand-content": "#8fbce6"},
}
