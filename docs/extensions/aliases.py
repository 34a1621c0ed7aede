"""Names of types: signatures show `BatchNormMode`, and ``{alias}`` says what it stands for.

The content of the directive is the description, in place of a string below the assignment in the code.
"""

from __future__ import annotations

import ast
from importlib import import_module
from inspect import getsource

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

__all__ = ["setup"]

ALIASES = (
    *("Array", "Arrays", "At", "BatchNormMode", "BatchNormPolicy", "By", "Coefficient", "Form", "FusedEngine"),
    *(
        "Kind",
        "Loss",
        "Measure",
        "Method",
        "Modules",
        "Networks",
        "Parallel",
        "Part",
        "Precision",
        "Progress",
        "Routing",
    ),
    *("Shortcut", "Source", "Undrawn"),
)
"""Aliases that signatures show; a name without an ``{alias}`` is a reference that leads nowhere."""


def _meaning(name: str) -> str:
    """Return the expression that an alias is assigned, as the code writes it."""
    module, _, alias = name.rpartition(".")
    for node in ast.parse(getsource(import_module(module))).body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if isinstance(target, ast.Name) and target.id == alias:
            value = getattr(node, "value", None)
            return str(value.value) if isinstance(value, ast.Constant) else ast.unparse(value)  # type: ignore[arg-type]
    raise ValueError(f"alias: expected a name that {module} assigns, got {alias!r}")


class _Alias(SphinxDirective):
    """``{alias} HOME.NAME [PUBLIC.NAME]``: the type that a name stands for, and what it means."""

    required_arguments = 1
    optional_arguments = 1
    has_content = True

    def run(self) -> list[nodes.Node]:
        home = self.arguments[0]
        name = self.arguments[-1]
        module, _, alias = name.rpartition(".")
        options = [f":module: {module}", f":canonical: {_meaning(home)}"]
        lines = [f"```{{py:type}} {alias}", *options, "", *self.content, "```"]
        return self.parse_text_to_nodes("\n".join(lines))


def _name(app: Sphinx, config: object) -> None:
    app.config.autodoc_type_aliases = {name: name for name in ALIASES}


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directive, and keep the names in signatures (called by Sphinx)."""
    app.add_directive("alias", _Alias)
    app.connect("config-inited", _name)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
